"""A step that several ranks share: statistics of the whole batch, and gradients averaged in one bucket per network.

DistributedDataParallel is not used: its hooks would also fire in the backward pass of the other network, its buckets
wait for parameters that a step does not use, and it would send buffers that are already equal. A step here is one loss,
one backward pass and one collective.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

from dfad.engine.calls import replaced_call
from dfad.engine.compile import uncompiled
from dfad.engine.multi_tensor import copy_to_all
from dfad.errors import ModelError
from dfad.modes import BatchNorm
from dfad.ranks import Ranks
from dfad_kernels.registration import compute_dtype

OPERATOR = type(torch.ops.aten.relu.default)
"""What the nodes of an exported program call, past all functions of PyTorch."""


class WholeBatchNorm(TorchFunctionMode):
    """Let each BatchNorm in training mode use the statistics of the images of all ranks, for a block.

    It replaces the function that every BatchNorm calls, and no module.

    Args:
        ranks: with shares of equal size.
    """

    def __init__(self, ranks: Ranks) -> None:
        super().__init__()
        self.ranks = ranks

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.batch_norm:
            return self._normalise(*args, **kwargs)
        if func is torch.batch_norm:
            return self._normalise_by_place(*args, **kwargs)
        return func(*args, **kwargs)

    def _normalise(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        if not training:
            return F.batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
        y: Tensor = _WholeBatchNorm.apply(input, weight, bias, running_mean, running_var, momentum, eps, self.ranks)
        return y

    def _normalise_by_place(
        self,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        training: bool,
        momentum: float,
        eps: float,
        cudnn_enabled: bool,
    ) -> Tensor:
        return self._normalise(input, running_mean, running_var, weight, bias, training, momentum, eps)


def require_reachable(network: nn.Module, name: str) -> None:
    """Refuse a network with BatchNorms that :class:`WholeBatchNorm` would not see, in which each rank would silently
    normalise with the statistics of its own images.

    Args:
        network: that learns.
        name: what messages call it.

    Raises:
        ModelError: if there may be any.
    """
    for place, module in network.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            kind = "TorchScript"
        elif replaced_call(module) is not None or uncompiled(module) is not module:
            kind = "compiled"
        elif isinstance(module, fx.GraphModule) and any(
            isinstance(node.target, OPERATOR) for node in module.graph.nodes
        ):
            kind = "a graph of operators, as torch.export makes it,"
        elif isinstance(module, nn.SyncBatchNorm):
            kind = "a SyncBatchNorm, which shares statistics in a way of its own,"
        else:
            continue
        raise ModelError(
            f"Several ranks share {name}, but its {place or 'root'} is {kind} and its BatchNorms would not take the "
            "statistics of all ranks' images. Give the plain PyTorch module, or --engine.batchnorm local."
        )


class _WholeBatchNorm(torch.autograd.Function):
    """BatchNorm with one collective in each direction. PyTorch's SyncBatchNorm is a module, and only for GPUs."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
        epsilon: float,
        ranks: Ranks,
    ) -> Tensor:
        values = x.to(compute_dtype(x))
        dims = [0, *range(2, x.ndim)]
        count = x.numel() // x.shape[1] * ranks.count
        own_variance, own_mean = torch.var_mean(values, dim=dims, correction=0)
        means, variances = ranks.gather(torch.stack([own_mean, own_variance])).unbind(1)
        mean = means.mean(dim=0)
        variance = (variances + (means - mean).square()).mean(dim=0)
        if running_mean is not None and running_var is not None:
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_((variance * (count / (count - 1))).to(running_var.dtype), momentum)
        inverse = (variance + epsilon).rsqrt()
        ctx.save_for_backward(x, weight, mean, inverse)
        ctx.has_bias = bias is not None
        ctx.count, ctx.ranks = count, ranks
        scale = inverse if weight is None else inverse * weight
        y = (values - _along(mean, x)) * _along(scale, x)
        return (y if bias is None else y + _along(bias, x)).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, y_gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, inverse = ctx.saved_tensors
        dims = [0, *range(2, x.ndim)]
        normalised = (x.to(inverse.dtype) - _along(mean, x)) * _along(inverse, x)
        y_gradient = y_gradient.to(inverse.dtype)
        sums = torch.stack([y_gradient.sum(dim=dims), (y_gradient * normalised).sum(dim=dims)])
        of_bias, of_weight = sums.unbind()
        of_x = None
        if ctx.needs_input_grad[0]:
            level, tilt = (ctx.ranks.add(sums.clone()) / ctx.count).unbind()
            scale = inverse if weight is None else inverse * weight
            of_x = (y_gradient - _along(level, x) - normalised * _along(tilt, x)) * _along(scale, x)
            of_x = of_x.to(x.dtype)
        return (
            of_x,
            of_weight if ctx.needs_input_grad[1] else None,
            of_bias if ctx.needs_input_grad[2] else None,
            *(None, None, None, None, None),
        )


def _along(channels: Tensor, x: Tensor) -> Tensor:
    return channels.view(-1, *[1] * (x.ndim - 2))


class GradientBucket:
    """The gradients of an optimizer's parameters in one buffer, so that one collective averages all of them.

    Args:
        parameters: on one device, with one dtype.
        ranks: with the same parameters.
        dtype: of the sent gradients.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], ranks: Ranks, dtype: torch.dtype) -> None:
        self.parameters = list(parameters)
        self.ranks = ranks
        first = self.parameters[0]
        self.flat = torch.zeros(sum(p.numel() for p in self.parameters), dtype=dtype, device=first.device)
        parts = self.flat.split([p.numel() for p in self.parameters])
        # in the layout of the parameters, because optimizers are faster if all strides are equal
        self.views = [_laid_out_as(p, part) for p, part in zip(self.parameters, parts, strict=True)]

    @torch.no_grad()
    def average(self) -> None:
        """Replace every gradient by its mean over the ranks; parameters without a gradient get none."""
        pairs = [(p, view) for p, view in zip(self.parameters, self.views, strict=True) if p.grad is not None]
        if len(pairs) < len(self.views):
            self.flat.zero_()
        views, gradients = [view for _, view in pairs], [p.grad for p, _ in pairs if p.grad is not None]
        copy_to_all(views, gradients)
        self.ranks.add(self.flat)
        self.flat /= self.ranks.count
        if all(p.dtype == self.flat.dtype for p in self.parameters):
            for p, view in pairs:
                p.grad = view
        else:
            copy_to_all(gradients, views)


def _laid_out_as(tensor: Tensor, part: Tensor) -> Tensor:
    """A view of as many numbers in a row; with a tensor's strides where it fills its memory without gaps."""
    dense = torch.empty_like(tensor).stride() == tensor.stride()
    return part.as_strided(tensor.shape, tensor.stride()) if dense else part.view(tensor.shape)


@torch.no_grad()
def average_statistics(ranks: Ranks, *networks: nn.Module) -> None:
    """Give the BatchNorms of all ranks the mean of their running statistics."""
    statistics = [
        tensor
        for network in networks
        for module in network.modules()
        if isinstance(module, BatchNorm)
        for tensor in (module.running_mean, module.running_var)
        if tensor is not None
    ]
    if statistics:
        flat = ranks.add(torch.cat([tensor.flatten() for tensor in statistics])) / ranks.count
        parts = flat.split([tensor.numel() for tensor in statistics])
        copy_to_all(statistics, [part.view_as(t) for part, t in zip(parts, statistics, strict=True)])
