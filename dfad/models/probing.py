"""What can be found out about a network without data."""

from typing import Any

import torch
from torch import Tensor, nn

from dfad.errors import ModelError, first_line
from dfad.models.taps import Outputs
from dfad.modes import evaluating

IMAGE_SIZES = (32, 28, 64, 224, 8, 16, 96, 128, 299)
"""Heights and widths that a dry forward tries where none is given: the most usual first."""


def as_outputs(result: Any) -> Outputs:
    """What a network returned, as :class:`~dfad.models.taps.Outputs`; plain logits have no taps.

    Raises:
        ModelError: if it is neither.
    """
    if isinstance(result, Outputs):
        return result
    if isinstance(result, Tensor):
        return Outputs(result)
    raise ModelError(
        f"A network returned a {type(result).__name__}; it must return logits, a tensor (batch, classes), "
        "or dfad.models.taps.Outputs."
    )


def image_shape_of(
    network: nn.Module, channels: int | None = None, image_size: int | None = None
) -> tuple[int, int, int]:
    """``(channels, height, width)`` of the images that a network takes, found by dry forwards where not given.

    Raises:
        ModelError: if no size that was tried gives logits.
    """
    if channels is None:
        convolution = next((m for m in network.modules() if isinstance(m, nn.Conv2d)), None)
        if convolution is None:
            raise ModelError("The teacher has no convolution to tell its channels from. Give --teacher.channels.")
        channels = convolution.in_channels
    failure: Exception | None = None
    for size in (image_size,) if image_size else IMAGE_SIZES:
        try:
            dry_forward(network, (channels, size, size))
        except (RuntimeError, ValueError) as error:
            failure = failure or error
        else:
            return (channels, size, size)
    tried = f"{image_size}×{image_size}" if image_size else f"any of {IMAGE_SIZES}"
    raise ModelError(
        f"The teacher took no image of {channels} channels and {tried} pixels: {first_line(failure or ValueError())}. "
        "Give the right --teacher.channels and --teacher.image_size."
    )


def parameter_count(network: nn.Module) -> int:
    """How many numbers a network learns."""
    return sum(parameter.numel() for parameter in network.parameters())


def require_same_classes(network: nn.Module, classes: int, other: str, other_classes: int, remedy: str) -> None:
    """Refuse a network that was made for other classes.

    Args:
        network: named in the message.
        classes: of the network.
        other: the teacher or data set that it goes with.
        other_classes: of that.
        remedy: a sentence on what to do.

    Raises:
        ModelError: if the numbers differ.
    """
    if classes != other_classes:
        raise ModelError(
            f"{type(network).__name__} has {classes} classes and {other} {other_classes}; both must have the same "
            f"number of classes. {remedy}"
        )


def dry_forward(network: nn.Module, image_shape: tuple[int, int, int]) -> Outputs:
    """What a network returns for two blank images, in eval mode and without a graph; its mode is restored."""
    parameter = next(network.parameters(), torch.empty(0))
    with evaluating(network), torch.no_grad():
        outputs = as_outputs(network(torch.zeros(2, *image_shape, device=parameter.device)))
    if outputs.logits.ndim != 2 or outputs.logits.shape[0] != 2:
        raise ModelError(
            f"For 2 images the network returned logits of shape {tuple(outputs.logits.shape)}; needed is (2, classes)."
        )
    return outputs
