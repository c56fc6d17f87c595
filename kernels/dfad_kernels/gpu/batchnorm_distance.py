"""Triton kernels of the distance between a batch's statistics and given ones, over a matrix (rows, channels)."""

import triton
import triton.language as tl
from torch import Tensor

from dfad_kernels.gpu.channels import batch_statistics, tile_of, walk
from dfad_kernels.gpu.common import compute_type

MEASURED_CHANNELS = 1024
"""Number of channels whose squared differences a program sums at a time."""


@triton.jit
def _distance_kernel(
    loss_ptr, saved_ptr, mean_ptr, variance_ptr, rows, channels, DTYPE: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """The two norms, in one program; overwrites the batch's variance with what the gradient needs."""
    means = tl.zeros((CHANNELS,), tl.float64)
    variances = tl.zeros((CHANNELS,), tl.float64)
    for first in range(0, channels, CHANNELS):
        channel = first + tl.arange(0, CHANNELS).to(tl.int64)
        known = channel < channels
        away = tl.load(saved_ptr + channel, mask=known, other=0.0) - tl.load(mean_ptr + channel, mask=known, other=0.0)
        means += away.to(tl.float64) * away
        spread = tl.load(saved_ptr + channels + channel, mask=known, other=0.0)
        spread -= tl.load(variance_ptr + channel, mask=known, other=0.0)
        variances += spread.to(tl.float64) * spread
    of_means = tl.sqrt(tl.sum(means, 0))
    of_variances = tl.sqrt(tl.sum(variances, 0))
    tl.store(loss_ptr, (of_means + of_variances).to(DTYPE))
    for first in range(0, channels, CHANNELS):
        channel = first + tl.arange(0, CHANNELS).to(tl.int64)
        known = channel < channels
        away = tl.load(saved_ptr + channel, mask=known, other=0.0) - tl.load(mean_ptr + channel, mask=known, other=0.0)
        spread = tl.load(saved_ptr + channels + channel, mask=known, other=0.0)
        spread -= tl.load(variance_ptr + channel, mask=known, other=0.0)
        # a norm of zero has no gradient
        level = tl.where(of_means == 0, 0.0, away / (of_means * rows))
        tilt = tl.where(of_variances == 0, 0.0, 2 * spread / (of_variances * rows))
        tl.store(saved_ptr + channels + channel, tilt.to(DTYPE), mask=known)
        tl.store(saved_ptr + 2 * channels + channel, level.to(DTYPE), mask=known)


@triton.jit
def _distance_gradient_kernel(
    dx_ptr, x_ptr, upstream_ptr, saved_ptr, rows, channels,
    DTYPE: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    channel, known, offsets, inside = tile_of(rows, channels, ROWS, CHANNELS)
    upstream = tl.load(upstream_ptr)
    mean = tl.load(saved_ptr + channel, mask=known, other=0.0)
    tilt = upstream * tl.load(saved_ptr + channels + channel, mask=known, other=0.0)
    level = upstream * tl.load(saved_ptr + 2 * channels + channel, mask=known, other=0.0)
    x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(DTYPE)
    tl.store(dx_ptr + offsets, tilt[None, :] * (x - mean[None, :]) + level[None, :], mask=inside)


def forward(x: Tensor, loss: Tensor, saved: Tensor, running_mean: Tensor, running_var: Tensor) -> None:
    """Fills the distance and what its gradient needs: see :func:`dfad_kernels.batchnorm_distance`."""
    batch_statistics(saved, x)
    rows, channels = x.shape
    width = min(triton.next_power_of_2(channels), MEASURED_CHANNELS)
    _distance_kernel[(1,)](
        loss, saved, running_mean, running_var, rows, channels, DTYPE=compute_type(x), CHANNELS=width
    )


def backward(x: Tensor, x_gradient: Tensor, loss_gradient: Tensor, saved: Tensor) -> None:
    """Fills the features' gradient: see :func:`dfad_kernels.batchnorm_distance`."""
    tiling = walk(x)
    _distance_gradient_kernel[(tiling.stretches, tiling.columns)](
        x_gradient, x, loss_gradient, saved, *x.shape,
        DTYPE=compute_type(x), ROWS=tiling.rows, CHANNELS=tiling.channels,
    )  # fmt: skip
