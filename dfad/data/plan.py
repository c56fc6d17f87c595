"""What happens to each image of an epoch, decided before any backend touches one.

Backends only carry a plan out, so they agree on order and augmentation, and a resumed run repeats what it would have
drawn.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dfad.seeds import stream_seed


@dataclass(frozen=True)
class AugmentConfig:
    """Random changes of training images."""

    flip: bool = False
    """Mirror every second image, left to right."""

    translate: int = 0
    """Move by up to so many pixels in both directions; black comes in at the border."""

    cutout: int = 0
    """Side in pixels of a square that is set to the mean colour."""

    def __post_init__(self) -> None:
        for name in ("translate", "cutout"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must not be negative")


@dataclass(frozen=True)
class Plan:
    """Which images, in which order, and how each is changed; one entry per image."""

    indices: Tensor
    """Place in the split."""

    shifts: Tensor
    """``(N, 2)``: pixels down and right from which the image is taken."""

    flips: Tensor
    """Whether it is mirrored."""

    holes: Tensor
    """``(N, 2)``: row and column of the cut-out square's upper left corner."""

    hole_size: int
    """Side of that square; 0 for none."""

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def changes(self) -> bool:
        """Whether any image is moved or mirrored."""
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
            drop_last: leave out a last part that is shorter.
        """
        stop = len(self) // batch_size * batch_size if drop_last else len(self)
        for start in range(0, stop, batch_size):
            part = slice(start, start + batch_size)
            yield Plan(self.indices[part], self.shifts[part], self.flips[part], self.holes[part], self.hole_size)


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
    """Every image once, in random order, changed at random; the same for the same seed and epoch."""
    # a hash of both: the generator of the CPU looks at 32 bits of its seed alone
    stream = torch.Generator().manual_seed(stream_seed(seed, epoch))
    _, height, width = image_shape
    indices = torch.randperm(count, generator=stream)
    shifts = torch.randint(-augment.translate, augment.translate + 1, (count, 2), generator=stream)
    flips = torch.rand(count, generator=stream) < 0.5 if augment.flip else torch.zeros(count, dtype=torch.bool)
    # the square's centre is anywhere in the image, so that borders are cut as often as the middle
    rows = torch.randint(0, height, (count,), generator=stream) - augment.cutout // 2
    columns = torch.randint(0, width, (count,), generator=stream) - augment.cutout // 2
    return Plan(indices, shifts, flips, torch.stack([rows, columns], dim=1), augment.cutout)
