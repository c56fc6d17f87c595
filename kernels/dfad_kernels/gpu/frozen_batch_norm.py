"""Triton kernels of BatchNorm by given statistics, an addition and a (leaky) ReLU, over a matrix (rows, channels)."""

import triton
import triton.language as tl
from torch import Tensor

from dfad_kernels.gpu.channels import affine_of, normalise, tile_of, walk
from dfad_kernels.gpu.common import compute_type


@triton.jit
def _frozen_gradient_kernel(
    dx_ptr, dr_ptr, g_ptr, y_ptr, variance_ptr, w_ptr, rows, channels, epsilon: tl.float64, slope: tl.float64,
    DTYPE: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    channel, _, offsets, inside = tile_of(rows, channels, ROWS, CHANNELS)
    g = tl.load(g_ptr + offsets, mask=inside, other=0.0).to(DTYPE)
    if y_ptr is not None:
        y = tl.load(y_ptr + offsets, mask=inside, other=0.0).to(DTYPE)
        g = tl.where(y > 0, g, tl.full((), slope, DTYPE) * g)
    if dr_ptr is not None:
        tl.store(dr_ptr + offsets, g, mask=inside)
    # the mean has no effect here: only the position of the variance matters
    _, _, scale, _ = affine_of(variance_ptr, variance_ptr, w_ptr, None, channel, channels, epsilon, DTYPE)
    tl.store(dx_ptr + offsets, scale[None, :] * g, mask=inside)


def forward(
    x: Tensor,
    y: Tensor,
    mean: Tensor | None,
    variance: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    epsilon: float,
    negative_slope: float,
) -> None:
    """Fills y: see :func:`dfad_kernels.frozen_batch_norm`."""
    normalise(y, x, residual, mean, variance, weight, bias, epsilon, negative_slope)


def backward(
    y_gradient: Tensor,
    x_gradient: Tensor,
    residual_gradient: Tensor,
    y: Tensor | None,
    variance: Tensor | None,
    weight: Tensor | None,
    epsilon: float,
    negative_slope: float,
) -> None:
    """Fills the gradients: see :func:`dfad_kernels.frozen_batch_norm`."""
    tiling = walk(y_gradient)
    passed_on = residual_gradient if residual_gradient.numel() else None
    _frozen_gradient_kernel[(tiling.stretches, tiling.columns)](
        x_gradient, passed_on, y_gradient, y, variance, weight, *y_gradient.shape,
        epsilon, negative_slope, DTYPE=compute_type(y_gradient), ROWS=tiling.rows, CHANNELS=tiling.channels,
    )  # fmt: skip
