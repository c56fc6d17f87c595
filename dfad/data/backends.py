"""The choice of a backend for the batches of a split."""

import logging
import os
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from dfad.data.config import Backend
from dfad.data.dali import DaliBackend, dali_installed
from dfad.data.dataset import Dataset, Split
from dfad.data.decoded import DecodedSplit
from dfad.data.encoded import EncodedSplit
from dfad.data.native import NativeBackend
from dfad.data.plan import Plan
from dfad.errors import DataError

log = logging.getLogger(__name__)

RESIDENT_FRACTION = 0.25
"""Fraction of the device's memory that ``auto`` allows for the images of a split."""


class BatchSource(Protocol):
    """Carries out plans."""

    name: str

    def batches(self, plan: Plan, batch_size: int, *, drop_last: bool) -> Iterator[tuple[Tensor, Tensor]]:
        """Normalised images ``float32 (B, channels, height, width)`` and labels, on the device."""
        ...


def batch_source(dataset: Dataset, split: Split, backend: Backend, device: torch.device) -> BatchSource:
    """The backend for the batches of a split.

    Args:
        dataset: provides the normalisation.
        split: of that data set.
        backend: ``auto`` keeps images on the device if they fit well, and otherwise uses DALI.
        device: of the batches.

    Raises:
        DataError: if DALI is requested and cannot be used.
    """
    if isinstance(split, DecodedSplit) and backend == "dali":
        raise DataError(
            f"DALI decodes image files, and {dataset.name} is stored as pixels. Use --data.backend native or auto."
        )
    if backend == "auto":
        backend, reason = _choose(split, device)
        log.info("Data backend: %s, for %d images of %s: %s.", backend, len(split), dataset.name, reason)
    if backend == "dali":
        assert isinstance(split, EncodedSplit)
        return DaliBackend(split, dataset.mean, dataset.std, device)
    return NativeBackend(split, dataset.mean, dataset.std, device)


def _choose(split: Split, device: torch.device) -> tuple[Backend, str]:
    if isinstance(split, DecodedSplit):
        return "native", "they are stored as pixels"
    size = f"decoded they take {split.decoded_bytes / 1e9:.2g} GB"
    if split.decoded_bytes <= RESIDENT_FRACTION * usable_memory(device):
        return "native", f"{size}, which {device} holds"
    if dali_installed():
        return "dali", f"{size}, too much to keep on {device}"
    return "native", f"{size}; DALI, which would not keep them, is not installed (extra dali)"


def usable_memory(device: torch.device) -> int:
    """Free bytes of a GPU; for a CPU the total, because file caches use most of the free memory."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
