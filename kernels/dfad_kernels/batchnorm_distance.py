"""Distance between the statistics of a batch and those of a BatchNorm."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dfad_kernels.features import channels_last, check_channels, check_features, feature_operator
from dfad_kernels.registration import compute_dtype


def batchnorm_distance(
    features: Tensor, running_mean: Tensor, running_var: Tensor, *, kernels: str | None = None
) -> Tensor:
    r"""Distance between the statistics of a batch and the running ones of a BatchNorm.

    .. math:: \lVert \mu(x) - \mu \rVert_2 + \lVert \sigma^2(x) - \sigma^2 \rVert_2

    Yin et al., "Dreaming to Distill" (DeepInversion), CVPR 2020; the batch's variance is the biased one. The
    gradient of a norm that is zero is zero.

    Args:
        features: input of the BatchNorm, ``(B, channels, ...)``; only it gets a gradient.
        running_mean: μ, ``(channels,)``, float32; float64 for float64 features.
        running_var: σ², in the same form.
        kernels: those of the features' device if None, else as :func:`dfad_kernels.registration.load_kernels` names
            them.

    Returns:
        A scalar, float32; float64 for float64 features.

    Raises:
        ValueError: if shapes or devices do not fit, there are no features, or a statistic requires a gradient.
        TypeError: if the dtypes do not fit.
    """
    check_features(features)
    if features.numel() == 0:
        raise ValueError(f"The features' shape is {tuple(features.shape)}; without values there are no statistics.")
    check_channels(features, running_mean=running_mean, running_var=running_var)
    if running_mean.requires_grad or running_var.requires_grad:
        raise ValueError("A running statistic requires a gradient, which this operator does not give; `.detach()` it.")
    distance: Tensor = _BatchNormDistance.apply(features, running_mean, running_var, kernels)
    return distance


def reference(features: Tensor, running_mean: Tensor, running_var: Tensor) -> Tensor:
    """:func:`batchnorm_distance` as PyTorch's operations in float32 at least."""
    dims = [0, *range(2, features.ndim)]
    variance, mean = torch.var_mean(features.to(compute_dtype(features)), dim=dims, correction=0)
    return torch.linalg.vector_norm(mean - running_mean) + torch.linalg.vector_norm(variance - running_var)


@feature_operator("batchnorm_distance", "forward")
def _forward(features: Tensor, running_mean: Tensor, running_var: Tensor) -> tuple[Tensor, Tensor]:
    """The distance, and what its gradient needs: the batch's mean, tilt and level, ``(3, channels)``."""
    return running_mean.new_empty(()), running_mean.new_empty((3, features.shape[1]))


@feature_operator("batchnorm_distance", "backward")
def _backward(features: Tensor, loss_gradient: Tensor, saved: Tensor) -> Tensor:
    """The features' gradient."""
    return torch.empty_like(features)


class _BatchNormDistance(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, running_mean: Tensor, running_var: Tensor, kernels: str | None) -> Tensor:
        features = channels_last(features)
        distance: Tensor
        distance, saved = _forward(kernels, features, running_mean, running_var)
        ctx.save_for_backward(features, saved)
        ctx.kernels = kernels
        return distance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, loss_gradient: Tensor) -> tuple[Tensor | None, ...]:
        features, saved = ctx.saved_tensors
        return _backward(ctx.kernels, features, loss_gradient, saved), None, None, None
