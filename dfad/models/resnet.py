"""Residual networks for CIFAR: He et al.'s thin three-stage form, and DFAD's wide four-stage form."""

from collections.abc import Sequence
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from dfad.models.initialization import initialize
from dfad.models.taps import Outputs


class SubsamplingShortcut(nn.Module):
    """Option A of He et al.: every second pixel, and zeros for the additional channels; no parameters."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        before = (out_channels - in_channels) // 2
        self.padding = (0, 0, 0, 0, before, out_channels - in_channels - before)

    def forward(self, features: Tensor) -> Tensor:
        # the gradient of a slice would not be channels-last, and would slow down every addition to it
        return F.pad(F.avg_pool2d(features, kernel_size=1, stride=2), self.padding)


def _projection_shortcut(in_channels: int, out_channels: int) -> nn.Module:
    """Option B of He et al.: a strided 1×1 convolution and BatchNorm."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size=1, stride=2, bias=False),
        nn.BatchNorm2d(out_channels),
    )


class BasicBlock(nn.Module):
    """Two 3×3 convolutions beside a shortcut, from pre-activation to pre-activation.

    The ReLU that usually ends a block is at its beginning here: the network computes the same, and the output of a
    stage is its tap.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, shortcut: nn.Module) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = shortcut

    def forward(self, features: Tensor) -> Tensor:
        features = F.relu(features)  # not in place: the argument may be a tap
        residual = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(features)), inplace=True)))
        return self.shortcut(features) + residual


class ResNet(nn.Module):
    """Stages of basic blocks between a 3×3 convolution and global average pooling; one tap per stage.

    Args:
        widths: channels of each stage; every stage but the first halves height and width.
        depths: blocks of each stage.
        shortcut: where the width changes, "subsampling" (option A) or "projection" (option B).
        num_classes: length of the logits.
        in_channels: channels of the images.
    """

    def __init__(
        self,
        widths: Sequence[int],
        depths: Sequence[int],
        shortcut: Literal["subsampling", "projection"],
        num_classes: int,
        in_channels: int,
    ) -> None:
        super().__init__()
        new_shortcut = SubsamplingShortcut if shortcut == "subsampling" else _projection_shortcut
        self.conv1 = nn.Conv2d(in_channels, widths[0], kernel_size=3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.stage_names = tuple(f"layer{number}" for number in range(1, len(widths) + 1))
        in_width = widths[0]
        for name, width, depth in zip(self.stage_names, widths, depths, strict=True):
            first = (
                BasicBlock(width, width, 1, nn.Identity())
                if name == "layer1"
                else BasicBlock(in_width, width, 2, new_shortcut(in_width, width))
            )
            others = (BasicBlock(width, width, 1, nn.Identity()) for _ in range(depth - 1))
            self.add_module(name, nn.Sequential(first, *others))
            in_width = width
        self.linear = nn.Linear(widths[-1], num_classes)
        initialize(self)

    def forward(self, images: Tensor) -> Outputs:
        features = self.bn1(self.conv1(images))
        taps = []
        for name in self.stage_names:
            features = self.get_submodule(name)(features)
            taps.append(features)
        return Outputs(self.linear(F.relu(features).mean((2, 3))), tuple(taps))


def _thin(depth: int, num_classes: int, in_channels: int) -> ResNet:
    blocks = (depth - 2) // 6
    return ResNet((16, 32, 64), (blocks,) * 3, "subsampling", num_classes, in_channels)


def resnet8(*, num_classes: int = 10, in_channels: int = 3) -> ResNet:
    """ResNet-8 for CIFAR, 0.08 M parameters: one block in each stage of He et al.'s thin ResNets."""
    return _thin(8, num_classes, in_channels)


def resnet14(*, num_classes: int = 10, in_channels: int = 3) -> ResNet:
    """ResNet-14 for CIFAR, 0.17 M parameters: two blocks in each stage of He et al.'s thin ResNets."""
    return _thin(14, num_classes, in_channels)


def resnet20(*, num_classes: int = 10, in_channels: int = 3) -> ResNet:
    """ResNet-20 for CIFAR, 0.27 M parameters (He et al., CVPR 2016)."""
    return _thin(20, num_classes, in_channels)


def resnet32(*, num_classes: int = 10, in_channels: int = 3) -> ResNet:
    """ResNet-32 for CIFAR, 0.46 M parameters (He et al., CVPR 2016)."""
    return _thin(32, num_classes, in_channels)


def resnet44(*, num_classes: int = 10, in_channels: int = 3) -> ResNet:
    """ResNet-44 for CIFAR, 0.66 M parameters (He et al., CVPR 2016)."""
    return _thin(44, num_classes, in_channels)


def resnet56(*, num_classes: int = 10, in_channels: int = 3) -> ResNet:
    """ResNet-56 for CIFAR, 0.85 M parameters (He et al., CVPR 2016)."""
    return _thin(56, num_classes, in_channels)


def resnet18(*, num_classes: int = 10, in_channels: int = 3) -> ResNet:
    """ResNet-18 with a 3×3 stem and no pooling, DFAD's student: 11.2 M parameters."""
    return ResNet((64, 128, 256, 512), (2, 2, 2, 2), "projection", num_classes, in_channels)


def resnet34(*, num_classes: int = 10, in_channels: int = 3) -> ResNet:
    """ResNet-34 with a 3×3 stem and no pooling, DFAD's teacher: 21.3 M parameters."""
    return ResNet((64, 128, 256, 512), (3, 4, 6, 3), "projection", num_classes, in_channels)
