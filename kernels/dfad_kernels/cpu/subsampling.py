"""The shortcut without parameters of thin residual networks.

It is used only between chains of convolutions on CPUs; like these it is no operator of PyTorch's dispatcher.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dfad_kernels.features import channels_last
from dfad_kernels.registration import cpp_functions


def subsample(features: Tensor, stride: int, before: int, after: int, *, kernels: str = "cpp") -> Tensor:
    """Every stride-th pixel, padded with channels of zeros: option A of He et al., CVPR 2016, in one pass on a CPU.

    Args:
        features: ``(B, channels, height, width)``; copied unless they are channels-last in memory.
        stride: in both directions.
        before: number of channels of zeros before the features' channels.
        after: number of channels of zeros after them.
        kernels: name for :func:`dfad_kernels.registration.load_kernels`.

    Returns:
        ``(B, before + channels + after, ...)``, channels last in memory.

    Raises:
        ValueError: if the features are not on a CPU, do not have four dimensions, or a number is out of range.
    """
    if features.device.type != "cpu" or features.ndim != 4:
        raise ValueError(
            f"The features are {tuple(features.shape)}, on {features.device}; they must be (B, channels, height, "
            "width) on a CPU."
        )
    if stride < 1 or before < 0 or after < 0:
        raise ValueError(f"stride is {stride}, before {before}, after {after}; they must be at least 1, 0 and 0.")
    result: Tensor = _Subsample.apply(features, stride, before, after, kernels)
    return result


class _Subsample(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, stride: int, before: int, after: int, kernels: str) -> Tensor:
        features = channels_last(features)
        batch, channels, height, width = features.shape
        shape = batch, before + channels + after, -(-height // stride), -(-width // stride)
        y = torch.empty(shape, dtype=features.dtype, memory_format=torch.channels_last)
        forward, ctx.kernel = cpp_functions(kernels, "subsampling")
        ctx.shape = features.shape
        ctx.numbers = batch, height, width, channels, shape[1], before, stride, features.element_size()
        forward(features.data_ptr(), y.data_ptr(), *ctx.numbers, torch.get_num_threads())
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        gradient = channels_last(gradient)
        result = torch.empty(ctx.shape, dtype=gradient.dtype, memory_format=torch.channels_last)
        ctx.kernel(result.data_ptr(), gradient.data_ptr(), *ctx.numbers, torch.get_num_threads())
        return result, None, None, None, None
