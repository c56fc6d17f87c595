"""What can be found out about a network without data."""

import copy
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dfad.errors import ModelError, first_line
from dfad.models.outputs import Outputs, as_outputs, logits_entry
from dfad.modes import evaluating

log = logging.getLogger(__name__)

IMAGE_SIZES = (32, 28, 64, 224, 8, 16, 96, 128, 299)
"""Heights and widths that a dry forward tries where nothing else is known: the most usual first."""

IMAGENET_CLASSES, IMAGENET_SIZE = 1000, 224
"""Networks of so many classes are tried with images of this size before all others."""


def image_shape_of(
    network: nn.Module, channels: int | None = None, image_size: int | None = None
) -> tuple[int, int, int]:
    """``(channels, height, width)`` of the images that a network takes.

    What is not given is what timm's or Hugging Face's configuration in the network says, or torchvision's attribute;
    else the first size of a list at which the network runs, with a warning.

    Raises:
        ModelError: if no size that was tried gives logits.
    """
    declared = _declared_shape(network)
    if channels is None and declared is not None:
        channels = declared[0]
    if channels is None:
        convolution = next((m for m in network.modules() if isinstance(m, nn.Conv2d)), None)
        if convolution is None:
            raise ModelError("The teacher has no convolution to tell its channels from. Give --teacher.channels.")
        channels = convolution.in_channels
    sizes = [(image_size, image_size)] if image_size else [(size, size) for size in _likely_sizes(network)]
    if declared is not None and not image_size:
        sizes.insert(0, declared[1:])
    failure: Exception | None = None
    unusable: ModelError | None = None
    for size in sizes:
        try:
            dry_forward(network, (channels, *size))
        except ModelError as error:  # it runs, and returns no logits
            unusable = unusable or error
            continue
        except Exception as error:  # a network may refuse a size in any way, with an assertion for one
            failure = failure or error
            continue
        if image_size is None and (declared is None or size != declared[1:]):
            log.warning(
                "The size of the teacher's images is guessed: it takes %d×%d pixels, but nothing says that it was "
                "trained on them. Give --teacher.image_size where that is wrong.",
                *size,
            )
        elif image_size is None:
            log.info("The teacher's own configuration says that its images are of %d×%d pixels.", *size)
        return (channels, *size)
    if unusable is not None:
        raise unusable
    tried = f"{image_size}×{image_size}" if image_size else f"any of {', '.join(f'{h}×{w}' for h, w in sizes)}"
    raise ModelError(
        f"The teacher took no image of {channels} channels and {tried} pixels: {type(failure).__name__}: "
        f"{first_line(failure or ValueError())}. Give the right --teacher.channels and --teacher.image_size."
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


def _likely_sizes(network: nn.Module) -> tuple[int, ...]:
    heads = [module for module in network.modules() if isinstance(module, nn.Linear)]
    if heads and heads[-1].out_features == IMAGENET_CLASSES:
        return (IMAGENET_SIZE, *(size for size in IMAGE_SIZES if size != IMAGENET_SIZE))
    return IMAGE_SIZES


def _declared_shape(network: nn.Module) -> tuple[int | None, int, int] | None:
    """Channels, where known, height and width that a network's own configuration tells."""
    for module in network.modules():
        patches = getattr(module, "patch_embed", None)  # timm: of the network as built, not as published
        cfg = getattr(module, "pretrained_cfg", None) or getattr(module, "default_cfg", None)
        published: Any = cfg.get("input_size") if isinstance(cfg, Mapping) else getattr(cfg, "input_size", None)
        published = published if _are_sizes(published, 3) else (None, None)
        config = getattr(module, "config", None)  # Hugging Face
        declarations: tuple[tuple[Any, Any], ...] = (
            (getattr(patches, "img_size", None), getattr(getattr(patches, "proj", None), "in_channels", None)),
            (published[1:], published[0]),
            (getattr(config, "image_size", None), getattr(config, "num_channels", None)),
            (getattr(module, "image_size", None), None),  # torchvision's ViT
        )
        for size, channels in declarations:
            size = (size, size) if isinstance(size, int) else size
            if _are_sizes(size, 2):
                return channels if isinstance(channels, int) else None, size[0], size[1]
    return None


def _are_sizes(value: Any, count: int) -> bool:
    return isinstance(value, (tuple, list)) and len(value) == count and all(isinstance(n, int) and n > 0 for n in value)


def in_float32(network: nn.Module, *, copied: bool) -> nn.Module:
    """A network whose floating-point parameters and buffers are float32, as distilling needs them.

    Args:
        network: returned as it is where they are so already.
        copied: cast a copy, and leave the network as it is.
    """
    tensors = [*network.named_parameters(), *network.named_buffers()]
    others = {tensor.dtype for _, tensor in tensors if tensor.is_floating_point()} - {torch.float32}
    if not others:
        return network
    names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in others))
    log.info("%s has weights in %s; they are cast to float32.", type(network).__name__, names)
    if copied:
        network = copy.deepcopy(network)
    return network.float()


def dry_forward(network: nn.Module, image_shape: tuple[int, int, int], *, announce: bool = False) -> Outputs:
    """What a network returns for two blank images, in eval mode and without a graph; its mode is restored.

    Args:
        network: any.
        image_shape: ``(channels, height, width)``.
        announce: write into the log which entry of several are the logits.

    Raises:
        ModelError: if it returns no logits of two classes or more.
    """
    parameter = next(network.parameters(), torch.empty(0))
    with evaluating(network), torch.no_grad():
        result = network(torch.zeros(2, *image_shape, device=parameter.device))
    outputs = as_outputs(result)
    name = type(network).__name__
    if outputs.logits.ndim != 2 or outputs.logits.shape[0] != 2:
        raise ModelError(
            f"For 2 images, {name} returned logits of shape {tuple(outputs.logits.shape)}; needed is (2, classes)."
            + (f" {BINARY}" if outputs.logits.numel() == 2 else "")
        )
    if outputs.logits.shape[1] < 2:
        raise ModelError(
            f"{name} returned {outputs.logits.shape[1]} logits per image; needed are two or more. {BINARY}"
        )
    if announce and not isinstance(result, (Outputs, Tensor)):
        log.info("%s returns a %s; its entry %r is taken for the logits.", name, type(result).__name__,
                 logits_entry(result)[0])  # fmt: skip
    return outputs


BINARY = (
    "Where one logit z tells two classes apart, return two, whose softmax is the sigmoid of z: "
    "torch.cat([torch.zeros_like(z), z], dim=1); in the teacher and in the student."
)
