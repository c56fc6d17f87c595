"""The weights of a network's convolutions and products cast at once, where autocast would cast one after the other."""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from dfad.engine.multi_tensor import copy_to_all
from dfad.engine.rewriting import Rewriting, call_rewritten
from dfad.engine.tracing import Parts, Trace, plain_parts


class CastWeights(nn.Module):
    """Weights and biases of layers in the dtype of autocast, where that is on; else as they are.

    Args:
        layers: whose parameters are read at each call.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = layers  # no ModuleList: they are modules of the network already

    def forward(self) -> tuple[Tensor, ...]:
        parameters = [parameter for layer in self.layers for parameter in _parameters(layer)]
        device = parameters[0].device.type
        if not torch.is_autocast_enabled(device) or any(p.dtype != torch.float32 for p in parameters):
            return tuple(parameters)
        cast: tuple[Tensor, ...] = _Cast.apply(torch.get_autocast_dtype(device), *parameters)
        return cast


class _Cast(torch.autograd.Function):
    """Tensors in another dtype; so are their gradients in theirs."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.dtype = tensors[0].dtype
        cast = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
        copy_to_all(cast, tensors)
        return tuple(cast)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        given = [gradient for gradient in gradients if gradient is not None]
        wide = iter(_Cast.apply(ctx.dtype, *given) if given else ())
        return None, *(None if gradient is None else next(wide) for gradient in gradients)


class WithGivenWeights(nn.Module):
    """A layer with weight and bias from elsewhere.

    Args:
        layer: a linear one, or a zero-padded convolution.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.compute: Callable[..., Tensor]
        if isinstance(layer, nn.Conv2d):
            self.compute = functools.partial(
                F.conv2d, stride=layer.stride, padding=layer.padding, dilation=layer.dilation, groups=layer.groups
            )
        else:
            self.compute = F.linear

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return self.compute(x, weight, bias)


def cast_weights(network: nn.Module, *, parts: Parts = plain_parts) -> None:
    """Let a network that learns cast its weights so, in training mode; parameters and modules stay what they are.

    Args:
        network: any.
        parts: finds the plain ones.
    """
    for traced in parts(network, training=True):
        rewritten = Rewriting(traced)
        if cast_in(rewritten, traced):
            call_rewritten(traced, rewritten, in_training=True)


def cast_in(rewritten: fx.GraphModule, traced: Trace) -> bool:
    """Let a graph begin with the cast of all weights, which its layers are given then; whether it does."""
    nodes = [node for node in rewritten.graph.nodes if _takes_cast_weights(rewritten, traced, node)]
    if len(nodes) < 2:  # of a single one nothing is gained
        return False
    layers = [rewritten.get_submodule(str(node.target)) for node in nodes]
    name = f"cast_before_{nodes[0].name}"
    rewritten.add_submodule(name, CastWeights(layers))
    with rewritten.graph.inserting_before(nodes[0]):
        values = rewritten.graph.call_module(name)
    count = 0
    for node, layer in zip(nodes, layers, strict=True):
        name = f"given_{node.name}"
        rewritten.add_submodule(name, WithGivenWeights(layer))
        parameters = range(count, count + len(_parameters(layer)))
        count = parameters.stop
        with rewritten.graph.inserting_before(node):
            given = [rewritten.graph.call_function(operator.getitem, (values, number)) for number in parameters]
            node.replace_all_uses_with(rewritten.graph.call_module(name, (node.args[0], *given)))
        rewritten.graph.erase_node(node)
    return True


def _parameters(layer: Any) -> list[nn.Parameter]:
    return [layer.weight] if layer.bias is None else [layer.weight, layer.bias]


def _takes_cast_weights(rewritten: fx.GraphModule, traced: Trace, node: fx.Node) -> bool:
    if node.op != "call_module" or str(node.target) not in traced.replaceable or len(node.args) != 1 or node.kwargs:
        return False
    layer = rewritten.get_submodule(str(node.target))
    return type(layer) is nn.Linear or (type(layer) is nn.Conv2d and layer.padding_mode == "zeros")
