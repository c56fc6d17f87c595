"""One operation on many small tensors, in one launch on a GPU.

PyTorch's optimizers use such operations, which have only private names.
"""

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

log = logging.getLogger(__name__)

CHECKED_WITH = ("2.11", "2.13")
"""Versions of PyTorch for which the names were checked, and that copies to another dtype are one launch."""


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
    """Copy a source to each tensor, in place.

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
