"""The network that makes images from noise."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from dfad.errors import ModelError


@fx.wrap
def _in_format_of(weight: Tensor, features: Tensor) -> Tensor:
    """Channels-last features in a convolution's memory format; a separate function, because a trace has no branches."""
    return features if weight.is_contiguous(memory_format=torch.channels_last) else features.contiguous()


@fx.wrap
def upsampled(features: Tensor) -> Tensor:
    """Features ``(B, channels, height, width)`` at twice the height and width, by nearest neighbours.

    In their own dtype: under autocast PyTorch would make the copies in float32.
    """
    with torch.autocast(features.device.type, enabled=False):
        return F.interpolate(features, scale_factor=2, mode="nearest")


class UpsampledConv2d(nn.Conv2d):
    """Nearest-neighbour upsampling to twice the height and width, followed by a 3×3 convolution.

    Each output pixel sees only 2×2 distinct inputs, so that convolution and upsampling are one transposed convolution
    whose 4×4 kernel sums the weights that meet at an input: 16 products per input pixel and pair of channels instead
    of 36, and no upsampled copy.

    Args:
        in_channels: of the features.
        out_channels: of the result.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size=3, padding=1, bias=False)
        self.merged = False
        """Whether it is computed as one transposed convolution, by :func:`merge_upsampling`."""

    def forward(self, features: Tensor) -> Tensor:
        """``(B, in_channels, height, width)`` to ``(B, out_channels, 2 height, 2 width)``."""
        if not self.merged:
            return super().forward(upsampled(features))
        kernel = self.weight.transpose(0, 1).flip(2, 3)  # the layout of a transposed convolution's kernel
        kernel = F.pad(kernel, (0, 1)) + F.pad(kernel, (1, 0))  # an input pixel is two columns of the upsampled
        kernel = F.pad(kernel, (0, 0, 0, 1)) + F.pad(kernel, (0, 0, 1, 0))  # and two rows
        return F.conv_transpose2d(features, kernel, stride=2, padding=1)


def merge_upsampling(generator: nn.Module) -> None:
    """Make a generator compute each upsampling and the convolution after it as one operation."""
    for module in generator.modules():
        if isinstance(module, UpsampledConv2d):
            module.merged = True


SMALLEST_STAGES, LARGEST_PROJECTION = 2, 16
"""Upsamplings at least, and height or width in pixels of what is projected at most."""


class Generator(nn.Module):
    """DFAD's generator (Fang et al. 2019): a linear projection and nearest-neighbour upsamplings.

    DFAD upsamples twice. Where that would project to more than 16 pixels, there are more upsamplings, so that the
    projection does not grow with the image: 3 from 65 pixels on, 4 from 129. What is made of a size that no doubling
    reaches is cropped in the middle, before the last BatchNorm.

    The last BatchNorm has no parameters: images have mean 0 and variance 1 per channel, like the normalised images that
    the teacher was trained on. A convolution before a BatchNorm has no bias, because the BatchNorm would remove it.

    Args:
        image_shape: ``(channels, height, width)`` of the images.
        noise_dim: length of a noise vector.
        width: channels before the last convolution; the stages before have twice as many.

    Raises:
        ModelError: if channels, height or width is not positive.
    """

    def __init__(self, image_shape: tuple[int, int, int], noise_dim: int = 256, width: int = 64) -> None:
        super().__init__()
        channels, *size = image_shape
        if min(image_shape) < 1:
            raise ModelError(
                f"The generator cannot make images of {size[0]}×{size[1]} pixels and {channels} channels: each must be "
                "1 or more. Give --teacher.channels and --teacher.image_size."
            )
        self.image_shape = image_shape
        self.noise_dim = noise_dim
        self.stages = upsamplings(*size)
        scale = 2**self.stages
        self.projected_shape = (-(-size[0] // scale), -(-size[1] // scale), 2 * width)
        made = [scale * side for side in self.projected_shape[:2]]
        self.margins = [(whole - side) // 2 for whole, side in zip(made, size, strict=True)] if made != size else None
        self.projection = nn.Linear(noise_dim, math.prod(self.projected_shape))
        self.bn0 = nn.BatchNorm2d(2 * width)
        for stage in range(1, self.stages + 1):
            out_channels = width if stage == self.stages else 2 * width
            self.add_module(f"conv{stage}", UpsampledConv2d(2 * width, out_channels))
            self.add_module(f"bn{stage}", nn.BatchNorm2d(out_channels))
        last = self.stages + 1
        self.add_module(f"conv{last}", nn.Conv2d(width, channels, kernel_size=3, padding=1))
        self.add_module(f"bn{last}", nn.BatchNorm2d(channels, affine=False))

    def forward(self, noise: Tensor) -> Tensor:
        """Images ``(B, channels, height, width)`` from noise ``(B, noise_dim)``."""
        # the projection's units are in channels-last order, so that a channels-last network needs no copy
        features = self.projection(noise).unflatten(1, self.projected_shape).permute(0, 3, 1, 2)
        first: Any = self.get_submodule("conv1")
        features = self.bn0(_in_format_of(first.weight, features))
        for stage in range(1, self.stages + 1):
            features = self.get_submodule(f"conv{stage}")(features)
            features = F.leaky_relu(self.get_submodule(f"bn{stage}")(features), 0.2)
        images = torch.tanh(self.get_submodule(f"conv{self.stages + 1}")(features))
        if self.margins is not None:
            (_, height, width), (top, left) = self.image_shape, self.margins
            images = images[:, :, top : top + height, left : left + width]
        return self.get_submodule(f"bn{self.stages + 1}")(images)


def upsamplings(height: int, width: int) -> int:
    """How often the generator of images of a size doubles height and width."""
    return max(SMALLEST_STAGES, math.ceil(math.log2(max(height, width, 1) / LARGEST_PROJECTION)))
