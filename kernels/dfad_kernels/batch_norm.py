"""Batch normalisation together with what follows it in a network: the addition of a shortcut, and a (leaky) ReLU.

PyTorch passes through memory once for each of the three, and more than once for the first.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dfad_kernels.features import (
    channels_last,
    check_channels,
    check_features,
    check_normalisation,
    check_residual,
    feature_operator,
)
from dfad_kernels.registration import compute_dtype


def batch_norm(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_variance: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    momentum: float = 0.1,
    epsilon: float = 1e-5,
    negative_slope: float = 1.0,
    kernels: str | None = None,
) -> Tensor:
    r"""Normalise features by their own statistics, add a residual, and apply a (leaky) ReLU.

    .. math:: y = \varphi\Bigl(\gamma \frac{x - \mu}{\sqrt{\sigma^2 + \varepsilon}} + \beta + r\Bigr), \quad
        \varphi(v) = v \text{ where } v > 0, \text{ else } a v

    Ioffe and Szegedy, "Batch Normalization", ICML 2015, in training mode, with the addition and the ReLU of He et al.,
    CVPR 2016, in the same passes through memory.

    Args:
        x: features ``(B, channels, ...)``; copied unless they are channels-last in memory.
        running_mean: ``(channels,)``, updated with the batch's mean; nothing is updated if None.
        running_variance: updated with the unbiased variance, or None.
        weight: γ, ``(channels,)``; 1 if None. Like β and the statistics it is float32; float64 for float64 features.
        bias: β, ``(channels,)``; 0 if None.
        residual: r, with x's shape and dtype; nothing is added if None.
        momentum: the batch's share in the running statistics.
        epsilon: added to the variance.
        negative_slope: a, not negative. 1 is no activation, 0 is ReLU.
        kernels: those of the features' device if None, else as :func:`dfad_kernels.registration.load_kernels` names
            them.

    Returns:
        y, channels last in memory.

    Raises:
        ValueError: if shapes or devices do not fit, or a number is out of its range.
        TypeError: if the dtypes do not fit.
    """
    check_features(x)
    if x.numel() <= x.shape[1]:
        raise ValueError(
            f"The features' shape is {tuple(x.shape)}; it needs at least two values per channel: for fewer there is "
            "no variance."
        )
    check_residual(residual, x)
    if (running_mean is None) != (running_variance is None):
        raise ValueError("Only one of running_mean and running_variance is given; give both, or neither.")
    check_channels(x, running_mean=running_mean, running_variance=running_variance, weight=weight, bias=bias)
    if not 0 <= momentum <= 1:
        raise ValueError(f"momentum is {momentum}; it must be in [0, 1].")
    check_normalisation(epsilon, negative_slope)
    others = running_mean, running_variance, weight, bias, residual, momentum, epsilon, negative_slope
    y: Tensor = _BatchNorm.apply(kernels, x, *others)
    return y


def reference(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_variance: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    momentum: float = 0.1,
    epsilon: float = 1e-5,
    negative_slope: float = 1.0,
) -> Tensor:
    """:func:`batch_norm` as PyTorch's operations in float32 at least."""
    y = F.batch_norm(x.to(compute_dtype(x)), running_mean, running_variance, weight, bias, True, momentum, epsilon)
    return F.leaky_relu(y if residual is None else y + residual, negative_slope).to(x.dtype)


@feature_operator("batch_norm", "forward", mutates=("running_mean", "running_variance"))
def _forward(
    x: Tensor,
    running_mean: Tensor | None,
    running_variance: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    momentum: float,
    epsilon: float,
    negative_slope: float,
) -> tuple[Tensor, Tensor]:
    """y, and the batch's mean and biased variance, ``(2, channels)``."""
    return torch.empty_like(x), x.new_empty((2, x.shape[1]), dtype=compute_dtype(x))


@feature_operator("batch_norm", "backward")
def _backward(
    x: Tensor,
    y_gradient: Tensor,
    y: Tensor | None,
    statistics: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    epsilon: float,
    negative_slope: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias, and of the residual where y is given; without y the latter is empty."""
    of_weight, of_bias = torch.empty_like(statistics[0]), torch.empty_like(statistics[0])
    return torch.empty_like(x), of_weight, of_bias, x.new_empty(0) if y is None else torch.empty_like(x)


class _BatchNorm(torch.autograd.Function):
    """The gradients that are needed."""

    @staticmethod
    def forward(ctx: Any, kernels: str | None, x: Tensor, *others: Any) -> Tensor:
        running_mean, running_variance, weight, bias, residual, momentum, epsilon, negative_slope = others
        x = channels_last(x)
        residual = None if residual is None else channels_last(residual)
        numbers = momentum, epsilon, negative_slope
        y: Tensor
        y, statistics = _forward(kernels, x, running_mean, running_variance, weight, bias, residual, *numbers)
        # without a residual or an activation y is not needed, and an in-place addition may write it
        y_needed = residual is not None and negative_slope != 1
        ctx.save_for_backward(x, y if y_needed else None, statistics, weight, bias)
        ctx.numbers = epsilon, negative_slope
        ctx.kernels = kernels
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, y_gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, y, *others = ctx.saved_tensors
        _, needs_x, _, _, needs_weight, needs_bias, needs_residual, *_ = ctx.needs_input_grad
        y_gradient = channels_last(y_gradient)
        of_x, of_weight, of_bias, of_residual = _backward(ctx.kernels, x, y_gradient, y, *others, *ctx.numbers)
        passed_on = y_gradient if y is None else of_residual  # the incoming gradient, if there is no activation
        return (
            *(None, of_x if needs_x else None, None, None),
            *(of_weight if needs_weight else None, of_bias if needs_bias else None),
            *(passed_on if needs_residual else None, None, None, None),
        )
