"""Taps: outputs of a traced graph if the network is plain, otherwise taken by hooks that exist only during a call.

A graph has no hidden state that could interfere with CUDA graphs and compilation; hooks work with any network.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeGuard

from torch import Tensor, fx, nn

from dfad.engine.tracing import NotPlain, is_written_in_place, trace
from dfad.errors import ModelError, first_line, nearest
from dfad.models.outputs import Outputs, as_outputs
from dfad.models.wrappers import SameNetwork
from dfad.modes import BatchNorm


def with_taps(network: nn.Module, names: Sequence[str]) -> nn.Module:
    """A network that returns :class:`Outputs` with taps, made from one that returns only logits.

    Args:
        network: not changed; shares its parameters and buffers with the result.
        names: input side first. Each is a module (``layer1.2.bn2``; for a container, the last operation inside it; for
            a module that is called more than once, the last call) or, if the network is plain
            (:mod:`dfad.engine.tracing`), a node of the traced graph (``layer1_2_add``: an addition is no module).

    Raises:
        ModelError: if a name does not exist, or is a node of a network that cannot be traced.
    """
    modules = dict(network.named_modules())
    try:
        graphs = [trace(network, training=training).graph for training in (True, False)]
        if any(not isinstance(_output(graph).args[0], fx.Node) for graph in graphs):
            raise NotPlain(f"{type(network).__name__} returns more than its logits.")
    except NotPlain as reason:
        unknown = [name for name in names if name not in modules]
        if unknown:
            raise ModelError(
                f"{type(network).__name__} has no module {unknown[0]!r} to tap.{nearest(unknown[0], modules)} Nodes of "
                f"a traced graph can be tapped only in plain networks, and {reason} Name modules, or let its forward "
                "return dfad.models.taps.Outputs(logits, taps)."
            ) from reason
        return _HookedTaps(network, names)
    for graph in graphs:
        _add_taps(network, graph, names)
    train, evaluation = (fx.GraphModule(network, graph, type(network).__name__) for graph in graphs)
    if train.code == evaluation.code:
        return train
    return _TracedTaps(network, names, train, evaluation)


def _output(graph: fx.Graph) -> fx.Node:
    return next(node for node in graph.nodes if node.op == "output")


def returned_outputs(graph: fx.Graph) -> fx.Node | None:
    """The :class:`Outputs` with taps that a network returns itself."""
    node = _output(graph).args[0]
    return node if isinstance(node, fx.Node) and node.target is Outputs and len(node.args) == 2 else None


def _add_taps(network: nn.Module, graph: fx.Graph, names: Sequence[str]) -> None:
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
                f"{type(network).__name__} has no module or graph node {name!r} to tap.{nearest(name, last_nodes)} "
                "dfad inspect lists its taps."
            )
    output = _output(graph)
    taps = []
    for name in names:
        # a copy, because an in-place ReLU often follows a pre-activation
        with graph.inserting_after(last_nodes[name]):
            taps.append(graph.call_method("clone", (last_nodes[name],)))
    own = returned_outputs(graph)
    logits = output.args[0] if own is None else own.args[0]
    with graph.inserting_before(output):
        outputs = graph.call_function(Outputs, (logits, tuple(taps)))
    output.args = (outputs,)
    if own is not None:
        graph.erase_node(own)
    graph.lint()


class _TracedTaps(SameNetwork):
    """A plain network whose graphs in training and eval mode differ.

    Args:
        network: provides the layers.
        names: of its taps.
        train: its graph with taps in training mode.
        evaluation: its graph in eval mode.
    """

    def __init__(
        self, network: nn.Module, names: Sequence[str], train: fx.GraphModule, evaluation: fx.GraphModule
    ) -> None:
        super().__init__(network)
        self.names = tuple(names)
        self.forwards = {True: type(train).forward, False: type(evaluation).forward}

    def __reduce__(self) -> tuple[Callable[..., nn.Module], tuple[Any, ...]]:
        return with_taps, (self.network, self.names)  # generated code is neither copied nor pickled

    def forward(self, images: Tensor) -> Outputs:
        outputs: Outputs = self.forwards[self.training](self.network, images)
        return outputs


class _HookedTaps(SameNetwork):
    """Any network, with hooks on the tapped modules.

    Args:
        network: called unchanged.
        names: of the modules.
    """

    calls_are_fixed = True

    def __init__(self, network: nn.Module, names: Sequence[str]) -> None:
        super().__init__(network)
        self.names = tuple(names)

    def forward(self, *inputs: Any, **options: Any) -> Outputs:
        found: dict[str, Tensor] = {}

        def keep(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, inputs: Any, output: Any) -> None:
                if not isinstance(output, Tensor):
                    raise ModelError(
                        f"The tap {name!r} of {type(self.network).__name__} is a {type(output).__name__}; a tap must "
                        "be a module that returns one tensor."
                    )
                found[name] = output.clone()  # an in-place ReLU often follows a pre-activation

            return hook

        modules = [self.network.get_submodule(name) for name in self.names]
        with _forward_hooks(modules, [keep(name) for name in self.names]):
            logits = as_outputs(self.network(*inputs, **options)).logits
        missing = [name for name in self.names if name not in found]
        if missing:
            raise ModelError(
                f"The forward pass of {type(self.network).__name__} does not call its {missing[0]}, which cannot be "
                "tapped."
            )
        return Outputs(logits, tuple(found[name] for name in self.names))


@contextmanager
def _forward_hooks(modules: Sequence[nn.Module], hooks: Sequence[Callable[..., None]]) -> Iterator[None]:
    handles: list[Any] = []
    try:
        for module, hook in zip(modules, hooks, strict=True):
            try:
                handles.append(module.register_forward_hook(hook))
            except RuntimeError as error:  # TorchScript's modules take none
                raise ModelError(f"A {type(module).__name__} cannot be tapped: {first_line(error)}.") from error
        yield
    finally:
        for handle in handles:
            handle.remove()


class BatchNormTaps(nn.Module):
    """A network that also returns the inputs of its BatchNorms.

    A BatchNorm counts once per call, and one that the forward pass does not call is ignored.

    Args:
        network: in eval mode; called by its graph if it is plain, else unchanged.
        traced: use the graph if there is one; otherwise hooks.
    """

    def __init__(self, network: nn.Module, *, traced: bool = True) -> None:
        super().__init__()
        self.norms: list[BatchNorm] = []
        """The BatchNorms, in the order of the features that :meth:`forward` returned last."""
        self.calls_are_fixed = True
        self.network = (self._traced(network) if traced else None) or network

    def _traced(self, network: nn.Module) -> nn.Module | None:
        try:
            graph = trace(network, training=False).graph
        except NotPlain:
            return None
        features: list[fx.Node] = []
        norms: list[BatchNorm] = []
        for node in graph.nodes:
            module = network.get_submodule(str(node.target)) if node.op == "call_module" else None
            if _has_statistics(module):
                x = node.args[0] if node.args else node.kwargs["input"]
                if not isinstance(x, fx.Node) or any(is_written_in_place(user, network) for user in x.users):
                    return None
                features.append(x)
                norms.append(module)
        output = _output(graph)
        output.args = ((output.args[0], tuple(features)),)
        graph.lint()
        self.norms = norms
        self.calls_are_fixed = False
        return fx.GraphModule(network, graph, type(network).__name__)

    def forward(self, images: Tensor) -> tuple[object, tuple[Tensor, ...]]:
        """The network's outputs, and the input of each of its BatchNorms."""
        if not self.calls_are_fixed:
            return self.network(images)
        found: list[tuple[BatchNorm, Tensor]] = []

        def keep(norm: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
            assert isinstance(norm, BatchNorm)
            # a copy, because a later in-place operation would change it
            found.append((norm, (inputs[0] if inputs else options["input"]).clone()))

        def register(norm: nn.Module) -> Any:
            return norm.register_forward_pre_hook(keep, with_kwargs=True)

        handles = [register(module) for module in self.network.modules() if _has_statistics(module)]
        try:
            result = self.network(images)
        finally:
            for handle in handles:
                handle.remove()
        self.norms[:] = [norm for norm, _ in found]
        return result, tuple(features for _, features in found)


def has_batchnorm(network: nn.Module) -> bool:
    """Whether a network holds statistics of the data that it was trained on."""
    return any(_has_statistics(module) for module in network.modules())


def _has_statistics(module: nn.Module | None) -> TypeGuard[BatchNorm]:
    return isinstance(module, BatchNorm) and module.running_mean is not None
