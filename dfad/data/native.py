"""The backend that decodes all images once and keeps them on the network's device."""

from collections.abc import Iterator

import torch
from torch import Tensor

from dfad.data.dataset import Split
from dfad.data.plan import Plan


class NativeBackend:
    """Images as bytes on the device; shifted, mirrored, normalised and cut out there, batch by batch.

    Args:
        split: decoded at construction.
        mean: per channel, of pixels in 0–1.
        std: likewise.
        device: of the batches.
    """

    name = "native"

    def __init__(self, split: Split, mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> None:
        decoded = split.decoded()
        self.images = decoded.images.to(device)
        self.labels = decoded.labels.to(device)
        self.scale = 1 / (255 * torch.tensor(std, device=device).view(-1, 1, 1))
        self.mean = 255 * torch.tensor(mean, device=device).view(-1, 1, 1)

    def batches(self, plan: Plan, batch_size: int, *, drop_last: bool) -> Iterator[tuple[Tensor, Tensor]]:
        """Normalised images ``float32 (B, channels, height, width)`` and labels, on the device."""
        changes = plan.changes
        for part in plan.to(self.images.device).batches(batch_size, drop_last=drop_last):
            images = self.images[part.indices]
            if changes:
                images = _moved(images, part)
            normalized = (images - self.mean).mul_(self.scale)
            if part.hole_size:
                normalized.masked_fill_(_holes(part, *images.shape[2:])[:, None], 0)
            yield normalized, self.labels[part.indices]


def _moved(images: Tensor, part: Plan) -> Tensor:
    """Shift and mirror each image by one gather; pixels from outside are black."""
    height, width = images.shape[2:]
    rows = part.shifts[:, :1] + torch.arange(height, device=images.device)
    columns = torch.arange(width, device=images.device).expand(len(part), -1)
    columns = torch.where(part.flips[:, None], width - 1 - columns, columns) + part.shifts[:, 1:]
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None, :]
    places = rows.clamp(0, height - 1)[:, :, None] * width + columns.clamp(0, width - 1)[:, None, :]
    pixels = images.flatten(2)
    moved = pixels.gather(2, places.flatten(1)[:, None].expand_as(pixels)).view_as(images)
    return moved * inside[:, None]


def _holes(part: Plan, height: int, width: int) -> Tensor:
    def inside(starts: Tensor, length: int) -> Tensor:
        places = torch.arange(length, device=starts.device)
        return (places >= starts[:, None]) & (places < starts[:, None] + part.hole_size)

    return inside(part.holes[:, 0], height)[:, :, None] & inside(part.holes[:, 1], width)[:, None, :]
