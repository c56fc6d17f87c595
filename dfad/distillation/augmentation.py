"""Random views of images: flipped, shifted, partly hidden, with changed colours."""

import torch
from torch import Tensor

from dfad.config import AugmentationConfig
from dfad.ranks import ALONE, Ranks


class Augmentation:
    """A random view of each image of a batch, for both student and teacher.

    Nothing here waits for the device.

    Args:
        config: the kinds of views and their strengths.
        rng: the random stream, on the device of the images.
        ranks: which draw the same for the whole batch; each has the images of its share.
    """

    def __init__(self, config: AugmentationConfig, rng: torch.Generator, ranks: Ranks = ALONE) -> None:
        self.config = config
        self.rng = rng
        self.ranks = ranks

    def __call__(self, images: Tensor) -> Tensor:
        """Views of normalised images ``(B, channels, height, width)``, with the same shape and dtype, channels-last."""
        config = self.config
        if config.flip or config.crop:
            images = self._flip_and_crop(images)
        if config.cutout:
            images = self._cut_out(images)
        if config.colour:
            images = self._jitter(images)
        return images

    def _flip_and_crop(self, images: Tensor) -> Tensor:
        """Flip and shift as one gather: output pixel ``(i, j)`` is input pixel ``(rows[i], columns[j])``."""
        batch, _, height, width = images.shape
        rows = torch.arange(height, device=images.device).expand(batch, -1)
        columns = torch.arange(width, device=images.device).expand(batch, -1)
        if self.config.flip:
            columns = torch.where(self._integers(batch, 0, 1) == 1, width - 1 - columns, columns)
        crop = self.config.crop
        if crop:
            down, right = int(crop * height), int(crop * width)
            rows = rows + self._integers(batch, -down, down)
            columns = columns + self._integers(batch, -right, right)
        view = pixels_at(images.permute(0, 2, 3, 1), _reflected(rows, height), _reflected(columns, width))
        if crop and self.config.padding == "zero":
            inside = _inside(rows, height).unsqueeze(2) & _inside(columns, width).unsqueeze(1)
            view = view * inside.unsqueeze(3)
        return view.permute(0, 3, 1, 2)

    def _cut_out(self, images: Tensor) -> Tensor:
        batch, _, height, width = images.shape

        def hidden(length: int) -> Tensor:
            side = int(self.config.cutout * length)
            positions = torch.arange(length, device=images.device)
            distance = positions - self._integers(batch, 0, length - 1) + side // 2
            return (distance >= 0) & (distance < side)

        mask = hidden(height).unsqueeze(2) & hidden(width).unsqueeze(1)
        return images * ~mask.unsqueeze(1)

    def _jitter(self, images: Tensor) -> Tensor:
        batch, channels = images.shape[:2]
        drawn = torch.rand((batch * self.ranks.count, 1 + channels), generator=self.rng, device=images.device)
        numbers = self.ranks.share(drawn) * 2 - 1
        change = (self.config.colour * numbers).to(images.dtype).view(batch, -1, 1, 1)
        return images * (1 + change[:, :1]) + change[:, 1:]

    def _integers(self, batch: int, least: int, most: int) -> Tensor:
        """One random number per image, ``(B, 1)``."""
        shape = (batch * self.ranks.count, 1)
        return self.ranks.share(torch.randint(least, most + 1, shape, generator=self.rng, device=self.rng.device))


def pixels_at(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Images whose pixel ``(i, j)`` is pixel ``(rows[i], columns[j])`` of the given ones.

    Args:
        images: ``(B, height, width, channels)``.
        rows: ``(B, new height)``, none of them negative.
        columns: ``(B, new width)``, likewise.
    """
    batch, height, width, channels = images.shape
    samples = torch.arange(batch, device=images.device).view(-1, 1, 1)
    places = (samples * height + rows.unsqueeze(2)) * width + columns.unsqueeze(1)
    # on a CPU four times as fast as an index for each dimension
    return images.reshape(-1, channels).index_select(0, places.flatten()).view(*places.shape, channels)


def _reflected(positions: Tensor, length: int) -> Tensor:
    """Reflect positions beyond an edge at the outermost pixel."""
    positions = positions.abs()
    return torch.minimum(positions, 2 * (length - 1) - positions)


def _inside(positions: Tensor, length: int) -> Tensor:
    return (positions >= 0) & (positions < length)
