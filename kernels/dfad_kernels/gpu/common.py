"""What the Triton modules share."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


def compute_type(tensor: Tensor) -> tl.dtype:
    """Dtype in which a tensor is computed."""
    return tl.float64 if tensor.dtype == torch.float64 else tl.float32


def warp_size() -> int:
    """Threads that run in step: 32 on NVIDIA's GPUs, 64 on AMD's data-center ones."""
    return 64 if torch.version.hip else 32


class Tiling(NamedTuple):
    """The division of a matrix ``(rows, channels)`` into tiles, of which a program has one at a time."""

    rows: int
    """Of a tile."""
    channels: int
    """Of a tile, as many as the matrix has where that is allowed."""
    columns: int
    """Number of tiles side by side."""
    stretches: int
    """Number of stretches of rows, each with a program."""
    stretch: int
    """Rows of each stretch but the last: whole tiles."""


def tile(features: Tensor, elements: int, most_channels: int, stretches: int | None = None) -> Tiling:
    """Tiles with this number of elements, one per stretch of rows unless fewer stretches are wanted."""
    rows, channels = features.shape
    width = min(triton.next_power_of_2(channels), most_channels)
    height = elements // width
    tiles = triton.cdiv(rows, height)
    of_stretch = triton.cdiv(tiles, min(stretches or tiles, tiles))
    return Tiling(height, width, triton.cdiv(channels, width), triton.cdiv(tiles, of_stretch), of_stretch * height)


@triton.jit
def load_block(s_ptr, t_ptr, numel, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    """A program's offsets, which of them are inside, and what is there of each tensor; outside it is 0."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < numel
    s = tl.load(s_ptr + offsets, mask=inside, other=0.0).to(DTYPE)
    t = tl.load(t_ptr + offsets, mask=inside, other=0.0).to(DTYPE)
    return offsets, inside, s, t
