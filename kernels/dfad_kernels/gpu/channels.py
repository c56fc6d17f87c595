"""Sums over the rows of a matrix (rows, channels), and factors of channels, for kernels over features.

A program sums a stretch of rows; a second kernel combines the stretches in float64. Nothing is added atomically, so two
runs give the same bits.
"""

import triton
import triton.language as tl
from torch import Tensor

from dfad_kernels.gpu.common import Tiling, compute_type, tile

SUMMED_BYTES = 4096
"""Bytes of each tensor that a program sums at a time: two 128-bit accesses in each of 128 threads."""

STAGES, STAGES_OF_SEVERAL = tl.constexpr(4), tl.constexpr(3)
"""Number of tiles that a program has in work, of one tensor or of up to three: while one is summed, the next ones are
on their way. Without that, the compiler may let each access wait for the one before."""

SUMMED_CHANNELS = 64
"""Channels of a program that sums: 128 bytes of bfloat16, a whole line of the cache."""

WALKED_BYTES = 8192
"""Bytes of each tensor in a program without sums: four 128-bit accesses in each of 128 threads."""

WALKED_CHANNELS = 1024
"""Channels of such a program; if these are all channels, a tile is contiguous."""

PROGRAMS = 512
"""Number of programs that sum: few enough to run all at once on a GPU with 108 multiprocessors or more."""

COMBINED_CHANNELS = 8
"""Channels of a program that combines stretches: 32 bytes of each, a sector of memory."""


@triton.jit
def offsets_of(start, channel, channels, ROWS: tl.constexpr):
    """Offsets of a tile's elements, and the row of each; both int64."""
    row = start + tl.arange(0, ROWS).to(tl.int64)
    return row[:, None] * channels + channel[None, :], row


@triton.jit
def channels_of(program, CHANNELS: tl.constexpr):
    """Those of a tile."""
    return program.to(tl.int64) * CHANNELS + tl.arange(0, CHANNELS)


@triton.jit
def stretch_of(rows, channels, stretch, CHANNELS: tl.constexpr):
    """The channels of a program that sums, which of them there are, and its first row and the one after its last."""
    channel = channels_of(tl.program_id(1), CHANNELS)
    start = tl.program_id(0).to(tl.int64) * stretch
    return channel, channel < channels, start, tl.minimum(start + stretch, rows)


@triton.jit
def store_sums(partial_ptr, first, second, channel, channels, known):
    """What a program has summed: (stretches, 2, channels)."""
    place = tl.program_id(0).to(tl.int64) * 2
    tl.store(partial_ptr + place * channels + channel, first, mask=known)
    tl.store(partial_ptr + (place + 1) * channels + channel, second, mask=known)


@triton.jit
def tile_of(rows, channels, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """The channels of a program that keeps nothing, which of them there are, its offsets, and which are inside."""
    channel = channels_of(tl.program_id(1), CHANNELS)
    known = channel < channels
    offsets, row = offsets_of(tl.program_id(0).to(tl.int64) * ROWS, channel, channels, ROWS)
    return channel, known, offsets, (row < rows)[:, None] & known[None, :]


@triton.jit
def affine_of(mean_ptr, variance_ptr, w_ptr, b_ptr, channel, channels, epsilon, DTYPE: tl.constexpr):
    """Mean, 1 / √(σ² + ε), γ times that and β, of each channel; what is missing is 0 or 1."""
    known = channel < channels
    mean = tl.zeros(channel.shape, DTYPE)
    inverse = mean + 1
    if mean_ptr is not None:
        mean = tl.load(mean_ptr + channel, mask=known, other=0.0)
        variance = tl.load(variance_ptr + channel, mask=known, other=0.0)
        inverse = 1 / tl.sqrt(variance + tl.full((), epsilon, DTYPE))
    scale = inverse
    if w_ptr is not None:
        scale *= tl.load(w_ptr + channel, mask=known, other=0.0)
    shift = tl.zeros(channel.shape, DTYPE)
    if b_ptr is not None:
        shift = tl.load(b_ptr + channel, mask=known, other=0.0)
    return mean, inverse, scale, shift


@triton.jit
def _moments_kernel(
    partial_ptr, x_ptr, rows, channels, stretch,
    DTYPE: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Mean of a stretch, and squares about it: (stretches, 2, channels)."""
    channel, known, start, end = stretch_of(rows, channels, stretch, CHANNELS)
    # sums around the first row: a mean far larger than the deviation cancels before anything is squared
    centre = tl.load(x_ptr + start * channels + channel, mask=known, other=0.0).to(DTYPE)
    sums = tl.zeros((ROWS, CHANNELS), DTYPE)
    squares = tl.zeros((ROWS, CHANNELS), DTYPE)
    for first in tl.range(start, end, ROWS, num_stages=STAGES):
        offsets, row = offsets_of(first, channel, channels, ROWS)
        inside = (row < end)[:, None] & known[None, :]
        x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(DTYPE)
        d = tl.where(inside, x - centre[None, :], 0.0)
        sums += d
        squares += d * d
    total = tl.sum(sums, 0)
    shift = total / (end - start).to(DTYPE)
    store_sums(partial_ptr, centre + shift, tl.sum(squares, 0) - shift * total, channel, channels, known)


@triton.jit
def _combine_moments_kernel(
    statistics_ptr, running_mean_ptr, running_variance_ptr, partial_ptr, rows, channels, stretches, stretch,
    momentum: tl.float64, DTYPE: tl.constexpr, STRETCHES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Mean and biased variance, (2, channels); updates the running statistics if there are any."""
    channel = channels_of(tl.program_id(0), CHANNELS)
    known = channel < channels
    number = tl.arange(0, STRETCHES).to(tl.int64)
    inside = (number < stretches)[:, None] & known[None, :]
    offsets = number[:, None] * 2 * channels + channel[None, :]
    means = tl.load(partial_ptr + offsets, mask=inside, other=0.0).to(tl.float64)
    squares = tl.load(partial_ptr + channels + offsets, mask=inside, other=0.0).to(tl.float64)
    own = tl.minimum(rows - number * stretch, stretch)
    share = (tl.where(number < stretches, own, 0).to(tl.float64) / rows)[:, None]
    mean = tl.sum(share * means, 0)
    away = tl.where(inside, means - mean[None, :], 0.0)
    variance = tl.sum(squares / rows + share * away * away, 0)
    tl.store(statistics_ptr + channel, mean.to(DTYPE), mask=known)
    tl.store(statistics_ptr + channels + channel, variance.to(DTYPE), mask=known)
    if running_mean_ptr is not None:
        old_mean = tl.load(running_mean_ptr + channel, mask=known, other=0.0).to(tl.float64)
        old_variance = tl.load(running_variance_ptr + channel, mask=known, other=0.0).to(tl.float64)
        unbiased = variance * (rows / (rows - 1.0))
        moved_mean = old_mean + momentum * (mean - old_mean)
        moved_variance = old_variance + momentum * (unbiased - old_variance)
        tl.store(running_mean_ptr + channel, moved_mean.to(DTYPE), mask=known)
        tl.store(running_variance_ptr + channel, moved_variance.to(DTYPE), mask=known)


@triton.jit
def _normalise_kernel(
    out_ptr, x_ptr, r_ptr, mean_ptr, variance_ptr, w_ptr, b_ptr, rows, channels, epsilon: tl.float64, slope: tl.float64,
    DTYPE: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    channel, _, offsets, inside = tile_of(rows, channels, ROWS, CHANNELS)
    mean, _, scale, shift = affine_of(mean_ptr, variance_ptr, w_ptr, b_ptr, channel, channels, epsilon, DTYPE)
    x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(DTYPE)
    v = (x - mean[None, :]) * scale[None, :] + shift[None, :]
    if r_ptr is not None:
        v += tl.load(r_ptr + offsets, mask=inside, other=0.0).to(DTYPE)
    tl.store(out_ptr + offsets, tl.where(v > 0, v, tl.full((), slope, DTYPE) * v), mask=inside)


def walk(x: Tensor) -> Tiling:
    """The walk over a matrix that is read once, without sums."""
    return tile(x, WALKED_BYTES // x.element_size(), WALKED_CHANNELS)


def stretches_for(x: Tensor) -> Tiling:
    """The walk over a matrix whose rows are summed."""
    columns = triton.cdiv(x.shape[1], SUMMED_CHANNELS)
    return tile(x, SUMMED_BYTES // x.element_size(), SUMMED_CHANNELS, max(PROGRAMS // columns, 1))


def batch_statistics(
    statistics: Tensor,
    x: Tensor,
    running_mean: Tensor | None = None,
    running_variance: Tensor | None = None,
    momentum: float = 0.0,
) -> None:
    """Fills mean and biased variance of the columns of a matrix, and updates the running statistics."""
    rows, channels = x.shape
    tiling = stretches_for(x)
    dtype = compute_type(x)
    partial = statistics.new_empty((tiling.stretches, 2, channels))
    _moments_kernel[(tiling.stretches, tiling.columns)](
        partial, x, rows, channels, tiling.stretch, DTYPE=dtype, ROWS=tiling.rows, CHANNELS=tiling.channels
    )
    _combine_moments_kernel[(triton.cdiv(channels, COMBINED_CHANNELS),)](
        statistics, running_mean, running_variance, partial, rows, channels, tiling.stretches, tiling.stretch,
        momentum, DTYPE=dtype, STRETCHES=triton.next_power_of_2(tiling.stretches), CHANNELS=COMBINED_CHANNELS,
        num_warps=8,
    )  # fmt: skip


def normalise(
    y: Tensor,
    x: Tensor,
    residual: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    epsilon: float,
    negative_slope: float,
) -> None:
    """Fills y = φ(γ (x − μ) / √(σ² + ε) + β + r)."""
    tiling = walk(x)
    _normalise_kernel[(tiling.stretches, tiling.columns)](
        y, x, residual, mean, variance, weight, bias, *x.shape, epsilon, negative_slope,
        DTYPE=compute_type(x), ROWS=tiling.rows, CHANNELS=tiling.channels,
    )  # fmt: skip
