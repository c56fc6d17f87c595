"""What the Triton modules share on the host."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


def compute_type(tensor: Tensor) -> tl.dtype:
    """What a tensor is computed in."""
    return tl.float64 if tensor.dtype == torch.float64 else tl.float32


def warp_size() -> int:
    """Threads that run in step: 32 on NVIDIA's GPUs, 64 on AMD's data-center ones."""
    return 64 if torch.version.hip else 32


class Tiling(NamedTuple):
    """How a matrix ``(rows, channels)`` is walked: a program has a tile at a time."""

    rows: int
    """Of a tile."""
    channels: int
    """Of a tile, as many as the matrix has where that is allowed."""
    columns: int
    """Tiles that are needed beside each other."""
    stretches: int
    """Into so many the rows are divided, a program for each."""
    stretch: int
    """Rows of each, all but the last: whole tiles."""


def tile(features: Tensor, elements: int, most_channels: int, stretches: int | None = None) -> Tiling:
    """Tiles of so many elements, one for each stretch of rows unless there are to be fewer stretches."""
    rows, channels = features.shape
    width = min(triton.next_power_of_2(channels), most_channels)
    height = elements // width
    tiles = triton.cdiv(rows, height)
    of_stretch = triton.cdiv(tiles, min(stretches or tiles, tiles))
    return Tiling(height, width, triton.cdiv(channels, width), triton.cdiv(tiles, of_stretch), of_stretch * height)
