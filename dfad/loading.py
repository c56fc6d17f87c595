"""Networks from factory paths, weights from files, and what can be found out about a network without data."""

import importlib
import pickle
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from dfad import models
from dfad.errors import ModelError, nearest
from dfad.models.taps import Outputs, with_taps
from dfad.modes import evaluating

IMAGE_SIZES = (32, 28, 64, 224, 8, 16, 96, 128, 299)
"""Heights and widths that a dry forward tries where none is given: the most usual first."""

WRAPPER_PREFIXES = ("module.", "_orig_mod.", "model.", "network.", "net.")
"""Put before every name by DataParallel, torch.compile and common trainers."""

STATE_DICT_KEYS = ("state_dict", "model", "model_state_dict", "net", "network")
"""Where trainers keep the state dict inside a larger checkpoint."""


def build(factory: str, kwargs: Mapping[str, Any] | None = None, taps: Sequence[str] = ()) -> nn.Module:
    """Call a factory of networks.

    Args:
        factory: ``package.module:callable``, or the bare name of one in :mod:`dfad.models`.
        kwargs: its keyword arguments.
        taps: names for :func:`dfad.models.taps.with_taps`, for a network that returns logits alone.

    Raises:
        ModelError: if it cannot be imported or called, or does not return an ``nn.Module``.
    """
    arguments = dict(kwargs or {})
    callable_ = resolve(factory)
    try:
        network = callable_(**arguments)
    except Exception as error:
        raise ModelError(
            f"The factory {factory} called with {arguments} failed: {type(error).__name__}: {error}. "
            "Check its keyword arguments (kwargs, a JSON object)."
        ) from error
    if not isinstance(network, nn.Module):
        raise ModelError(
            f"The factory {factory} returned a {type(network).__name__}; it must return a torch.nn.Module."
        )
    return with_taps(network, taps) if taps else network


def resolve(factory: str) -> Callable[..., Any]:
    module_name, _, attribute = factory.partition(":")
    if not attribute:
        if factory not in models.__all__:
            raise ModelError(
                f"There is no network {factory!r} in dfad.models.{nearest(factory, models.__all__)} "
                f"There are: {', '.join(models.__all__)}. Your own is named package.module:callable."
            )
        return getattr(models, factory)
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:  # a user's module may fail in any way while it is imported
        raise ModelError(
            f"The factory {factory} cannot be imported: {type(error).__name__}: {error}. "
            "It is written package.module:callable, and the package must be on PYTHONPATH or installed."
        ) from error
    for name in attribute.split("."):
        if not hasattr(found, name):
            raise ModelError(f"The module {module_name} has no {attribute!r}.{nearest(name, dir(found))}")
        found = getattr(found, name)
    if not callable(found):
        raise ModelError(f"The factory {factory} is a {type(found).__name__}; it must be callable.")
    return found


def read_weights(path: Path) -> dict[str, Tensor]:
    """A state dict from a file, on the CPU.

    Args:
        path: safetensors, or what ``torch.save`` wrote of a state dict (possibly inside a larger checkpoint).
            Pickles are read with ``weights_only=True``: one that holds code is refused, not run.

    Raises:
        ModelError: if it is missing, truncated, unsafe or holds no tensors.
    """
    if not path.is_file():
        raise ModelError(f"The checkpoint {path} does not exist. Name a safetensors file or a torch.save state dict.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"The checkpoint {path} is a pickle that holds more than tensors, or is damaged, and was not loaded: "
            "running its code would not be safe. Where you trust it, save its state dict alone: "
            f"torch.save(network.state_dict(), file). Details: {_first_line(error)}"
        ) from None
    except (
        SafetensorError,
        RuntimeError,
        EOFError,
        ValueError,
        KeyError,
        zipfile.BadZipFile,
        OSError,
    ) as error:
        raise ModelError(
            f"The checkpoint {path} ({path.stat().st_size} bytes) cannot be read; it is truncated or of another "
            f"format: {_first_line(error)}. Needed is a safetensors file or a state dict written by torch.save."
        ) from None
    for key in STATE_DICT_KEYS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not isinstance(content, dict) or not any(isinstance(value, Tensor) for value in content.values()):
        raise ModelError(
            f"The checkpoint {path} holds a {type(content).__name__} without tensors; needed is a state dict."
        )
    return {str(name): value for name, value in content.items() if isinstance(value, Tensor)}


def load_weights(network: nn.Module, path: Path) -> None:
    """Load a checkpoint into a network, all names and shapes matching.

    Args:
        network: the network, written in place.
        path: see :func:`read_weights`; prefixes that wrappers put before every name are stripped.

    Raises:
        ModelError: if the file is of another architecture; names the first missing, unexpected and mis-shaped entries.
    """
    given, wanted = read_weights(path), network.state_dict()
    while not given.keys() & wanted.keys() and (prefix := _common_prefix(given)):
        given = {name.removeprefix(prefix): value for name, value in given.items()}

    # counters that old files lack and inference does not use
    missing = [n for n in wanted if n not in given and not n.endswith("num_batches_tracked")]
    unexpected = [n for n in given if n not in wanted]
    misshaped = [
        f"{n} ({tuple(given[n].shape)} in the file, {tuple(wanted[n].shape)} in the network)"
        for n in wanted
        if n in given and given[n].shape != wanted[n].shape
    ]
    if missing or unexpected or misshaped:
        raise ModelError(
            f"The checkpoint {path} is of another architecture than {type(network).__name__}. "
            + _count_and_first("missing", missing)
            + _count_and_first("unexpected", unexpected)
            + _count_and_first("mis-shaped", misshaped)
            + "Check factory and kwargs against the network that was saved."
        )
    network.load_state_dict(given, strict=False)


def _common_prefix(names: Iterable[str]) -> str:
    return next((prefix for prefix in WRAPPER_PREFIXES if all(name.startswith(prefix) for name in names)), "")


def _count_and_first(kind: str, names: list[str]) -> str:
    return f"{len(names)} {kind}, first {names[0]}. " if names else ""


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".")


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
        f"The teacher took no image of {channels} channels and {tried} pixels: {_first_line(failure or ValueError())}. "
        "Give the right --teacher.channels and --teacher.image_size."
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
