"""Batch normalisation together with what follows it in a network: the addition of a shortcut, and a (leaky) ReLU.

On CPUs, where PyTorch walks memory once for each of the three and more than once for the first. It is no operator of
the dispatcher's: a network calls it dozens of times a step, on maps so small that dispatching would cost more than it
saves.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dfad_kernels.checks import DTYPES
from dfad_kernels.registration import compute_dtype, cpp_functions


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
    kernels: str = "cpp",
) -> Tensor:
    r"""Activation of features that are normalised by their own statistics.

    .. math:: y = \varphi\Bigl(\gamma \frac{x - \mu}{\sqrt{\sigma^2 + \varepsilon}} + \beta + r\Bigr), \quad
        \varphi(v) = v \text{ where } v > 0, \text{ else } a v

    Ioffe and Szegedy, "Batch Normalization", ICML 2015, in training mode, with the addition and the ReLU of He et al.,
    CVPR 2016, in the same walks through memory.

    Args:
        x: features ``(B, channels, ...)`` on a CPU; channels last in memory, or they are copied so.
        running_mean: ``(channels,)``, moved towards the batch's mean; stays where it is if None.
        running_variance: likewise, towards the unbiased variance.
        weight: γ, ``(channels,)``; 1 if None. It, β and the statistics are float32, of float64 features float64.
        bias: β, likewise; 0 if None.
        residual: r, of x's shape and dtype; nothing is added if None.
        momentum: the batch's share in the running statistics.
        epsilon: added to the variance.
        negative_slope: a, not negative. 1 is no activation, 0 is ReLU.
        kernels: which to run, as :func:`dfad_kernels.registration.load_kernels` names them.

    Returns:
        y, channels last in memory.

    Raises:
        ValueError: if shapes or devices do not fit, or a number is out of its range.
        TypeError: if the dtypes do not fit.
    """
    _check(x, running_mean, running_variance, weight, bias, residual, momentum, epsilon, negative_slope)
    y: Tensor = _BatchNorm.apply(
        x, running_mean, running_variance, weight, bias, residual, momentum, epsilon, negative_slope, kernels
    )
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
    """:func:`batch_norm` as PyTorch's operations in float32 at least, on any device."""
    y = F.batch_norm(x.to(compute_dtype(x)), running_mean, running_variance, weight, bias, True, momentum, epsilon)
    return F.leaky_relu(y if residual is None else y + residual, negative_slope).to(x.dtype)


def _check(
    x: Tensor,
    running_mean: Tensor | None,
    running_variance: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    momentum: float,
    epsilon: float,
    negative_slope: float,
) -> None:
    if x.dtype not in DTYPES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise TypeError(f"The features are {x.dtype}; convert them to one of: {known}.")
    if x.device.type != "cpu":
        raise ValueError(f"The features are on {x.device}; these kernels are for CPUs. Use reference there.")
    if x.ndim < 2 or x.numel() <= x.shape[1]:
        raise ValueError(
            f"The features' shape is {tuple(x.shape)}; it must be (B, channels) or (B, channels, ...) with two "
            "values a channel or more: of fewer there is no variance."
        )
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype or residual.device != x.device):
        raise ValueError(
            f"What is added is {tuple(residual.shape)}, {residual.dtype}, on {residual.device}, the features are "
            f"{tuple(x.shape)}, {x.dtype}, on {x.device}; make them alike."
        )
    if (running_mean is None) != (running_variance is None):
        raise ValueError("Only one of running_mean and running_variance is given; give both, or neither.")
    parameters = {"running_mean": running_mean, "running_variance": running_variance, "weight": weight, "bias": bias}
    for name, value in parameters.items():
        if value is None:
            continue
        if value.shape != x.shape[1:2] or value.device != x.device:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)} on {value.device}; it must be ({x.shape[1]},), a number for "
                f"each channel, on {x.device}."
            )
        if value.dtype != compute_dtype(x):
            raise TypeError(f"{name} is {value.dtype}; {x.dtype} features need it in {compute_dtype(x)}.")
        if not value.is_contiguous():
            raise ValueError(f"{name} has stride {value.stride()}; give it as `{name}.contiguous()`.")
    if not 0 <= momentum <= 1:
        raise ValueError(f"momentum is {momentum}; it must be in [0, 1].")
    if not epsilon > 0:
        raise ValueError(f"epsilon is {epsilon}; it must be positive.")
    if not negative_slope >= 0:
        raise ValueError(f"negative_slope is {negative_slope}; it must not be negative.")


class _BatchNorm(torch.autograd.Function):
    """The kernels, and which of their gradients are asked for."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        running_mean: Tensor | None,
        running_variance: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        momentum: float,
        epsilon: float,
        negative_slope: float,
        kernels: str,
    ) -> Tensor:
        x = channels_last(x)
        y = torch.empty_like(x)
        statistics = x.new_empty((2, x.shape[1]), dtype=compute_dtype(x))
        residual = None if residual is None else channels_last(residual)
        forward, ctx.kernel = cpp_functions(kernels, "batch_norm")
        forward(
            _rows(x),
            *map(address, (y, statistics, running_mean, running_variance, residual, weight, bias)),
            *(momentum, negative_slope, epsilon, torch.get_num_threads()),
        )
        # where nothing was added or no activation follows y is not needed, and may be written by an addition in place
        y_needed = residual is not None and negative_slope != 1
        ctx.save_for_backward(x, statistics, weight, bias, y if y_needed else None)
        ctx.numbers = negative_slope, epsilon
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, y_gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, statistics, weight, bias, y = ctx.saved_tensors
        needs_x, _, _, needs_weight, needs_bias, needs_residual, *_ = ctx.needs_input_grad
        y_gradient = channels_last(y_gradient)
        x_gradient, (weight_gradient, bias_gradient) = torch.empty_like(x), torch.empty_like(statistics).unbind()
        # without an activation the residual's gradient is the incoming one
        residual_gradient = torch.empty_like(x) if needs_residual and y is not None else None
        gradients = x_gradient, residual_gradient, weight_gradient, bias_gradient
        ctx.kernel(
            _rows(x),
            *map(address, (*gradients, y_gradient, y, statistics, weight, bias)),
            *(*ctx.numbers, torch.get_num_threads()),
        )
        passed_on = y_gradient if residual_gradient is None else residual_gradient
        return (
            *(x_gradient if needs_x else None, None, None),
            *(weight_gradient if needs_weight else None, bias_gradient if needs_bias else None),
            *(passed_on if needs_residual else None, None, None, None, None),
        )


def channels_last(features: Tensor) -> Tensor:
    """Dense features, channels last in memory; copied only if they are not."""
    if features.ndim == 4:
        return features.contiguous(memory_format=torch.channels_last)
    return features.movedim(1, -1).contiguous().movedim(-1, 1)


def _rows(features: Tensor) -> Tensor:
    """Such features as the kernels see them: a matrix ``(rows, channels)``."""
    return features.detach().movedim(1, -1).reshape(-1, features.shape[1])


def address(tensor: Tensor | None) -> int | None:
    # a tensor's shape would take longer to ask for than many a map to normalise
    return None if tensor is None else tensor.data_ptr()
