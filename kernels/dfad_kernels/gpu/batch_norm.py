"""Triton kernels of BatchNorm with an addition and a (leaky) ReLU, over a matrix (rows, channels).

In the equations x is the input, y the result, r the residual, g the incoming gradient, and h the gradient before the
activation.
"""

import triton
import triton.language as tl
from torch import Tensor

from dfad_kernels.gpu.channels import (
    COMBINED_CHANNELS,
    STAGES_OF_SEVERAL,
    affine_of,
    batch_statistics,
    channels_of,
    normalise,
    offsets_of,
    store_sums,
    stretch_of,
    stretches_for,
    walk,
)
from dfad_kernels.gpu.common import compute_type


@triton.jit
def _before_activation(
    g_ptr, y_ptr, offsets, inside, x, mean, scale, shift, slope, ACTIVATES: tl.constexpr, DTYPE: tl.constexpr
):  # fmt: skip
    """h, by the sign of y, or of the pre-activation computed again."""
    g = tl.load(g_ptr + offsets, mask=inside, other=0.0).to(DTYPE)
    if ACTIVATES:
        if y_ptr is not None:
            above = tl.load(y_ptr + offsets, mask=inside, other=0.0).to(DTYPE) > 0
        else:
            above = (x - mean[None, :]) * scale[None, :] + shift[None, :] > 0
        g = tl.where(above, g, tl.full((), slope, DTYPE) * g)
    return g


@triton.jit
def _gradient_sums_kernel(
    partial_ptr, dr_ptr, g_ptr, x_ptr, y_ptr, mean_ptr, variance_ptr, w_ptr, b_ptr, rows, channels, stretch,
    epsilon: tl.float64, slope: tl.float64,
    ACTIVATES: tl.constexpr, DTYPE: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Σ h (x − μ) and Σ h of a stretch, (stretches, 2, channels); h is the gradient of the residual."""
    channel, known, start, end = stretch_of(rows, channels, stretch, CHANNELS)
    mean, _, scale, shift = affine_of(mean_ptr, variance_ptr, w_ptr, b_ptr, channel, channels, epsilon, DTYPE)
    tilts = tl.zeros((ROWS, CHANNELS), DTYPE)
    levels = tl.zeros((ROWS, CHANNELS), DTYPE)
    for first in tl.range(start, end, ROWS, num_stages=STAGES_OF_SEVERAL):
        offsets, row = offsets_of(first, channel, channels, ROWS)
        inside = (row < end)[:, None] & known[None, :]
        x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(DTYPE)
        h = _before_activation(g_ptr, y_ptr, offsets, inside, x, mean, scale, shift, slope, ACTIVATES, DTYPE)
        if dr_ptr is not None:
            tl.store(dr_ptr + offsets, h, mask=inside)
        tilts += tl.where(inside, h * (x - mean[None, :]), 0.0)
        levels += h
    store_sums(partial_ptr, tl.sum(tilts, 0), tl.sum(levels, 0), channel, channels, known)


@triton.jit
def _combine_gradients_kernel(
    dw_ptr, db_ptr, partial_ptr, variance_ptr, channels, stretches, epsilon: tl.float64,
    DTYPE: tl.constexpr, STRETCHES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    channel = channels_of(tl.program_id(0), CHANNELS)
    known = channel < channels
    number = tl.arange(0, STRETCHES).to(tl.int64)
    inside = (number < stretches)[:, None] & known[None, :]
    offsets = number[:, None] * 2 * channels + channel[None, :]
    tilt = tl.sum(tl.load(partial_ptr + offsets, mask=inside, other=0.0).to(tl.float64), 0)
    level = tl.sum(tl.load(partial_ptr + channels + offsets, mask=inside, other=0.0).to(tl.float64), 0)
    variance = tl.load(variance_ptr + channel, mask=known, other=0.0).to(tl.float64)
    tl.store(dw_ptr + channel, (tilt / tl.sqrt(variance + epsilon)).to(DTYPE), mask=known)
    tl.store(db_ptr + channel, level.to(DTYPE), mask=known)


@triton.jit
def _gradient_kernel(
    dx_ptr, g_ptr, x_ptr, mean_ptr, variance_ptr, w_ptr, b_ptr, dw_ptr, db_ptr, rows, channels,
    epsilon: tl.float64, slope: tl.float64,
    ACTIVATES: tl.constexpr, DTYPE: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """γ / √(σ² + ε) (h − (x − μ) / √(σ² + ε) ∂γ / rows − ∂β / rows)."""
    channel = channels_of(tl.program_id(1), CHANNELS)
    known = channel < channels
    mean, inverse, scale, shift = affine_of(mean_ptr, variance_ptr, w_ptr, b_ptr, channel, channels, epsilon, DTYPE)
    per_row = 1 / tl.full((), rows, DTYPE)
    tilt = scale * inverse * per_row * tl.load(dw_ptr + channel, mask=known, other=0.0)
    level = scale * per_row * tl.load(db_ptr + channel, mask=known, other=0.0)
    # after the loads above: in another order registers are spilled
    offsets, row = offsets_of(tl.program_id(0).to(tl.int64) * ROWS, channel, channels, ROWS)
    inside = (row < rows)[:, None] & known[None, :]
    x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(DTYPE)
    h = _before_activation(g_ptr, None, offsets, inside, x, mean, scale, shift, slope, ACTIVATES, DTYPE)
    dx = scale[None, :] * h - tilt[None, :] * (x - mean[None, :]) - level[None, :]
    tl.store(dx_ptr + offsets, dx, mask=inside)


def forward(
    x: Tensor,
    y: Tensor,
    statistics: Tensor,
    running_mean: Tensor | None,
    running_variance: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    momentum: float,
    epsilon: float,
    negative_slope: float,
) -> None:
    """Fills y and the batch's statistics: see :func:`dfad_kernels.batch_norm`."""
    batch_statistics(statistics, x, running_mean, running_variance, momentum)
    normalise(y, x, residual, statistics[0], statistics[1], weight, bias, epsilon, negative_slope)


def backward(
    x: Tensor,
    x_gradient: Tensor,
    weight_gradient: Tensor,
    bias_gradient: Tensor,
    residual_gradient: Tensor,
    y_gradient: Tensor,
    y: Tensor | None,
    statistics: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    epsilon: float,
    negative_slope: float,
) -> None:
    """Fills the gradients, with the residual's if y is given: see :func:`dfad_kernels.batch_norm`."""
    rows, channels = x.shape
    dtype = compute_type(x)
    of_channels = *statistics.unbind(), weight, bias
    passed_on = None if y is None else residual_gradient
    tiling = stretches_for(x)
    partial = statistics.new_empty((tiling.stretches, 2, channels))
    _gradient_sums_kernel[(tiling.stretches, tiling.columns)](
        partial, passed_on, y_gradient, x, y, *of_channels, rows, channels, tiling.stretch, epsilon, negative_slope,
        ACTIVATES=negative_slope != 1, DTYPE=dtype, ROWS=tiling.rows, CHANNELS=tiling.channels,
    )  # fmt: skip
    _combine_gradients_kernel[(triton.cdiv(channels, COMBINED_CHANNELS),)](
        weight_gradient, bias_gradient, partial, statistics[1], channels, tiling.stretches, epsilon,
        DTYPE=dtype, STRETCHES=triton.next_power_of_2(tiling.stretches), CHANNELS=COMBINED_CHANNELS, num_warps=8,
    )  # fmt: skip
    tiling = walk(x)
    incoming = y_gradient if passed_on is None else passed_on
    _gradient_kernel[(tiling.stretches, tiling.columns)](
        x_gradient, incoming, x, *of_channels, weight_gradient, bias_gradient, rows, channels, epsilon, negative_slope,
        ACTIVATES=passed_on is None and negative_slope != 1,
        DTYPE=dtype, ROWS=tiling.rows, CHANNELS=tiling.channels,
    )  # fmt: skip
