"""The network that makes images of noise."""

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from dfad.errors import ModelError


@fx.wrap
def _in_format_of(weight: Tensor, features: Tensor) -> Tensor:
    """Channels-last features in a convolution's memory format. A function of its own, for tracing cannot branch."""
    return features if weight.is_contiguous(memory_format=torch.channels_last) else features.contiguous()


class UpsampledConv2d(nn.Conv2d):
    """A 3×3 convolution of nearest-neighbour upsampled features: twice the height and width.

    Each output pixel sees only 2×2 distinct inputs, so that convolution and upsampling are one transposed convolution
    whose 4×4 kernel sums the weights that meet at an input: 16 products per input pixel and pair of channels instead
    of 36, and no upsampled copy.

    Args:
        in_channels: of the features.
        out_channels: of what is made of them.
        merged: compute it so; else as it is written.
    """

    def __init__(self, in_channels: int, out_channels: int, *, merged: bool) -> None:
        super().__init__(in_channels, out_channels, kernel_size=3, padding=1, bias=False)
        self.merged = merged

    def forward(self, features: Tensor) -> Tensor:
        """``(B, in_channels, height, width)`` to ``(B, out_channels, 2 height, 2 width)``."""
        if not self.merged:
            return super().forward(F.interpolate(features, scale_factor=2, mode="nearest"))
        kernel = self.weight.transpose(0, 1).flip(2, 3)  # as a transposed convolution scatters it
        kernel = F.pad(kernel, (0, 1)) + F.pad(kernel, (1, 0))  # an input pixel is two columns of the upsampled
        kernel = F.pad(kernel, (0, 0, 0, 1)) + F.pad(kernel, (0, 0, 1, 0))  # and two rows
        return F.conv_transpose2d(features, kernel, stride=2, padding=1)


def merge_upsampling(generator: nn.Module) -> None:
    """Let a generator compute each upsampling and the convolution behind it at once."""
    for module in generator.modules():
        if isinstance(module, UpsampledConv2d):
            module.merged = True


class Generator(nn.Module):
    """DFAD's generator (Fang et al. 2019): a linear projection and two nearest-neighbour upsamplings.

    The last BatchNorm has no parameters: images come out with mean 0 and variance 1 per channel, the space of
    normalised images that the teacher was trained in. Where a BatchNorm follows a convolution, that has no bias,
    which would be taken away again.

    Args:
        image_shape: ``(channels, height, width)`` of the images; height and width divisible by 4.
        noise_dim: length of a noise vector.
        width: channels before the last convolution; the stages before have twice as many.
        merge_upsampling: compute each upsampling and the convolution behind it at once.

    Raises:
        ModelError: if height or width is not divisible by 4.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        noise_dim: int = 256,
        width: int = 64,
        *,
        merge_upsampling: bool = False,
    ) -> None:
        super().__init__()
        channels, height, image_width = image_shape
        if height % 4 or image_width % 4 or min(image_shape) < 1:
            raise ModelError(
                f"The generator cannot make images of {height}×{image_width} pixels and {channels} channels: "
                "it upsamples twice by 2, so height and width must be positive multiples of 4. Choose a "
                "teacher of such images, or give a size that it takes as well, such as "
                f"--teacher.image_size {max(4, -(-height // 4) * 4)}."
            )
        self.image_shape = image_shape
        self.noise_dim = noise_dim
        self.projected_shape = (height // 4, image_width // 4, 2 * width)
        self.projection = nn.Linear(noise_dim, height // 4 * (image_width // 4) * 2 * width)
        self.bn0 = nn.BatchNorm2d(2 * width)
        self.conv1 = UpsampledConv2d(2 * width, 2 * width, merged=merge_upsampling)
        self.bn1 = nn.BatchNorm2d(2 * width)
        self.conv2 = UpsampledConv2d(2 * width, width, merged=merge_upsampling)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, channels, kernel_size=3, padding=1)
        self.bn3 = nn.BatchNorm2d(channels, affine=False)

    def forward(self, noise: Tensor) -> Tensor:
        """Images ``(B, channels, height, width)`` of noise ``(B, noise_dim)``."""
        # the projection's units are in channels-last order, so that such a network needs no copy
        features = self.projection(noise).unflatten(1, self.projected_shape).permute(0, 3, 1, 2)
        features = _in_format_of(self.conv1.weight, features)
        features = F.leaky_relu(self.bn1(self.conv1(self.bn0(features))), 0.2)
        features = F.leaky_relu(self.bn2(self.conv2(features)), 0.2)
        return self.bn3(torch.tanh(self.conv3(features)))
