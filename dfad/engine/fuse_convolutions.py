"""Chains of 3×3 convolutions and what follows them, each as one operation; in bfloat16 on CPUs with AMX tiles."""

import functools
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from dfad.engine.fuse_batchnorm import FusedBatchNorm, count_batch, fuse_batchnorm, statistics_to_move
from dfad.engine.rewriting import (
    Rewriting,
    addend,
    call_rewritten,
    negative_slope,
    only_user,
    say_once,
    without_identities,
)
from dfad.engine.tracing import Parts, Trace, is_written_in_place, plain_parts
from dfad_kernels.cpu.convolution_chain import ConvolutionChain, Layer, Link, Misfit, admits
from dfad_kernels.cpu.convolution_chain import unavailable as unavailable
from dfad_kernels.cpu.subsampling import subsample


def fuse_convolutions(network: nn.Module, *, smallest: int | None = None, parts: Parts = plain_parts) -> None:
    """Make a network compute its convolutions as chains; parameters, buffers and modules stay the same.

    A trained network does so in training mode, together with its BatchNorms
    (:func:`dfad.engine.fuse_batchnorm.fuse_batchnorm`); a frozen one always, together with the additions and
    activations.

    Args:
        network: any.
        smallest: as for :func:`~dfad.engine.fuse_batchnorm.fuse_batchnorm`, for BatchNorms outside of chains.
        parts: finds the plain ones.
    """
    if any(parameter.requires_grad for parameter in network.parameters()):
        refine = functools.partial(_chain, learns=True)
        fuse_batchnorm(network, refine=refine, smallest=smallest, parts=parts)
        return
    for traced in parts(network, training=False):
        fused = Rewriting(traced)
        without_identities(fused)
        _chain(fused, traced, learns=False)
        if any(isinstance(module, ChainedConvolutions) for module in fused.children()):
            call_rewritten(traced, fused)


def chained_flops() -> int:
    """FLOPs that chains have computed in this process, which PyTorch's counters do not see."""
    return ConvolutionChain.flops


class ChainedConvolutions(nn.Module):
    """Convolutions, each with what follows it, as one operation where possible.

    Args:
        chain: structure of the links.
        convolutions: of the links.
        norms: of the links; None for a frozen link.
    """

    def __init__(
        self, chain: ConvolutionChain, convolutions: Sequence[nn.Conv2d], norms: Sequence[FusedBatchNorm | None]
    ) -> None:
        super().__init__()
        self.chain = chain
        residuals = {link.residual for link in chain.links}
        self.added = [i for i in range(chain.inputs) if i in residuals]
        """The inputs that decide the dtype of the results where PyTorch adds them."""
        self.convolutions = convolutions
        self.norms = norms
        self.frozen = [
            None if norm is not None else _frozen(convolution)
            for convolution, norm in zip(convolutions, norms, strict=True)
        ]

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        norms = [fused.norm for fused in self.norms if fused is not None]
        in_bfloat16 = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
        if (
            not in_bfloat16
            or any(inputs[i].dtype != torch.bfloat16 for i in self.added)
            or not all(norm.training and norm.momentum is not None for norm in norms)
        ):
            return self._one_by_one(inputs)
        try:
            results = self.chain(self._layers(), [x.bfloat16() for x in inputs])
        except Misfit as reason:
            say_once(f"A chain of convolutions is computed link by link: {reason}")
            return self._one_by_one(inputs)
        count_batch(*norms)
        return results

    def _layers(self) -> list[Layer]:
        return [
            frozen or _learning(convolution, norm)
            for convolution, norm, frozen in zip(self.convolutions, self.norms, self.frozen, strict=True)
        ]

    def _one_by_one(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        def compute(number: int, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
            link, norm = self.chain.links[number], self.norms[number]
            y = self.convolutions[number](x)
            if norm is not None:
                y = norm(y, residual)  # with the activation, if only its result is used
            elif residual is not None:
                y = y + residual
            activates = norm is None or link.keeps_pre
            return y, F.leaky_relu(y, link.negative_slope) if activates and link.keeps_post else y

        return self.chain.link_by_link(inputs, compute)


def _learning(convolution: nn.Conv2d, fused: FusedBatchNorm | None) -> Layer:
    assert fused is not None
    norm = fused.norm
    assert norm.momentum is not None
    return Layer(convolution.weight, norm.weight, norm.bias, *statistics_to_move(norm), norm.momentum, norm.eps)


def _frozen(convolution: nn.Conv2d) -> Layer:
    """Back in float32 if it was cast."""
    bias = None if convolution.bias is None else convolution.bias.detach().float()
    kernel = convolution.weight.detach().float()
    return Layer(kernel.contiguous(memory_format=torch.channels_last), bias=bias)


@dataclass(frozen=True)
class _Place:
    """The nodes of a link in a graph."""

    convolution: fx.Node
    norm: fx.Node | None
    residual: fx.Node | None
    pre: fx.Node | None
    """The node whose value is the link's pre; None if it is not a separate value."""
    post: fx.Node | None
    negative_slope: float
    nodes: frozenset[fx.Node]
    """All nodes that the link replaces."""

    @property
    def source(self) -> fx.Node:
        source = self.convolution.args[0]
        assert isinstance(source, fx.Node)
        return source

    @property
    def result(self) -> fx.Node:
        """The node at which all inputs of the link are available."""
        result = self.pre or self.post
        assert result is not None
        return result


def _chain(fused: fx.GraphModule, traced: Trace, *, learns: bool) -> None:
    """Replace convolutions, and what follows them, by chains; and shortcuts without parameters by one operation."""
    for node in list(fused.graph.nodes):
        _subsample(fused, node)
    places: list[_Place] = []
    members: set[fx.Node] = set()
    for node in fused.graph.nodes:
        fits = node not in members and str(node.target) in traced.replaceable
        place = _place(fused, node, learns) if fits else None
        if place is not None:
            places.append(place)
            members |= place.nodes
    if any(is_written_in_place(node, fused) for node in fused.graph.nodes if node not in members):
        return  # in-place operations may change a value between two reads
    by_result = {place.result: place for place in places}
    chain: list[_Place] = []
    for node in list(fused.graph.nodes):
        if node in by_result:
            chain.append(by_result[node])
        elif node not in members and chain:
            _replace(fused, chain)
            chain = []


def _place(fused: fx.GraphModule, convolution: fx.Node, learns: bool) -> _Place | None:
    """The link that starts at a node, or None."""
    if convolution.op != "call_module" or len(convolution.args) != 1 or convolution.kwargs:
        return None
    module = fused.get_submodule(str(convolution.target))
    if not (
        type(module) is nn.Conv2d
        and (module.kernel_size, module.padding, module.dilation, module.groups) == ((3, 3), (1, 1), (1, 1), 1)
        and module.stride[0] == module.stride[1]
        and module.padding_mode == "zeros"
        and admits(module.weight.float())
    ):
        return None
    following = only_user(convolution)
    norm, residual, pre = None, None, convolution
    if learns:
        if not module.weight.requires_grad:  # a frozen link caches its kernel, and a checkpoint may still replace it
            return None
        fused_norm = None if following is None else _fused_norm(fused, following)
        if module.bias is not None or following is None or fused_norm is None:
            return None
        norm = pre = following
        residual = following.args[1] if isinstance(following.args[1], fx.Node) else None
        if fused_norm.negative_slope != 1:
            nodes = frozenset({convolution, following})
            return _Place(convolution, norm, residual, None, following, fused_norm.negative_slope, nodes)
    elif following is not None:
        residual = addend(convolution, following)
        pre = convolution if residual is None else following
    slopes = {user: slope for user in pre.users if (slope := negative_slope(fused, user)) is not None}
    post = next(iter(slopes)) if len(slopes) == 1 else None
    if post is not None and len(pre.users) > 1 and is_written_in_place(post, fused):
        post = None
    nodes = frozenset(node for node in (convolution, pre, post) if node is not None)
    return _Place(convolution, norm, residual, pre, post, 1.0 if post is None else slopes[post], nodes)


def _subsample(fused: fx.GraphModule, pad: fx.Node) -> None:
    """Replace a node that pads the result of an average over one pixel with channels of zeros."""
    pool: Any = pad.args[0] if pad.target is F.pad else None
    if not isinstance(pool, fx.Node) or pool.target is not F.avg_pool2d or len(pool.users) != 1:
        return
    padding: Any = pad.args[1] if len(pad.args) == 2 else None
    constant = pad.kwargs.get("mode", "constant") == "constant" and not pad.kwargs.get("value")
    stride: Any = pool.kwargs.get("stride")
    if len(pool.args) != 1 or dict(pool.kwargs) != {"kernel_size": 1, "stride": stride} or not constant:
        return
    if not isinstance(stride, int) or not isinstance(padding, tuple) or len(padding) != 6:
        return
    if any(padding[:4]) or min(padding) < 0:
        return
    with fused.graph.inserting_before(pad):
        pad.replace_all_uses_with(fused.graph.call_function(subsample, (pool.args[0], stride, *padding[4:])))
    fused.graph.erase_node(pad)
    fused.graph.erase_node(pool)


def _fused_norm(fused: fx.GraphModule, node: fx.Node) -> FusedBatchNorm | None:
    module = fused.get_submodule(str(node.target)) if node.op == "call_module" else None
    return module if isinstance(module, FusedBatchNorm) else None


def _replace(fused: fx.GraphModule, places: Sequence[_Place]) -> None:
    """Replace the nodes of one chain, with no other operation between their results."""
    own = {node for place in places for node in place.nodes}
    operands = (node for place in places for node in (place.source, place.residual) if node is not None)
    inputs = list(dict.fromkeys(node for node in operands if node not in own))
    numbers = {node: number for number, node in enumerate(inputs)}
    convolutions = [fused.get_submodule(str(place.convolution.target)) for place in places]
    links: list[Link] = []
    outputs: list[fx.Node] = []
    for place, convolution in zip(places, convolutions, strict=True):
        assert isinstance(convolution, nn.Conv2d)
        first = len(inputs) + 2 * len(links)
        keeps_pre = place.pre is not None and any(user is not place.post for user in place.pre.users)
        links.append(
            Link(
                numbers[place.source],
                None if place.residual is None else numbers[place.residual],
                convolution.stride[0],
                place.negative_slope,
                keeps_pre=keeps_pre,
                keeps_post=place.post is not None,
                normalises=place.norm is not None,
            )
        )
        for number, node in ((first, place.pre), (first + 1, place.post)):
            if node is not None:
                numbers[node] = number
                if any(user not in own for user in node.users):
                    outputs.append(node)
    chain = ChainedConvolutions(
        ConvolutionChain(links, len(inputs), [numbers[node] for node in outputs]),
        [convolution for convolution in convolutions if isinstance(convolution, nn.Conv2d)],
        [None if place.norm is None else _fused_norm(fused, place.norm) for place in places],
    )
    name = f"chain_{places[0].convolution.name}"
    fused.add_submodule(name, chain)
    with fused.graph.inserting_before(places[-1].result):
        values = fused.graph.call_module(name, tuple(inputs))
        for number, node in enumerate(outputs):
            value = fused.graph.call_function(operator.getitem, (values, number))
            node.replace_all_uses_with(value, delete_user_cb=lambda user: user not in own)
    for node in reversed(list(fused.graph.nodes)):
        if node in own:
            fused.graph.erase_node(node)
