"""What follows a convolution in a frozen network: BatchNorm with given statistics or a bias, the addition of a
shortcut, and a (leaky) ReLU."""

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


def frozen_batch_norm(
    x: Tensor,
    mean: Tensor | None = None,
    variance: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    epsilon: float = 1e-5,
    negative_slope: float = 1.0,
    kernels: str | None = None,
) -> Tensor:
    r"""Normalise features by given statistics, add a residual, and apply a (leaky) ReLU, in one pass through memory.

    .. math:: y = \varphi\Bigl(\gamma \frac{x - \mu}{\sqrt{\sigma^2 + \varepsilon}} + \beta + r\Bigr), \quad
        \varphi(v) = v \text{ where } v > 0, \text{ else } a v

    Ioffe and Szegedy, "Batch Normalization", ICML 2015, in eval mode. Only x and r get gradients.

    Args:
        x: features ``(B, channels, ...)``; copied unless they are channels-last in memory.
        mean: μ, ``(channels,)``; given together with the variance, or both None for no normalisation.
        variance: σ², in the same form.
        weight: γ, in the same form; 1 if None. All of these are float32; float64 for float64 features.
        bias: β, in the same form; 0 if None.
        residual: r, with x's shape and dtype; nothing is added if None.
        epsilon: added to the variance.
        negative_slope: a, not negative. 1 is no activation, 0 is ReLU.
        kernels: those of the features' device if None, else as :func:`dfad_kernels.registration.load_kernels` names
            them.

    Returns:
        y, channels last in memory.

    Raises:
        ValueError: if shapes or devices do not fit, a number is out of its range, or anything but x and r requires a
            gradient.
        TypeError: if the dtypes do not fit.
    """
    check_features(x)
    check_residual(residual, x)
    if (mean is None) != (variance is None):
        raise ValueError("Only one of mean and variance is given; give both, or neither.")
    of_channels = {"mean": mean, "variance": variance, "weight": weight, "bias": bias}
    check_channels(x, **of_channels)
    check_normalisation(epsilon, negative_slope)
    for name, value in of_channels.items():
        if value is not None and value.requires_grad:
            raise ValueError(f"{name} requires a gradient, which this operator does not give; `.detach()` it.")
    y: Tensor = _FrozenBatchNorm.apply(kernels, x, residual, *of_channels.values(), epsilon, negative_slope)
    return y


def reference(
    x: Tensor,
    mean: Tensor | None = None,
    variance: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    epsilon: float = 1e-5,
    negative_slope: float = 1.0,
) -> Tensor:
    """:func:`frozen_batch_norm` as PyTorch's operations in float32 at least."""

    def of_channels(value: Tensor) -> Tensor:
        return value.view(-1, *[1] * (x.ndim - 2))

    y = x.to(compute_dtype(x))
    if mean is not None and variance is not None:
        y = (y - of_channels(mean)) * of_channels((variance + epsilon).rsqrt())
    y = y if weight is None else y * of_channels(weight)
    y = y if bias is None else y + of_channels(bias)
    return F.leaky_relu(y if residual is None else y + residual, negative_slope).to(x.dtype)


@feature_operator("frozen_batch_norm", "forward")
def _forward(
    x: Tensor,
    mean: Tensor | None,
    variance: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    epsilon: float,
    negative_slope: float,
) -> Tensor:
    """y."""
    return torch.empty_like(x)


@feature_operator("frozen_batch_norm", "backward")
def _backward(
    y_gradient: Tensor,
    passes_on: bool,
    y: Tensor | None,
    variance: Tensor | None,
    weight: Tensor | None,
    epsilon: float,
    negative_slope: float,
) -> tuple[Tensor, Tensor]:
    """Gradients of x and, if it is a separate tensor, of the residual; otherwise the latter is empty."""
    return torch.empty_like(y_gradient), torch.empty_like(y_gradient) if passes_on else y_gradient.new_empty(0)


class _FrozenBatchNorm(torch.autograd.Function):
    """The gradients that are needed, and which of them are the same tensor."""

    @staticmethod
    def forward(ctx: Any, kernels: str | None, x: Tensor, residual: Tensor | None, *others: Any) -> Tensor:
        mean, variance, weight, bias, epsilon, negative_slope = others
        residual = None if residual is None else channels_last(residual)
        of_channels = mean, variance, weight, bias
        y: Tensor = _forward(kernels, channels_last(x), *of_channels, residual, epsilon, negative_slope)
        # without an activation y is not needed, and an in-place operation may write it
        ctx.save_for_backward(y if negative_slope != 1 else None, variance, weight)
        ctx.numbers = epsilon, negative_slope
        ctx.kernels = kernels
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, y_gradient: Tensor) -> tuple[Tensor | None, ...]:
        y, variance, weight = ctx.saved_tensors
        _, needs_x, needs_residual, *without = ctx.needs_input_grad
        y_gradient = channels_last(y_gradient)
        activates, scales = y is not None, variance is not None or weight is not None
        of_x = of_residual = y_gradient
        if (activates and (needs_x or needs_residual)) or (scales and needs_x):
            # without a factor both are one tensor; without an activation the residual's gradient is the incoming one
            passes_on = activates and scales and needs_residual
            of_x, passed_on = _backward(ctx.kernels, y_gradient, passes_on, y, variance, weight, *ctx.numbers)
            of_residual = passed_on if passes_on else of_x if activates else y_gradient
        return None, of_x if needs_x else None, of_residual if needs_residual else None, *(None for _ in without)
