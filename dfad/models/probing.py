"""Properties of a network that can be determined without data."""

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dfad.errors import DfadError, ModelError, first_line, is_out_of_memory, name_of
from dfad.models.outputs import LOGITS, Outputs, as_outputs, logits_entry, matrices
from dfad.modes import evaluating

log = logging.getLogger(__name__)

IMAGE_SIZES = (32, 28, 64, 224, 8, 16, 96, 128, 299)
"""Heights and widths to try if nothing else is known, the most common first."""

IMAGENET_CLASSES, IMAGENET_SIZE = 1000, 224
"""Image size to try first, by the number of classes."""


@dataclass(frozen=True)
class Images:
    """What a network's origin says of the images that it takes; empty where it says nothing."""

    size: tuple[int, int] | None = None
    """Height and width in pixels."""
    mean: tuple[float, ...] = ()
    """Per channel, of pixels in 0–1."""
    std: tuple[float, ...] = ()
    origin: str = ""
    """Who says so, for people."""


def declared_images(network: nn.Module) -> Images:
    """What timm's configuration in a network says of its images."""
    for module in network.modules():
        said = getattr(module, "pretrained_cfg", None)
        if isinstance(said, Mapping) and said.get("mean") and said.get("std"):
            return Images(None, tuple(said["mean"]), tuple(said["std"]), "timm's configuration")
    return Images()


def image_shape_of(
    network: nn.Module, channels: int | None = None, image_size: int | tuple[int, int] | None = None
) -> tuple[int, int, int]:
    """``(channels, height, width)`` of the images that a network takes.

    Missing values come from the network's own configuration (timm, Hugging Face, torchvision); otherwise the first size
    of a list at which the network runs is taken, with a warning.

    Raises:
        ModelError: if no size that was tried gives logits.
    """
    declared = _declared_shape(network)
    if channels is None and declared is not None:
        channels = declared[0]
    if channels is None:
        channels = channels_of(network)
        if channels is None:
            lack = "TorchScript shows no convolution" if is_script(network) else "The teacher has no convolution"
            raise ModelError(f"{lack} that tells the number of channels. Give --teacher.channels.")
    given = (image_size, image_size) if isinstance(image_size, int) else image_size
    sizes = [given] if given else [(size, size) for size in _likely_sizes(network)]
    if declared is not None and not given:
        sizes.insert(0, declared[1:])
    failure: Exception | None = None
    unusable: ModelError | None = None
    for size in sizes:
        try:
            dry_forward(network, (channels, *size), role="teacher")
        except ModelError as error:  # it runs, but returns no logits
            unusable = unusable or error
            continue
        except Exception as error:  # a network may refuse a size with any error, such as an assertion
            failure = failure or error
            continue
        if given is None and (declared is None or size != declared[1:]):
            log.warning(
                "The size of the teacher's images is guessed: it takes %d×%d pixels, but may have been "
                "trained on another size. Give --teacher.image_size if that is wrong.",
                *size,
            )
        elif given is None:
            log.info("The teacher's own configuration says that its images are of %d×%d pixels.", *size)
        return (channels, *size)
    if unusable is not None:
        raise unusable
    tried = " or ".join((", ".join(f"{h}×{w}" for h, w in part)) for part in (sizes[:-1], sizes[-1:]) if part)
    raise ModelError(
        f"The teacher fails on images of {channels} channels and {tried} pixels: "
        + refusal(failure or ValueError(), "Give the right --teacher.channels and --teacher.image_size.")
    )


def channels_of(network: nn.Module) -> int | None:
    """Channels of the images that a network takes, by its first convolution; None where it has none."""
    return next((module.in_channels for module in network.modules() if isinstance(module, nn.Conv2d)), None)


def is_script(network: nn.Module) -> bool:
    """Whether any part of a network is TorchScript, whose layers are not the modules of PyTorch."""
    return any(isinstance(module, torch.jit.ScriptModule) for module in network.modules())


def parameter_count(network: nn.Module) -> int:
    """Number of parameters of a network."""
    return sum(parameter.numel() for parameter in network.parameters())


def require_same_classes(network: nn.Module, classes: int, other: str, other_classes: int, remedy: str) -> None:
    """Check that a network has the right number of classes.

    Args:
        network: named in the message.
        classes: of the network.
        other: the teacher or data set that it is used with.
        other_classes: of that.
        remedy: a sentence on what to do.

    Raises:
        ModelError: if the numbers differ.
    """
    if classes != other_classes:
        raise ModelError(
            f"{name_of(network)} has {classes} classes and {other} {other_classes}; both must have the same "
            f"number of classes. {remedy}"
        )


def _likely_sizes(network: nn.Module) -> tuple[int, ...]:
    heads = [module for module in network.modules() if isinstance(module, nn.Linear)]
    if heads and heads[-1].out_features == IMAGENET_CLASSES:
        return (IMAGENET_SIZE, *(size for size in IMAGE_SIZES if size != IMAGENET_SIZE))
    return IMAGE_SIZES


def _declared_shape(network: nn.Module) -> tuple[int | None, int, int] | None:
    """Channels, if known, height and width from a network's own configuration."""
    for module in network.modules():
        patches = getattr(module, "patch_embed", None)  # timm: the configuration as built, not as published
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


def device_of(network: nn.Module) -> torch.device:
    """The device of a network's first parameter; the CPU without one."""
    return next(network.parameters(), torch.empty(0)).device


def random_images(network: nn.Module, image_shape: tuple[int, int, int], count: int = 2) -> Tensor:
    """Images ``(count, channels, height, width)`` of standard normal pixels on a network's device, the same each
    time."""
    images = torch.randn(count, *image_shape, generator=torch.Generator().manual_seed(0))
    return images.to(device_of(network))


def answer_to_blanks(network: nn.Module, image_shape: tuple[int, int, int], *, graph: bool = False) -> Any:
    """What a network returns, as it is, for two blank images, in eval mode; its mode is restored.

    Args:
        network: any.
        image_shape: ``(channels, height, width)``.
        graph: record how it is computed.
    """
    with evaluating(network), torch.set_grad_enabled(graph):
        images = torch.zeros(2, *image_shape, device=device_of(network), requires_grad=graph)
        return network(images.clone())  # not a leaf: networks may write into their images


def refusal(error: Exception, remedy: str) -> str:
    """What a network raised for blank images, and what mends it.

    Args:
        error: as raised.
        remedy: what the user can give or change, unless the error is about the type of numbers, or memory ran out.
    """
    said = first_line(error)
    if is_out_of_memory(error):
        remedy = "There is not enough memory for it, whatever its images are: take another --device."
    if re.search(r"dtype|scalar type|\btype \(", said):
        remedy = "Images and weights are float32 here, whatever they were: its forward pass must not cast them."
    return f"{type(error).__name__}: {said}. {remedy}"


@contextmanager
def images_taken(who: str, images: str, shape: tuple[int, int, int], remedy: str) -> Iterator[None]:
    """Turns whatever a network raises for images into an error that names both.

    Args:
        who: the network that is called in the block.
        images: whose images they are, such as ``the images of digits``.
        shape: ``(channels, height, width)``.
        remedy: see :func:`refusal`.

    Raises:
        ModelError: instead of any error that is not meant for users.
    """
    try:
        yield
    except DfadError:
        raise
    except Exception as error:  # a network may refuse images in any way
        raise ModelError(
            f"{who} does not take {images} {shape} (channels, height, width): {refusal(error, remedy)}"
        ) from error


def dry_forward(
    network: nn.Module, image_shape: tuple[int, int, int], *, announce: bool = False, role: str = ""
) -> Outputs:
    """The outputs of a network for two blank images, in eval mode and without gradients; its mode is restored.

    Args:
        network: any.
        image_shape: ``(channels, height, width)``.
        announce: log which of several entries is taken as the logits.
        role: teacher or student, for messages.

    Raises:
        ModelError: if it returns no logits of two classes or more.
    """
    result = answer_to_blanks(network, image_shape)
    outputs = as_outputs(result)
    name = f"The {role} {name_of(network)}" if role else name_of(network)
    if announce and len(matrices(result)) > 1:
        _refuse_features(answer_to_blanks(network, image_shape, graph=True), name)
    if outputs.logits.ndim != 2 or outputs.logits.shape[0] != 2:
        raise ModelError(
            f"{name} returned logits of shape {tuple(outputs.logits.shape)} for 2 images; needed is (2, classes)."
            + (f" {BINARY}" if outputs.logits.numel() == 2 and outputs.logits.is_floating_point() else "")
        )
    if outputs.logits.shape[1] < 2:
        raise ModelError(
            f"{name} returned {outputs.logits.shape[1]} logits per image; needed are two or more. {BINARY}"
        )
    if announce and not isinstance(result, (Outputs, Tensor)):
        log.info("%s returns a %s; its entry %r is taken as the logits.", name, type(result).__name__,
                 logits_entry(result)[0])  # fmt: skip
    return outputs


def _refuse_features(result: Any, name: str) -> None:
    """Refuse a result whose first matrix, taken for the logits, is what a later one is computed from."""
    entry, taken = logits_entry(result)
    for other, value in matrices(result).items():
        if entry not in LOGITS and other != entry and taken.grad_fn in _ancestors(value):
            raise ModelError(
                f"{name} returns a {type(result).__name__} of several matrices, and its entry {entry!r} "
                f"{tuple(taken.shape)}, which would be taken for the logits, is what entry {other!r} "
                f"{tuple(value.shape)} is computed from, as features are. Let it return the logits alone, first, or "
                f"under one of the names {', '.join(map(repr, LOGITS))}."
            )


def _ancestors(tensor: Tensor) -> set[Any]:
    """The operations that a tensor was computed by, but the last."""
    found: set[Any] = set()
    waiting = [tensor.grad_fn]
    while waiting:
        node = waiting.pop()
        for before, _ in node.next_functions if node is not None else ():
            if before is not None and before not in found:
                found.add(before)
                waiting.append(before)
    return found


BINARY = (
    "If a single logit z stands for two classes, return two logits, whose softmax is the sigmoid of z: "
    "torch.cat([torch.zeros_like(z), z], dim=1); in the teacher and in the student."
)
