"""The structure of a network: its norms, its activations, and candidate taps."""

import operator
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from dfad.engine.tracing import NotPlain, trace
from dfad.models.outputs import Outputs
from dfad.models.probing import answer_to_blanks, device_of
from dfad.models.taps import returned_outputs
from dfad.modes import BatchNorm, evaluating

BOUNDED = {nn.ReLU: "ReLU", nn.ReLU6: "ReLU6", nn.LeakyReLU: "LeakyReLU", nn.PReLU: "PReLU"}
"""Activations with a boundary at zero: they behave differently for positive and negative inputs."""

SMOOTH = {
    nn.SiLU: "SiLU",
    nn.GELU: "GELU",
    nn.Hardswish: "hard-swish",
    nn.Mish: "Mish",
    nn.ELU: "ELU",
    nn.SELU: "SELU",
    nn.CELU: "CELU",
    nn.Softplus: "softplus",
    nn.Tanh: "tanh",
}
"""Activations without such a boundary."""

FUNCTIONS: dict[Any, str] = {
    **dict.fromkeys((F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"), "ReLU"),
    **dict.fromkeys((F.leaky_relu, F.leaky_relu_), "LeakyReLU"),
    **{F.relu6: "ReLU6", F.silu: "SiLU", F.gelu: "GELU", F.hardswish: "hard-swish", F.mish: "Mish", F.elu: "ELU"},
}
"""Activations as calls in a graph, by function or method name."""

OWN_NAMES = {
    **{"relu": "ReLU", "relu6": "ReLU6", "silu": "SiLU", "swish": "SiLU", "gelu": "GELU", "geluactivation": "GELU"},
    **{"quickgelu": "GELU", "quickgeluactivation": "GELU", "newgeluactivation": "GELU", "gelutanh": "GELU"},
    **{"hardswish": "hard-swish", "mish": "Mish", "siluactivation": "SiLU"},
}
"""Activations of other packages, by the name of their class."""

BEFORE_ACTIVATIONS = (operator.add, operator.iadd, torch.add, F.batch_norm)
"""Calls in a graph whose results are tapped."""

WITH_BOUNDARY = frozenset(BOUNDED.values())

NORMS = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, nn.LocalResponseNorm),
)


RETURNED = "returned by the network"


@dataclass(frozen=True)
class Tap:
    """A candidate tap."""

    name: str
    """Name for :func:`dfad.models.taps.with_taps`; for taps that a network returns itself, the index."""
    shape: tuple[int, int, int]
    """``(channels, height, width)``."""
    found: str
    """A description of how it was found."""


def are_own(taps: Sequence[Tap]) -> bool:
    """Whether a network returns its taps itself, of which either all are or none."""
    return bool(taps) and taps[0].found == RETURNED


def norms_of(network: nn.Module) -> Counter[str]:
    """Number of normalisation modules of each kind."""
    return Counter(
        next((kind.__name__ for kind in NORMS if isinstance(module, kind)), type(module).__name__)
        for module in network.modules()
        if isinstance(module, NORMS) or type(module).__name__.endswith(("Norm", "Norm2d"))
    )


def activations_of(network: nn.Module) -> Counter[str]:
    """Number of calls of each activation in the graph of a plain network; for others, the number of modules."""
    try:
        graph = trace(network, training=False).graph
    except NotPlain:
        found = (_activation(module) for module in network.modules())
    else:
        found = (_activation_of_call(node, network) for node in graph.nodes)
    return Counter(name for name in found if name is not None)


def boundary_of(activations: Counter[str]) -> str:
    """A description of what the activation regularizer means for such activations."""
    smooth = sum(count for name, count in activations.items() if name not in WITH_BOUNDARY)
    names = ", ".join(name for name, _ in activations.most_common())
    if not activations:
        return "no activation was found: whether it has a boundary at zero is not known"
    if not smooth:
        return f"its activations ({names}) have a boundary at zero, which the regularizer compares"
    most = "its" if smooth == activations.total() else "some of its"
    return (
        f"{most} activations ({names}) have no boundary at zero: the regularizer would compare the signs of "
        "pre-activations, which is off unless asked for (docs/networks.md has a measurement)"
    )


def has_boundary(activations: Counter[str]) -> bool:
    """Whether most of the activations have a boundary at zero."""
    smooth = sum(count for name, count in activations.items() if name not in WITH_BOUNDARY)
    return 2 * smooth < activations.total()


def candidate_taps(network: nn.Module, image_shape: tuple[int, int, int]) -> list[Tap]:
    """Pre-activation feature maps, the last of each resolution, input side first.

    These are the taps that the network returns itself; otherwise the inputs of activations, including additions, in the
    graph of a network that is plain in both modes; otherwise outputs of modules that are inputs of activation modules.

    Args:
        network: not changed.
        image_shape: ``(channels, height, width)`` of its images.
    """
    answer = answer_to_blanks(network, image_shape)
    if isinstance(answer, Outputs):
        shaped = [(str(number), tap) for number, tap in enumerate(answer.taps) if tap.ndim == 4]
        return [Tap(name, _shape(tap), RETURNED) for name, tap in shaped]
    images = torch.zeros(2, *image_shape, device=device_of(network))
    try:
        trace(network, training=True)  # a student is tapped in this mode, too
        graph = trace(network, training=False).graph
    except NotPlain:
        found = _by_hooks(network, images)
    else:
        found = list(_by_graph(network, graph, images))
    last: dict[tuple[int, int], Tap] = {}
    for tap in found:
        resolution = tap.shape[1:]
        if min(resolution) > 1:
            last.pop(resolution, None)
            last[resolution] = tap
    return sorted(last.values(), key=lambda tap: -tap.shape[1] * tap.shape[2])


def names_of_own_taps(network: nn.Module) -> list[str]:
    """Names for :func:`dfad.models.taps.with_taps` of the taps that a plain network itself returns; else empty."""
    try:
        trace(network, training=True)
        own = returned_outputs(trace(network, training=False).graph)
    except NotPlain:
        return []
    return [node.name for node in own.all_input_nodes[1:]] if own is not None else []


def _by_graph(network: nn.Module, graph: fx.Graph, images: Tensor) -> Iterator[Tap]:
    values: dict[fx.Node, tuple[int, ...]] = {}

    class Shapes(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            if isinstance(result, Tensor):
                values[n] = tuple(result.shape)
            return result

    with evaluating(network), torch.no_grad():
        Shapes(fx.GraphModule(network, graph)).run(images)
    for node in graph.nodes:
        name = _activation_of_call(node, network)
        source = _source_of(node, network) if name is not None else None
        if source is None or len(values.get(source, ())) != 4 or not _ends_a_block(source, network):
            continue
        _, channels, height, width = values[source]
        label = str(source.target) if _is_only_call(source, graph) else source.name
        yield Tap(
            label, (channels, height, width), f"the {_called(source, network)} before a {name}, found in the graph"
        )


def _source_of(node: fx.Node, network: nn.Module) -> fx.Node | None:
    """What a node is given, as it was before layers that leave it alone."""
    source = node.all_input_nodes[0] if node.all_input_nodes else None
    while source is not None and source.op == "call_module":
        if not isinstance(network.get_submodule(str(source.target)), (nn.Identity, nn.Dropout, nn.Dropout2d)):
            break
        source = source.all_input_nodes[0]
    return source


def _ends_a_block(node: fx.Node, network: nn.Module) -> bool:
    """An addition, a norm or a convolution; not what squeezes, gates or concatenates."""
    if node.op == "call_module":
        return isinstance(network.get_submodule(str(node.target)), (nn.Conv2d, *NORMS))
    return node.op == "call_function" and node.target in BEFORE_ACTIVATIONS


def _called(node: fx.Node, network: nn.Module) -> str:
    if node.op == "call_module":
        return type(network.get_submodule(str(node.target))).__name__
    return "BatchNorm" if node.target is F.batch_norm else "addition"


def _is_only_call(node: fx.Node, graph: fx.Graph) -> bool:
    calls = [other for other in graph.nodes if other.op == "call_module" and other.target == node.target]
    return node.op == "call_module" and len(calls) == 1


def _by_hooks(network: nn.Module, images: Tensor) -> list[Tap]:
    made: dict[int, tuple[str, Tensor, str]] = {}
    found: list[Tap] = []

    def after(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.ndim == 4:
                # held, so that its address is not reused; what is handed on keeps the name of its maker
                made.setdefault(id(output), (name, output, type(module).__name__))

        return hook

    def before(kind: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any) -> None:
            if inputs and id(inputs[0]) in made:
                name, tensor, maker = made[id(inputs[0])]
                found.append(Tap(name, _shape(tensor), f"the {maker} before a {kind}, found by hooks"))

        return hook

    handles = []
    try:
        for name, module in network.named_modules():
            kind = _activation(module)
            try:
                if kind is not None:
                    handles.append(module.register_forward_pre_hook(before(kind)))
                elif isinstance(module, (nn.Conv2d, *NORMS)) or _is_inside_a_norm(name, network):
                    handles.append(module.register_forward_hook(after(name)))
            except RuntimeError:  # TorchScript modules accept no hooks
                return []
        with evaluating(network), torch.no_grad():
            network(images)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _is_inside_a_norm(name: str, network: nn.Module) -> bool:
    """Whether a module hands on what a norm with an activation of its own, such as timm's, makes."""
    parent = network.get_submodule(name.rpartition(".")[0])
    return isinstance(network.get_submodule(name), nn.Identity) and isinstance(parent, NORMS)


def _activation(module: nn.Module) -> str | None:
    return (BOUNDED | SMOOTH).get(type(module)) or OWN_NAMES.get(type(module).__name__.lower())


def _activation_of_call(node: fx.Node, network: nn.Module) -> str | None:
    if node.op == "call_module":
        return _activation(network.get_submodule(str(node.target)))
    return FUNCTIONS.get(node.target) if node.op in ("call_function", "call_method") else None


def _shape(tap: Tensor) -> tuple[int, int, int]:
    channels, height, width = tap.shape[1:]
    return channels, height, width


def paired(teacher: Sequence[Tap], student: Sequence[Tap]) -> list[tuple[Tap, Tap]]:
    """Pairs of taps of teacher and student with the same resolution."""
    by_size = {tap.shape[1:]: tap for tap in student}
    return [(tap, by_size[tap.shape[1:]]) for tap in teacher if tap.shape[1:] in by_size]


def batchnorms_of(network: nn.Module) -> int:
    """Number of norms with statistics of the training data."""
    return sum(isinstance(module, BatchNorm) and module.running_mean is not None for module in network.modules())
