"""Wide residual networks (Zagoruyko and Komodakis, BMVC 2016)."""

import torch.nn.functional as F
from torch import Tensor, nn

from dfad.models.initialization import initialize
from dfad.models.taps import Outputs


class WideBlock(nn.Module):
    """BatchNorm and ReLU before each of two 3×3 convolutions, beside a shortcut.

    Where the width changes, the shortcut is a 1×1 convolution of the activation; else it is the input itself.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1, bias=False)
        self.shortcut = (
            None
            if in_channels == out_channels
            else nn.Conv2d(in_channels, out_channels, kernel_size=1, stride=stride, bias=False)
        )

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """The block's output, and the input of its first ReLU."""
        normalized = self.bn1(features)
        activation = F.relu(normalized)
        residual = self.conv2(F.relu(self.bn2(self.conv1(activation)), inplace=True))
        return residual + (features if self.shortcut is None else self.shortcut(activation)), normalized


class WideStage(nn.Module):
    """Blocks of one width; the first one has the stride."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, depth: int) -> None:
        super().__init__()
        self.first = WideBlock(in_channels, out_channels, stride)
        self.others = nn.ModuleList(WideBlock(out_channels, out_channels, 1) for _ in range(depth - 1))

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """The stage's output, and the input of its first ReLU."""
        features, normalized = self.first(features)
        for block in self.others:
            features, _ = block(features)
        return features, normalized


class WideResNet(nn.Module):
    """Three stages of wide blocks; one tap per stage.

    A block begins with a BatchNorm, so a stage's tap is the output of the first BatchNorm of the next stage.

    Args:
        depth: 6 n + 4 layers, for n blocks a stage.
        widening: factor of the widths 16, 32, 64.
        num_classes: length of the logits.
        in_channels: channels of the images.
    """

    def __init__(self, depth: int, widening: int, num_classes: int, in_channels: int) -> None:
        super().__init__()
        blocks = (depth - 4) // 6
        widths = [16 * widening, 32 * widening, 64 * widening]
        self.conv1 = nn.Conv2d(in_channels, 16, kernel_size=3, padding=1, bias=False)
        self.stage1 = WideStage(16, widths[0], 1, blocks)
        self.stage2 = WideStage(widths[0], widths[1], 2, blocks)
        self.stage3 = WideStage(widths[1], widths[2], 2, blocks)
        self.bn1 = nn.BatchNorm2d(widths[2])
        self.linear = nn.Linear(widths[2], num_classes)
        initialize(self)

    def forward(self, images: Tensor) -> Outputs:
        features, _ = self.stage1(self.conv1(images))
        features, first = self.stage2(features)
        features, second = self.stage3(features)
        third = self.bn1(features)
        return Outputs(self.linear(F.relu(third).mean((2, 3))), (first, second, third))


def wrn_16_1(*, num_classes: int = 10, in_channels: int = 3) -> WideResNet:
    """WRN-16-1, 0.18 M parameters."""
    return WideResNet(16, 1, num_classes, in_channels)


def wrn_16_2(*, num_classes: int = 10, in_channels: int = 3) -> WideResNet:
    """WRN-16-2, 0.69 M parameters."""
    return WideResNet(16, 2, num_classes, in_channels)


def wrn_40_1(*, num_classes: int = 10, in_channels: int = 3) -> WideResNet:
    """WRN-40-1, 0.56 M parameters."""
    return WideResNet(40, 1, num_classes, in_channels)


def wrn_40_2(*, num_classes: int = 10, in_channels: int = 3) -> WideResNet:
    """WRN-40-2, 2.2 M parameters."""
    return WideResNet(40, 2, num_classes, in_channels)
