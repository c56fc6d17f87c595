"""Weights from files."""

import pickle
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from dfad.errors import ModelError, first_line

WRAPPER_PREFIXES = ("module.", "_orig_mod.", "model.", "network.", "net.")
"""Put before every name by DataParallel, torch.compile and common trainers."""

STATE_DICT_KEYS = ("state_dict", "model", "model_state_dict", "net", "network")
"""Where trainers keep the state dict inside a larger checkpoint."""


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
            f"torch.save(network.state_dict(), file). Details: {first_line(error)}"
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
            f"format: {first_line(error)}. Needed is a safetensors file or a state dict written by torch.save."
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
        path: see :func:`read_weights`.

    Raises:
        ModelError: if the file cannot be read or is of another architecture; see :func:`fill`.
    """
    fill(network, read_weights(path), path)


def fill(network: nn.Module, weights: Mapping[str, Tensor], path: Path) -> None:
    """Put weights that were read from a file into a network, all names and shapes matching.

    Args:
        network: the network, written in place.
        weights: its state dict; prefixes that wrappers put before every name are stripped.
        path: the file, for messages.

    Raises:
        ModelError: if they are of another architecture; names the first missing, unexpected and mis-shaped entries.
    """
    given, wanted = weights, network.state_dict()
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
