"""Images that no network makes: strokes and blobs, drawn at random."""

import math

import torch
from torch import Tensor

from dfad.ranks import ALONE, Ranks

SMOOTHNESS = 1 / 28, 5 / 28
"""Least and largest width of the smoothing, as a standard deviation in shorter sides of the image."""

STROKES = 0.9
"""Fraction of the images that show strokes; the others show blobs."""

THICKNESS = 0.15, 0.6
"""Half the width of a stroke, in values of the field, whose variance is 1."""

LEVEL = 0.0, 1.5
"""What the field exceeds in a blob."""

SHARPNESS = 3.0, 16.0
"""Slope of a brightness at an edge, per value of the field."""

RADIUS, FADING = (6 / 28, 12 / 28), 28 * 1.5
"""Distance from the middle, in heights and widths, at which an image goes dark, and how steeply."""

DARK = 1e-3
"""Least deviation that is brought to 1: below it a batch of few pixels has no bright one."""


class RandomFields:
    """Bright strokes and blobs on a dark ground, from Gaussian random fields.

    White noise is smoothed by a Gaussian whose width differs from image to image. A stroke is where the field is near
    zero, a blob is where it is above a level. All channels show the same. Nothing here waits for the device.

    Args:
        image_shape: ``(channels, height, width)``.
        rng: the random stream, on the device of the images.
        ranks: which draw the same; each gets its share.
    """

    def __init__(self, image_shape: tuple[int, int, int], rng: torch.Generator, ranks: Ranks = ALONE) -> None:
        self.channels, *size = image_shape
        self.rng = rng
        self.ranks = ranks
        positions = [torch.arange(length, device=rng.device) - (length - 1) / 2 for length in size]
        self.rows, self.columns = (position / min(size) for position in positions)
        rows, columns = (position / length for position, length in zip(positions, size, strict=True))
        self.from_middle = torch.hypot(rows[:, None], columns)

    def sample(self, batch: int) -> Tensor:
        """Images ``(batch, channels, height, width)`` as float32, like the generator's of mean 0 and variance 1."""
        with torch.autocast(self.rng.device.type, enabled=False):
            width = self._between(batch, *map(math.log, SMOOTHNESS)).exp()
            noise = torch.randn(batch, *self.from_middle.shape, generator=self.rng, device=self.rng.device)
            field = _smoothing(self.rows, width) @ noise @ _smoothing(self.columns, width).mT
            strokes = 1 - (field / self._between(batch, *THICKNESS)).abs()
            shape = torch.where(self._between(batch, 0, 1) < STROKES, strokes, field - self._between(batch, *LEVEL))
            brightness = torch.sigmoid(shape * self._between(batch, *map(math.log, SHARPNESS)).exp())
            radius = self._between(batch, *RADIUS)
            images = brightness * torch.sigmoid(FADING * (radius - self.from_middle))
            images = (images - images.mean()) / images.std().clamp_min(DARK)
        return self.ranks.share(images).unsqueeze(1).expand(-1, self.channels, -1, -1)

    def _between(self, batch: int, low: float, high: float) -> Tensor:
        """One random number per image, ``(batch, 1, 1)``."""
        return torch.empty(batch, 1, 1, device=self.rng.device).uniform_(low, high, generator=self.rng)


def _smoothing(positions: Tensor, width: Tensor) -> Tensor:
    """Matrices ``(B, length, length)`` that smooth white noise along one dimension and keep its variance."""
    weights = torch.exp(-((positions[:, None] - positions) ** 2) / (2 * width**2))
    return weights / weights.square().sum(-1, keepdim=True).sqrt()
