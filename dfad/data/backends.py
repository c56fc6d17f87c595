"""Which backend makes batches of a split."""

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
from dfad.data.native import NativeBackend
from dfad.data.plan import Plan
from dfad.errors import DataError

log = logging.getLogger(__name__)

RESIDENT_FRACTION = 0.25
"""Of the free memory where the network is, that ``auto`` lets the images of a split take."""


class BatchSource(Protocol):
    """Carries plans out."""

    name: str

    def batches(self, plan: Plan, batch_size: int, *, drop_last: bool) -> Iterator[tuple[Tensor, Tensor]]:
        """Normalised images ``float32 (B, channels, height, width)`` and labels, on the device."""
        ...


def batch_source(dataset: Dataset, split: Split, backend: Backend, device: torch.device) -> BatchSource:
    """What makes batches of a split of a data set.

    Args:
        dataset: tells the normalisation.
        split: of that data set.
        backend: ``auto`` keeps images resident that are small for the device, and leaves others to DALI.
        device: where the batches are to be.

    Raises:
        DataError: if DALI is asked for and cannot be used.
    """
    if isinstance(split, DecodedSplit):
        if backend == "dali":
            raise DataError(
                f"DALI decodes image files, and {dataset.name} comes as pixels. Use --data.backend native or auto."
            )
        return NativeBackend(split, dataset.mean, dataset.std, device)
    resident = split.decoded_bytes <= RESIDENT_FRACTION * free_memory(device)
    if backend == "auto":
        backend = "native" if resident or not dali_installed() else "dali"
        log.info(
            "Data backend: %s, for %d images that take %.2g GB decoded, on %s%s.",
            backend,
            len(split),
            split.decoded_bytes / 1e9,
            device,
            "" if resident or backend == "dali" else "; the extra dali would save that memory",
        )
    kind = DaliBackend if backend == "dali" else NativeBackend
    return kind(split, dataset.mean, dataset.std, device)


def free_memory(device: torch.device) -> int:
    """Bytes of memory that are free for a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
