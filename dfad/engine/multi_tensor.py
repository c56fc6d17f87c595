"""The same for many small tensors in one launch on a GPU.

PyTorch's optimizers compute so; its operations for that have private names alone.
"""

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

log = logging.getLogger(__name__)

CHECKED_WITH = ("2.11", "2.13")
"""Versions of PyTorch in which the names were looked up, and that copies to another dtype are one launch."""


def add_to_all(tensors: Sequence[Tensor], number: int) -> None:
    """Add a number to each tensor, in place.

    Args:
        tensors: of one device and dtype, or each is a launch of its own.
        number: added.
    """
    add = getattr(torch, "_foreach_add_", None)
    if add is not None and tensors:
        add(tensors, number)
        return
    for tensor in tensors:
        tensor.add_(number)


def copy_to_all(tensors: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy to each tensor, in place.

    Args:
        tensors: of one device and dtype, or each is a launch of its own.
        sources: for each one of its shape and strides, of one dtype.
    """
    copy = getattr(torch, "_foreach_copy_", None)
    if copy is not None and tensors:
        copy(tensors, sources)
        return
    for tensor, source in zip(tensors, sources, strict=True):
        tensor.copy_(source)
