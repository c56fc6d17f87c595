"""Generated images that are kept, so that the student can learn from each of them many times."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from dfad.errors import ConfigurationError
from dfad.ranks import ALONE, Ranks

LARGEST = 127
"""Quantised values range from -127 to 127."""

RANGE = 4.0
"""Range in standard deviations; the generator's last BatchNorm gives every channel mean 0 and variance 1."""


class ImageBank:
    """A ring of the last images that were generated, 8 bits per channel.

    Its memory is allocated once and written in place, and its fill level is kept on the device. So nothing here waits
    for the device, and a captured round remains valid.

    Ranks that share a run each hold all of it: an image crosses the wire once, in a byte per channel, and not again
    each time that it is drawn.

    Args:
        size: number of images that it holds.
        image_shape: ``(channels, height, width)``.
        device: of the images.

    Raises:
        ConfigurationError: if the device has no room for them.
    """

    def __init__(self, size: int, image_shape: tuple[int, int, int], device: torch.device) -> None:
        channels, height, width = image_shape
        self.size = size
        # channels-last, so that drawn images have that format
        shape = (size, height, width, channels)
        try:
            self.images = torch.zeros(shape, dtype=torch.int8, device=device)
        except RuntimeError as error:  # also torch.OutOfMemoryError
            raise ConfigurationError(
                f"There is no room on {device} for {size:,} images of the bank, which take "
                f"{math.prod(shape) / 1e6:,.0f} MB. Lower --method.image_bank.size."
            ) from error
        self.scale = torch.full((channels,), RANGE / LARGEST, device=device)
        """Size of a quantisation step, per channel."""
        self.written = torch.zeros((), dtype=torch.int64, device=device)
        """Number of images ever added."""

    def add(self, images: Tensor, ranks: Ranks = ALONE) -> None:
        """Replace the oldest images by ``(B, channels, height, width)``; at most ``size`` at once.

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
            count: number of images.
            newest: number of them that are drawn from the most recent ones only.
            recent: number of most recent images; the ring holds at least that many.
            rng: the random stream, on the device.
            ranks: which draw the same; each gets its share.
        """
        drawn = torch.randint(2**62, (count,), generator=rng, device=self.images.device)
        filled = self.written.clamp(1, self.size)  # an empty bank has one image, of zeros
        ages = ranks.share(torch.cat([drawn[:newest] % recent, drawn[newest:] % filled]))
        chosen = self.images.index_select(0, (self.written - 1 - ages) % self.size)
        return (chosen * self.scale).permute(0, 3, 1, 2)

    def state_dict(self) -> dict[str, Tensor]:
        """State for a checkpoint."""
        return {"images": self.images, "scale": self.scale, "written": self.written}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load the state of a checkpoint, in place."""
        for name, tensor in self.state_dict().items():
            tensor.copy_(state[name])
