"""Whether a network is the one that a factory builds."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dfad.errors import ModelError, first_line, name_of
from dfad.models.filling import fill, misfit, without_prefix
from dfad.models.model_file import load_model, read_manifest
from dfad.models.outputs import as_outputs
from dfad.models.probing import random_images
from dfad.modes import evaluating
from dfad.seeds import random_state_kept

log = logging.getLogger(__name__)

ROUNDING = 1e-3
"""Relative difference of logits that two ways to compute the same may have."""


def require_same(
    network: nn.Module, built: nn.Module, described: str, image_shape: tuple[int, int, int], role: str
) -> None:
    """Refuse a network that is not what its configured factory builds: a file that names the factory would give
    another network.

    Args:
        network: given by the caller; unchanged.
        built: by the factory; gets the weights of the network.
        described: the factory and its arguments, for messages.
        image_shape: ``(channels, height, width)`` of their images.
        role: such as ``student``, for messages.

    Raises:
        ModelError: if they have other tensors, or return other logits with the same weights.
    """
    found = f"The {role} {name_of(network)} is not the network that {role}.factory, {described}, builds"
    remedy = (
        f"Name the callable that builds it in {role}.factory and {role}.kwargs, or leave the factory out: files that "
        "name this one would give another network."
    )
    try:
        _logits(built, image_shape)  # lazy parameters have a shape after that
    except Exception as error:  # a network may refuse images in any way
        raise ModelError(
            f"{found}: the latter does not take images {image_shape} (channels, height, width): "
            f"{type(error).__name__}: {first_line(error)}. {remedy}"
        ) from error
    wanted, source = built.state_dict(), Path(f"of the {role}")
    state = without_prefix(network.state_dict(), wanted, source)
    unfit = misfit(wanted, state)
    if unfit:
        raise ModelError(f"{found}. Of the tensors of the latter, the network has {unfit} {remedy}")
    fill(built, state, source)
    difference = _difference(network, built, image_shape)
    if difference is not None:
        raise ModelError(
            f"{found}: with the same weights, their logits of random images differ by {difference:.1%}. {remedy}"
        )


def require_origin(network: nn.Module, path: Path, factory: str, kwargs: Mapping[str, Any]) -> None:
    """Refuse a network that is built differently from what the file of its weights says, and computes something else.

    Args:
        network: with the weights of the file.
        path: a file of this project or of another program.
        factory: that built the network.
        kwargs: its keyword arguments.

    Raises:
        ModelError: if the network that the file describes returns other logits.
    """
    manifest = read_manifest(path)
    told = manifest.get("architecture", {})
    shape = manifest.get("image_shape")
    if not told.get("factory") or (told["factory"], told.get("kwargs") or {}) == (factory, dict(kwargs)):
        return
    described = f"{told['factory']} with {told.get('kwargs') or {}}"
    try:
        with random_state_kept():
            original, _ = load_model(path)
    except ModelError as error:
        log.warning("%s says that %s builds its network, which cannot be compared: %s", path, described, error)
        return
    difference = _difference(network, original, (shape[0], shape[1], shape[2])) if shape else None
    if difference is not None:
        raise ModelError(
            f"The weights in {path} belong to the network that {described} builds, and {factory} with {dict(kwargs)} "
            f"builds another one: their logits of random images differ by {difference:.1%}. Give the factory and "
            "kwargs of the file, or name the file alone."
        )


def _difference(network: nn.Module, other: nn.Module, image_shape: tuple[int, int, int]) -> float | None:
    """Relative, of the logits of two networks; None if there is none, or the network itself answers differently."""
    expected, again, found = (_logits(candidate, image_shape) for candidate in (network, network, other))
    if not torch.equal(expected, again):
        return None
    if found.shape != expected.shape:
        return float("inf")
    difference = float((found - expected).norm() / expected.norm().clamp_min(1e-6))
    return None if difference <= ROUNDING else difference  # NaN differs


@torch.no_grad()
def _logits(network: nn.Module, image_shape: tuple[int, int, int]) -> Tensor:
    images = random_images(network, image_shape, 4).to(next(network.parameters(), torch.empty(0)).dtype)
    with evaluating(network), random_state_kept():
        torch.manual_seed(0)
        return as_outputs(network(images)).logits.float().cpu()
