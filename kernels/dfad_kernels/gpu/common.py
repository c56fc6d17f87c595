"""What the Triton modules share on the host."""

import torch
import triton.language as tl
from torch import Tensor


def compute_type(tensor: Tensor) -> tl.dtype:
    """What a tensor is computed in."""
    return tl.float64 if tensor.dtype == torch.float64 else tl.float32


def warp_size() -> int:
    """Threads that run in step: 32 on NVIDIA's GPUs, 64 on AMD's data-center ones."""
    return 64 if torch.version.hip else 32
