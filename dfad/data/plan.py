"""Order and augmentation of an epoch's images, decided before a backend reads any of them.

Backends only carry out a plan, so they agree on order and augmentation, and a resumed run draws the same numbers.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dfad.ranks import Ranks
from dfad.seeds import stream_seed
from dfad.validation import not_negative


@dataclass(frozen=True)
class AugmentConfig:
    """Augmentation of training images."""

    flip: bool = False
    """Mirror half of the images, left to right."""

    translate: int = 0
    """Shift by up to this many pixels in each direction; the border is black."""

    cutout: int = 0
    """Side in pixels of a square that is set to the mean colour; 0 is off."""

    def __post_init__(self) -> None:
        not_negative(translate=self.translate, cutout=self.cutout)


@dataclass(frozen=True)
class Plan:
    """Selection, order and augmentation of images; one entry per image."""

    indices: Tensor
    """Indices into the split."""

    shifts: Tensor
    """``(N, 2)``: pixels down and right from which the image is taken."""

    flips: Tensor
    """Whether each image is mirrored."""

    holes: Tensor
    """``(N, 2)``: row and column of the cut-out square's upper left corner."""

    hole_size: int
    """Side of the square; 0 for none."""

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def changes(self) -> bool:
        """Whether any image is shifted or mirrored."""
        return bool(self.flips.any() or self.shifts.any())

    def to(self, device: torch.device) -> "Plan":
        """The plan on a device."""
        tensors = {
            name: getattr(self, name).to(device, non_blocking=True) for name in ("indices", "shifts", "flips", "holes")
        }
        return dataclasses.replace(self, **tensors)

    def batches(self, batch_size: int, *, drop_last: bool) -> Iterator["Plan"]:
        """Consecutive parts of the plan.

        Args:
            batch_size: length of a part.
            drop_last: omit a shorter last part.
        """
        stop = len(self) // batch_size * batch_size if drop_last else len(self)
        for start in range(0, stop, batch_size):
            yield self.part(slice(start, start + batch_size))

    def part(self, entries: slice | Tensor) -> "Plan":
        """A plan of some of the entries."""
        return Plan(
            self.indices[entries], self.shifts[entries], self.flips[entries], self.holes[entries], self.hole_size
        )

    def share(self, batch_size: int, ranks: Ranks) -> "Plan":
        """Of every whole batch a rank's share, in the order of the batches; the last images that make none are left
        out."""
        if not ranks.several:
            return self
        batches = torch.arange(len(self) // batch_size * batch_size).view(-1, batch_size)
        return self.part(ranks.share(batches.T).T.flatten())


def in_order(count: int) -> Plan:
    """Every image once, in order, unchanged."""
    return Plan(
        indices=torch.arange(count),
        shifts=torch.zeros(count, 2, dtype=torch.int64),
        flips=torch.zeros(count, dtype=torch.bool),
        holes=torch.zeros(count, 2, dtype=torch.int64),
        hole_size=0,
    )


def shuffled(count: int, image_shape: tuple[int, int, int], augment: AugmentConfig, *, seed: int, epoch: int) -> Plan:
    """Every image once, in random order with random augmentation; determined by seed and epoch."""
    # a hash of both, because the CPU's generator uses only 32 bits of a seed
    stream = torch.Generator().manual_seed(stream_seed(seed, epoch))
    _, height, width = image_shape
    indices = torch.randperm(count, generator=stream)
    shifts = torch.randint(-augment.translate, augment.translate + 1, (count, 2), generator=stream)
    flips = torch.rand(count, generator=stream) < 0.5 if augment.flip else torch.zeros(count, dtype=torch.bool)
    # the square's centre may be anywhere in the image, so that borders are cut as often as the middle
    rows = torch.randint(0, height, (count,), generator=stream) - augment.cutout // 2
    columns = torch.randint(0, width, (count,), generator=stream) - augment.cutout // 2
    return Plan(indices, shifts, flips, torch.stack([rows, columns], dim=1), augment.cutout)
