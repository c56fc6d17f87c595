"""What a network returns, and how taps are taken: as outputs, never by forward hooks.

Hooks are dropped by some versions of ``torch.compile`` under full-graph compilation, and hidden state would have to
be kept apart from CUDA graphs by hand.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, fx, nn

from dfad.errors import ModelError, nearest
from dfad.modes import BatchNorm


class Outputs(NamedTuple):
    """What every network of this project returns."""

    logits: Tensor
    """Class scores before softmax, ``(B, classes)``."""

    taps: tuple[Tensor, ...] = ()
    """Pre-activation feature maps ``(B, channels, height, width)`` at the end of each stage: after BatchNorm and the
    addition of the shortcut, before ReLU."""


def trace(network: nn.Module) -> fx.Graph:
    """The graph of a network's forward pass, its own modules traced through and PyTorch's as nodes.

    Raises:
        ModelError: if the network cannot be traced.
    """
    try:
        return fx.Tracer().trace(network)
    except Exception as error:  # tracing runs the user's code on stand-ins, which may fail in any way
        raise ModelError(
            f"{type(network).__name__} cannot be traced by torch.fx ({type(error).__name__}: {error})."
        ) from error


def with_taps(network: nn.Module, names: Sequence[str]) -> nn.Module:
    """A network that returns :class:`Outputs` with taps, made of one that returns logits alone.

    Args:
        network: traceable by ``torch.fx``; parameters and buffers are shared with the result.
        names: input side first. Each is a module (``layer1.2.bn2``; of a container, the last operation inside it
            counts) or a node of the traced graph (``layer1_2_add``: an addition is no module).

    Raises:
        ModelError: if the network cannot be traced, or a name does not exist.
    """
    try:
        graph = trace(network)
    except ModelError as error:
        raise ModelError(f"{error} For taps, let its forward return dfad.models.taps.Outputs(logits, taps).") from error
    last_nodes: dict[str, fx.Node] = {}
    for node in graph.nodes:
        last_nodes[node.name] = node
        for module_name in node.meta.get("nn_module_stack", {}):
            last_nodes[module_name] = node
        if node.op == "call_module":
            last_nodes[str(node.target)] = node
    for name in names:
        if name not in last_nodes:
            raise ModelError(
                f"{type(network).__name__} has no module or graph node {name!r} to tap.{nearest(name, last_nodes)}"
            )
    output = next(node for node in graph.nodes if node.op == "output")
    taps = []
    for name in names:
        # a copy, for what comes after pre-activations is often a ReLU in place
        with graph.inserting_after(last_nodes[name]):
            taps.append(graph.call_method("clone", (last_nodes[name],)))
    with graph.inserting_before(output):
        outputs = graph.call_function(Outputs, (output.args[0], tuple(taps)))
    output.args = (outputs,)
    graph.lint()
    return fx.GraphModule(network, graph, type(network).__name__)


class _RecordingBatchNorm(nn.Module):
    """Stands in the place of a BatchNorm in eval mode and keeps what reached it."""

    def __init__(self, norm: BatchNorm) -> None:
        super().__init__()
        self.norm = norm
        self.features: Tensor | None = None

    def forward(self, features: Tensor) -> Tensor:
        self.features = features
        return self.norm(features)


class BatchNormTaps(nn.Module):
    """A network whose BatchNorms' inputs are outputs as well.

    Args:
        network: in eval mode; it is rebuilt in place, with each BatchNorm wrapped.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.recorders: list[_RecordingBatchNorm] = []
        for parent in list(network.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, BatchNorm) and child.running_mean is not None:
                    recorder = _RecordingBatchNorm(child)
                    setattr(parent, name, recorder)
                    self.recorders.append(recorder)

    @property
    def norms(self) -> list[BatchNorm]:
        """The BatchNorms, in the order of the features that :meth:`forward` returns."""
        return [recorder.norm for recorder in self.recorders]

    def forward(self, images: Tensor) -> tuple[object, tuple[Tensor, ...]]:
        """What the network returns, and the features that reached each of its BatchNorms."""
        result = self.network(images)
        features = tuple(recorder.features for recorder in self.recorders)
        for recorder in self.recorders:
            recorder.features = None  # or the step's graph would live on until the next one
        return result, features  # type: ignore[return-value]


def has_batchnorm(network: nn.Module) -> bool:
    """Whether a network holds statistics of the data that it was trained on."""
    return any(isinstance(module, BatchNorm) and module.running_mean is not None for module in network.modules())
