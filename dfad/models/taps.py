"""What a network returns, and how taps are taken from one that returns logits alone."""

from typing import NamedTuple

from torch import Tensor


class Outputs(NamedTuple):
    """What every network of this project returns."""

    logits: Tensor
    """Class scores before softmax, ``(B, classes)``."""

    taps: tuple[Tensor, ...] = ()
    """Pre-activation feature maps ``(B, channels, height, width)`` at the end of each stage: after BatchNorm and the
    addition of the shortcut, before ReLU."""
