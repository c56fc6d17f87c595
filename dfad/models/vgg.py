"""VGG with BatchNorm, for CIFAR (Simonyan and Zisserman, ICLR 2015)."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from dfad.models.initialization import initialize
from dfad.models.taps import Outputs

WIDTHS = (64, 128, 256, 512, 512)


class VGG(nn.Module):
    """Five stages of 3×3 convolutions, each followed by max-pooling, and one linear layer; a tap per stage.

    Args:
        depths: convolutions of each stage.
        num_classes: length of the logits.
        in_channels: channels of the images, which are of 32×32 pixels or more.
    """

    def __init__(self, depths: Sequence[int], num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            _stage(in_width, width, depth)
            for in_width, width, depth in zip((in_channels, *WIDTHS[:-1]), WIDTHS, depths, strict=True)
        )
        self.linear = nn.Linear(WIDTHS[-1], num_classes)
        initialize(self)

    def forward(self, images: Tensor) -> Outputs:
        features = images
        taps = []
        for stage in self.stages:
            tap = stage(features)
            features = F.max_pool2d(F.relu(tap), 2)
            taps.append(tap)
        return Outputs(self.linear(features.mean((2, 3))), tuple(taps))


def _stage(in_channels: int, out_channels: int, depth: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width in (in_channels, *[out_channels] * (depth - 1)):
        if layers:
            layers.append(nn.ReLU(inplace=True))
        layers.append(nn.Conv2d(width, out_channels, kernel_size=3, padding=1, bias=False))
        layers.append(nn.BatchNorm2d(out_channels))
    return nn.Sequential(*layers)


def vgg11(*, num_classes: int = 10, in_channels: int = 3) -> VGG:
    """VGG-11, 9.2 M parameters."""
    return VGG((1, 1, 2, 2, 2), num_classes, in_channels)


def vgg13(*, num_classes: int = 10, in_channels: int = 3) -> VGG:
    """VGG-13, 9.4 M parameters."""
    return VGG((2, 2, 2, 2, 2), num_classes, in_channels)


def vgg16(*, num_classes: int = 10, in_channels: int = 3) -> VGG:
    """VGG-16, 14.7 M parameters."""
    return VGG((2, 2, 3, 3, 3), num_classes, in_channels)


def vgg19(*, num_classes: int = 10, in_channels: int = 3) -> VGG:
    """VGG-19, 20.0 M parameters."""
    return VGG((2, 2, 4, 4, 4), num_classes, in_channels)
