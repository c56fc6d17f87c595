"""Generated images that are kept: what the generator makes in its own steps, students learn from for many."""

from collections.abc import Mapping

import torch
from torch import Tensor

from dfad.ranks import ALONE, Ranks

LARGEST = 127
"""Quantised values are -127 to 127."""

RANGE = 4.0
"""In standard deviations. The generator's last BatchNorm gives every channel mean 0 and variance 1, in every batch."""


class ImageBank:
    """A ring of the last images that were generated, 8 bits per channel.

    Its memory is allocated once and written in place, and how full it is stands on the device. So nothing here waits
    for the device, and a captured round goes on with it.

    Ranks that share a run each hold all of it: an image crosses the wire once, in a byte per channel, and not again
    each time that it is drawn.

    Args:
        size: images that it holds.
        image_shape: ``(channels, height, width)``.
        device: where they are.
    """

    def __init__(self, size: int, image_shape: tuple[int, int, int], device: torch.device) -> None:
        channels, height, width = image_shape
        self.size = size
        # a pixel's channels side by side: what is drawn is in the channels-last format
        self.images = torch.zeros((size, height, width, channels), dtype=torch.int8, device=device)
        self.scale = torch.full((channels,), RANGE / LARGEST, device=device)
        """What a step of the quantisation is worth, per channel."""
        self.written = torch.zeros((), dtype=torch.int64, device=device)
        """Images ever added."""

    def add(self, images: Tensor, ranks: Ranks = ALONE) -> None:
        """Keep images ``(B, channels, height, width)`` in place of the oldest; at most ``size`` at once.

        Args:
            images: a batch; a rank's share of it where several share one.
            ranks: which share it.
        """
        values = images.detach().permute(0, 2, 3, 1).float() / self.scale
        quantised = ranks.whole(values.round_().clamp_(-LARGEST, LARGEST).to(torch.int8))
        places = (self.written + torch.arange(len(quantised), device=images.device)) % self.size
        self.images.index_copy_(0, places, quantised)
        self.written += len(quantised)

    def sample(self, count: int, newest: int, recent: int, rng: torch.Generator, ranks: Ranks = ALONE) -> Tensor:
        """Images ``(count, channels, height, width)`` drawn with replacement, as float32.

        Args:
            count: how many.
            newest: how many of them are drawn of the most recent ones alone.
            recent: the most recent ones; the ring holds that many or more.
            rng: the random stream, on the device.
            ranks: which draw the same; each gets its share.
        """
        drawn = torch.randint(2**62, (count,), generator=rng, device=self.images.device)
        filled = self.written.clamp(1, self.size)  # an empty bank's only image is of zeros
        ages = ranks.share(torch.cat([drawn[:newest] % recent, drawn[newest:] % filled]))
        chosen = self.images.index_select(0, (self.written - 1 - ages) % self.size)
        return (chosen * self.scale).permute(0, 3, 1, 2)

    def state_dict(self) -> dict[str, Tensor]:
        """For a checkpoint."""
        return {"images": self.images, "scale": self.scale, "written": self.written}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """From a checkpoint; in place."""
        for name, tensor in self.state_dict().items():
            tensor.copy_(state[name])
