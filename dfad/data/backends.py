"""Which backend makes batches of a split."""

import logging
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from dfad.data.config import Backend
from dfad.data.dataset import Dataset, Split
from dfad.data.native import NativeBackend
from dfad.data.plan import Plan

log = logging.getLogger(__name__)


class BatchSource(Protocol):
    """Carries plans out."""

    name: str

    def batches(self, plan: Plan, batch_size: int, *, drop_last: bool) -> Iterator[tuple[Tensor, Tensor]]:
        """Normalised images ``float32 (B, channels, height, width)`` and labels, on the device."""
        ...


def batch_source(dataset: Dataset, split: Split, backend: Backend, device: torch.device) -> BatchSource:
    """What makes batches of a split of a data set."""
    return NativeBackend(split, dataset.mean, dataset.std, device)
