"""Memory with guarded borders."""

import ctypes
import mmap

import torch
from torch import Tensor


def guarded(like: Tensor) -> Tensor:
    """A copy that ends at an inaccessible page. Sanitizers do not check masked accesses."""
    if like.numel() == 0:
        return like
    size = like.numel() * like.element_size()
    accessible = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    pages = mmap.mmap(-1, accessible + mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    border = ctypes.addressof(ctypes.c_char.from_buffer(pages)) + accessible
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(border), mmap.PAGESIZE, 0) == 0
    flat = torch.frombuffer(pages, dtype=like.dtype, count=like.numel(), offset=accessible - size)
    return flat.as_strided(like.shape, like.stride()).copy_(like)
