"""BatchNorms in training mode computed together with the addition and the activation behind them, and chains of such
together with the convolutions before them."""

import operator
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from dfad.errors import ModelError
from dfad.models.taps import trace
from dfad.modes import training
from dfad_kernels.batch_norm import batch_norm
from dfad_kernels.convolution_chain import Layer, Link, admits, convolution_chain
from dfad_kernels.registration import compute_dtype


class FusedBatchNorm(nn.Module):
    """A BatchNorm, the addition of a residual if it is given one, and a leaky ReLU, in as few passes as it takes.

    Args:
        norm: whose parameters and statistics are used and moved, as it would itself.
        negative_slope: of the leaky ReLU; 1 is none.
    """

    smallest = 1 << 18
    """Elements from which on it pays: PyTorch's own operations are called faster, and slower from there."""

    def __init__(self, norm: nn.BatchNorm2d, negative_slope: float) -> None:
        super().__init__()
        self.norm = norm
        self.negative_slope = negative_slope

    def forward(self, features: Tensor, residual: Tensor | None = None) -> Tensor:
        norm = self.norm
        if not self._applies(features, residual):
            y = norm(features)
            y = y if residual is None else y + residual
            return y if self.negative_slope == 1 else F.leaky_relu(y, self.negative_slope)
        assert norm.momentum is not None
        return batch_norm(
            *(features, *_moved_statistics(norm), norm.weight, norm.bias),
            residual=residual,
            momentum=norm.momentum,
            epsilon=norm.eps,
            negative_slope=self.negative_slope,
        )

    def _applies(self, features: Tensor, residual: Tensor | None) -> bool:
        norm = self.norm
        return (
            norm.training
            and norm.momentum is not None
            and features.numel() >= self.smallest
            and features.numel() > features.shape[1]  # of a single value there is no variance: PyTorch's own error
            and features.is_contiguous(memory_format=torch.channels_last)
            and (norm.weight is None or norm.weight.dtype == compute_dtype(features))
            and (residual is None or (residual.shape == features.shape and residual.dtype == features.dtype))
        )


def _moved_statistics(norm: nn.BatchNorm2d) -> tuple[Tensor | None, Tensor | None]:
    """A BatchNorm's running statistics, of a batch that is about to be counted; None where they are kept."""
    if not norm.track_running_stats:
        return None, None
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    return norm.running_mean, norm.running_var


class ConvolutionChain(nn.Module):
    """Convolutions, each with its BatchNorm and what follows that, as one operation where it can be.

    Args:
        links: what each one works on, as :func:`dfad_kernels.convolution_chain.convolution_chain` numbers it.
        convolutions: of the links.
        norms: likewise, for where the chain does not apply.
        outputs: the values that are returned.
    """

    def __init__(
        self,
        links: Sequence[Link],
        convolutions: Sequence[nn.Conv2d],
        norms: Sequence[FusedBatchNorm],
        outputs: Sequence[int],
    ) -> None:
        super().__init__()
        self.links = links
        self.convolutions = nn.ModuleList(convolutions)
        self.norms = nn.ModuleList(norms)
        self.outputs = outputs

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        if not self._applies(inputs):
            return self._one_by_one(inputs)
        layers = []
        for convolution, fused in zip(self.convolutions, self.norms, strict=True):
            norm = fused.norm
            parameters = convolution.weight, norm.weight, norm.bias
            layers.append(Layer(*parameters, *_moved_statistics(norm), norm.momentum, norm.eps))
        return convolution_chain(self.links, layers, [x.bfloat16() for x in inputs], self.outputs)

    def _applies(self, inputs: Sequence[Tensor]) -> bool:
        in_bfloat16 = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
        return (
            in_bfloat16
            and all(x.ndim == 4 and x.numel() > 0 and x.device.type == "cpu" for x in inputs)
            and inputs[0].is_contiguous(memory_format=torch.channels_last)
            and all(fused.norm.training and fused.norm.momentum is not None for fused in self.norms)
            and all(admits(convolution.weight) for convolution in self.convolutions)
            and self._has_variance(inputs[0])
        )

    def _has_variance(self, features: Tensor) -> bool:
        stride = 1
        for link in self.links:
            stride *= link.stride
        batch, _, height, width = features.shape
        return batch > 1 or (height > stride and width > stride)

    def _one_by_one(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        values: list[Tensor | None] = list(inputs)
        for link, convolution, norm in zip(self.links, self.convolutions, self.norms, strict=True):
            source = values[link.source]
            residual = None if link.residual is None else values[link.residual]
            y = norm(convolution(source), residual)
            if link.keeps_pre and link.keeps_post:
                values += [y, F.leaky_relu(y, link.negative_slope)]
            else:
                values += [y, None] if link.keeps_pre else [None, y]
        return tuple(values[number] for number in self.outputs)  # type: ignore[misc]


def fuse_batchnorm(network: nn.Module, *, with_convolutions: bool = False) -> None:
    """Let a network compute its BatchNorms so, in training mode; parameters, buffers and modules stay what they are.

    Where a network cannot be traced, those of its children are fused that can. One with hooks is left as it is: they
    belong to modules, which a graph has none of but PyTorch's.

    Args:
        network: any.
        with_convolutions: together with the convolutions before them, where these are of a kind that chains take.
    """
    if any(module._forward_hooks or module._forward_pre_hooks for module in network.modules()):
        return
    try:
        with training(network):  # what depends on the mode is traced as it is there
            graph = trace(network)
    except ModelError:
        for child in network.children():
            fuse_batchnorm(child, with_convolutions=with_convolutions)
        return
    fused = fx.GraphModule(network, graph, type(network).__name__)
    for node in list(fused.graph.nodes):
        if node.op == "call_module" and node.args:
            kind = type(fused.get_submodule(str(node.target)))
            if kind is nn.BatchNorm2d:
                _fuse(fused, node)
            elif kind is nn.Identity:
                node.replace_all_uses_with(node.args[0])
                fused.graph.erase_node(node)
    if with_convolutions:
        _chain_convolutions(fused)
    fused.graph.lint()
    fused.recompile()

    def call(*inputs: Any, **options: Any) -> Any:
        return fused(*inputs, **options) if network.training else network._call_impl(*inputs, **options)

    # where nn.Module.compile leaves what it makes: copies and files of the network go without
    network._compiled_call_impl = call


def _fuse(fused: fx.GraphModule, norm: fx.Node) -> None:
    """Replace a BatchNorm's node and what follows it."""
    module = fused.get_submodule(str(norm.target))
    assert isinstance(module, nn.BatchNorm2d)
    chain, residual, slope = [norm], None, 1.0
    addition = _only_user(norm)
    if addition is not None:
        residual = _added(norm, addition)
        if residual is not None:
            chain.append(addition)
    activation = _only_user(chain[-1])
    if activation is not None:
        found = _negative_slope(fused, activation)
        if found is not None:
            slope = found
            chain.append(activation)
    name = f"fused_{norm.name}"
    fused.add_submodule(name, FusedBatchNorm(module, slope))
    with fused.graph.inserting_before(chain[-1]):
        chain[-1].replace_all_uses_with(fused.graph.call_module(name, (norm.args[0], residual)))
    for node in reversed(chain):
        fused.graph.erase_node(node)


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _added(norm: fx.Node, node: fx.Node) -> fx.Node | None:
    """What a node adds to a BatchNorm's output; None if it is no such addition."""
    if node.kwargs or len(node.args) != 2:
        return None
    first, second = node.args
    if node.target in (operator.add, torch.add) and second is norm:
        first, second = second, first
    if node.target not in (operator.add, operator.iadd, torch.add) or first is not norm or second is norm:
        return None
    return second if isinstance(second, fx.Node) else None


def _negative_slope(fused: fx.GraphModule, node: fx.Node) -> float | None:
    """That of the leaky ReLU that a node is; None if it is something else."""
    if node.op == "call_module":
        module = fused.get_submodule(str(node.target))
        if type(module) is nn.LeakyReLU:
            return module.negative_slope
        return 0.0 if type(module) is nn.ReLU else None
    if node.target in (F.relu, torch.relu, F.relu_, torch.relu_, "relu", "relu_"):
        return 0.0
    if node.target is F.leaky_relu:
        slope = node.args[1] if len(node.args) > 1 else node.kwargs.get("negative_slope", 0.01)
        return slope if isinstance(slope, float) and slope >= 0 else None
    return None


class _Place(NamedTuple):
    """Where a link is in a graph."""

    convolution: fx.Node
    norm: fx.Node
    activation: fx.Node | None
    """One that is not part of the norm's module, since what goes into it is used elsewhere, too."""


def _chain_convolutions(fused: fx.GraphModule) -> None:
    """Replace convolutions, and the fused BatchNorms behind them, by chains."""
    nodes = list(fused.graph.nodes)
    if any(_in_place(fused, node) for node in nodes):
        return  # what a value is may depend on when it is read
    places = {place.norm: place for node in nodes if (place := _place(fused, node)) is not None}
    members = {node for place in places.values() for node in place}
    chain: list[_Place] = []
    for node in nodes:
        if node in places:
            chain.append(places[node])
        elif node not in members and chain:
            _replace(fused, chain)
            chain = []


def _in_place(fused: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node may overwrite what it is given."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if node.op == "call_module":
        return bool(getattr(fused.get_submodule(str(node.target)), "inplace", False))
    written = node.op in ("call_function", "call_method") and name.endswith("_") and not name.endswith("__")
    operators = (operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.setitem)
    return written or node.target in operators or bool(node.kwargs.get("inplace"))


def _place(fused: fx.GraphModule, norm: fx.Node) -> _Place | None:
    """A fused BatchNorm's, if there is a convolution before it that a link can have."""
    if norm.op != "call_module" or not isinstance(fused.get_submodule(str(norm.target)), FusedBatchNorm):
        return None
    module = fused.get_submodule(str(norm.target))
    convolution = norm.args[0]
    if not isinstance(convolution, fx.Node) or convolution.op != "call_module" or len(convolution.users) != 1:
        return None
    conv = fused.get_submodule(str(convolution.target))
    if not (
        type(conv) is nn.Conv2d
        and conv.bias is None
        and (conv.kernel_size, conv.padding, conv.dilation, conv.groups) == ((3, 3), (1, 1), (1, 1), 1)
        and conv.stride[0] == conv.stride[1]
        and conv.padding_mode == "zeros"
        and len(convolution.args) == 1
    ):
        return None
    activations = [user for user in norm.users if _negative_slope(fused, user) is not None]
    separate = module.negative_slope == 1 and len(activations) == 1
    return _Place(convolution, norm, activations[0] if separate else None)


def _replace(fused: fx.GraphModule, places: Sequence[_Place]) -> None:
    """Replace one chain's nodes, of which no other lies between."""
    own = {node for place in places for node in place}
    produced = {node for place in places for node in (place.norm, place.activation)}
    needed = dict.fromkeys(node for place in places for node in _operands(place) if node not in produced)
    numbers: dict[fx.Node, int] = {node: number for number, node in enumerate(needed)}
    links, outputs = [], []
    for place in places:
        norm = fused.get_submodule(str(place.norm.target))
        slope = norm.negative_slope if place.activation is None else _negative_slope(fused, place.activation)
        pre, post = (place.norm, None) if norm.negative_slope == 1 else (None, place.norm)
        post = place.activation or post
        keeps_pre = pre is not None and any(user is not post for user in pre.users)
        source, *residual = (numbers[node] for node in _operands(place))
        stride = fused.get_submodule(str(place.convolution.target)).stride[0]
        links.append(Link(source, *residual or [None], stride, slope, keeps_pre, post is not None))
        first = len(needed) + 2 * (len(links) - 1)
        for number, node in ((first, pre), (first + 1, post)):
            if node is not None:
                numbers[node] = number
                if any(user not in own for user in node.users):
                    outputs.append(node)
    modules = [[fused.get_submodule(str(node.target)) for node in place[:2]] for place in places]
    convolutions, norms = zip(*modules, strict=True)
    name = f"chain_{places[0].norm.name}"
    fused.add_submodule(name, ConvolutionChain(links, convolutions, norms, [numbers[node] for node in outputs]))
    with fused.graph.inserting_before(places[-1].norm):
        values = fused.graph.call_module(name, tuple(needed))
        for number, node in enumerate(outputs):
            value = fused.graph.call_function(operator.getitem, (values, number))
            node.replace_all_uses_with(value, delete_user_cb=lambda user: user not in own)
    for place in reversed(places):
        for node in (place.activation, place.norm, place.convolution):
            if node is not None:
                fused.graph.erase_node(node)


def _operands(place: _Place) -> Iterator[fx.Node]:
    """What is convolved, and what is added if anything is."""
    for node in (place.convolution.args[0], *place.norm.args[1:]):
        if isinstance(node, fx.Node):
            yield node
