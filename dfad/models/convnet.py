"""A small convolutional network for small images."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from dfad.models.initialization import initialize
from dfad.models.taps import Outputs


class ConvNet(nn.Module):
    """Stages of one 3×3 convolution, BatchNorm and ReLU, with max-pooling between them; a tap per stage.

    Args:
        channels: of each stage.
        num_classes: length of the logits.
        in_channels: channels of the images; height and width are at least 2 to the number of poolings.
    """

    def __init__(self, channels: Sequence[int], num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(in_width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width))
            for in_width, width in zip((in_channels, *channels[:-1]), channels, strict=True)
        )
        self.linear = nn.Linear(channels[-1], num_classes)
        initialize(self)

    def forward(self, images: Tensor) -> Outputs:
        features = images
        taps: list[Tensor] = []
        for stage in self.stages:
            if taps:
                features = F.max_pool2d(features, 2)
            tap = stage(features)
            features = F.relu(tap)
            taps.append(tap)
        return Outputs(self.linear(features.mean((2, 3))), tuple(taps))


def convnet(*, channels: Sequence[int] = (32, 64, 128), num_classes: int = 10, in_channels: int = 3) -> ConvNet:
    """A convolutional network of as many stages as ``channels`` names."""
    return ConvNet(channels, num_classes, in_channels)
