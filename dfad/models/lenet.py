"""LeNet-5 and a version of half its width, as distilled by DAFL (Chen et al., ICCV 2019) and DFAD."""

import torch.nn.functional as F
from torch import Tensor, nn

from dfad.models.taps import Outputs


class LeNet(nn.Module):
    """Three 5×5 convolutions, max-pooling after the first two, and two linear layers; a tap per convolution.

    Args:
        channels: of the three convolutions.
        hidden: width of the first linear layer.
        num_classes: length of the logits.
        in_channels: channels of the images.
        padding: of the first convolution: 2 for images of 28×28, 0 for images resized to 32×32 as DAFL does.
    """

    def __init__(
        self, channels: tuple[int, int, int], hidden: int, num_classes: int, in_channels: int, padding: int
    ) -> None:
        super().__init__()
        first, second, third = channels
        self.conv1 = nn.Conv2d(in_channels, first, kernel_size=5, padding=padding)
        self.conv2 = nn.Conv2d(first, second, kernel_size=5)
        self.conv3 = nn.Conv2d(second, third, kernel_size=5)
        self.fc1 = nn.Linear(third, hidden)
        self.fc2 = nn.Linear(hidden, num_classes)

    def forward(self, images: Tensor) -> Outputs:
        first = self.conv1(images)
        second = self.conv2(F.max_pool2d(F.relu(first), 2))
        third = self.conv3(F.max_pool2d(F.relu(second), 2))
        hidden = F.relu(self.fc1(F.relu(third).flatten(1)))
        return Outputs(self.fc2(hidden), (first, second, third))


def lenet5(*, num_classes: int = 10, in_channels: int = 1, padding: int = 2) -> LeNet:
    """LeNet-5 with 6, 16 and 120 channels, 61,706 parameters."""
    return LeNet((6, 16, 120), 84, num_classes, in_channels, padding)


def lenet5_half(*, num_classes: int = 10, in_channels: int = 1, padding: int = 2) -> LeNet:
    """LeNet-5 with 3, 8 and 60 channels, 15,738 parameters."""
    return LeNet((3, 8, 60), 42, num_classes, in_channels, padding)
