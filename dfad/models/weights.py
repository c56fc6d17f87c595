"""Weights from files."""

import codecs
import json
import logging
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from dfad.errors import ModelError, first_line, nearest
from dfad.models.exported import is_exported
from dfad.models.filling import EXTRA_STATE, fill

log = logging.getLogger(__name__)

STATE_DICT_KEYS = ("state_dict", "model", "model_state_dict", "net", "network")
"""Keys under which trainers store the state dict in a larger checkpoint."""

MANIFEST, EXTRA = "manifest", "extra_state"
"""Keys of a safetensors file's metadata: the manifest, and extra state that is no tensor, both as JSON."""

WEIGHT_FILES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".tar")


def read_weights(path: Path, key: str | None = None) -> dict[str, Any]:
    """A state dict from a file, on the CPU: tensors, and extra state as it was saved.

    Args:
        path: safetensors, or what ``torch.save`` wrote of a state dict (possibly inside a larger checkpoint); the
            content decides which, not the name. Pickles are read with ``weights_only=True``: one that holds code is
            refused, not run.
        key: path to the state dict in a larger checkpoint, with dots between the levels; or a prefix of the names of
            its tensors. By default it is detected.

    Raises:
        ModelError: if it is missing, truncated, unsafe or holds no tensors, or several state dicts to choose from.
    """
    require_file(path)
    if is_exported(path):
        raise ModelError(
            f"The checkpoint {path} is a program of torch.export, which holds its network whole. Name it alone, as "
            "--teacher or, of dfad.evaluate, --model, without a factory."
        )
    with reading(path):
        content = _read_safetensors(path) if is_safetensors(path) else _read_pickle(path)
    if not isinstance(content, Mapping):
        raise ModelError(
            f"The checkpoint {path} holds a {type(content).__name__} without tensors; a state dict is needed."
        )
    return _of_state(_below(content, key, path) if key else _found(content, path))


def require_file(path: Path) -> None:
    """Check that a path is a file of weights; the error says what it is instead.

    Raises:
        ModelError: if it does not exist, is a folder, or holds something that is often mistaken for weights.
    """
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.name.endswith(WEIGHT_FILES))
        if (path / "saved_model.pb").exists():
            hint = OF_ANOTHER_FRAMEWORK.format("TensorFlow's SavedModel")
        elif not any(path.iterdir()):
            hint = "It is empty."
        elif any(file.name.endswith(".index.json") for file in path.iterdir()):
            hint = "Its weights are in several parts: save them as one file (save_pretrained with a max_shard_size)."
        elif files:
            hint = f"Name a file in it: {', '.join(map(str, files[:5]))}."
        else:
            hint = f"No file in it ends in {', '.join(WEIGHT_FILES)}."
        raise ModelError(f"The checkpoint {path} is a folder; a file of weights is needed. {hint}")
    if path.name.endswith(".index.json"):
        raise ModelError(
            f"The checkpoint {path} lists the parts of weights, and holds none. Save them as one file (save_pretrained "
            "with a max_shard_size), and name that."
        )
    if not path.is_file():
        raise ModelError(f"The checkpoint {path} does not exist. Name a safetensors file or a torch.save state dict.")
    with reading(path), path.open("rb") as file:
        start = file.read(200).lstrip().lower()
    if start.startswith(b"version https://git-lfs"):
        raise ModelError(f"The checkpoint {path} is a pointer of Git LFS, not the file itself. Fetch it: git lfs pull.")
    if start.startswith((b"<!doctype html", b"<html")):
        raise ModelError(f"The checkpoint {path} is a web page, not a file of weights. Download the file itself.")
    if _is_text(start):
        raise ModelError(
            f"The checkpoint {path} is a text file, not a file of weights. Name a safetensors file or a torch.save "
            "state dict."
        )
    foreign = _foreign_format(path, start)
    if foreign:
        raise ModelError(f"The checkpoint {path} is {OF_ANOTHER_FRAMEWORK.format(foreign)}")
    if not path.stat().st_size:
        raise ModelError(f"The checkpoint {path} is empty. Copy or download it again.")
    if zipfile.is_zipfile(path) and _is_torchscript(path):
        raise ModelError(
            f"The checkpoint {path} is a TorchScript archive, which holds code. If you trust it, save its weights: "
            f"torch.save(torch.jit.load({str(path)!r}).state_dict(), file)."
        )


OF_ANOTHER_FRAMEWORK = (
    "{}, not PyTorch's. Networks of other frameworks cannot be distilled here: rebuild the network in PyTorch, copy "
    "its weights over, and save them with torch.save(network.state_dict(), file)."
)


def _is_text(start: bytes) -> bool:
    """Whether a file that begins like this is text."""
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(start)
    except UnicodeDecodeError:
        return False
    return bool(text) and all(letter.isprintable() or letter.isspace() for letter in text)


def _foreign_format(path: Path, start: bytes) -> str | None:
    """What a file of another framework is, by its content, and of those without a mark by its name."""
    if start.startswith(b"\x89hdf"):
        return "an HDF5 file, as Keras writes them"
    if start[4:8] == b"tfl3":
        return "a TensorFlow Lite file"
    if path.suffix == ".onnx":
        return "an ONNX graph"
    if zipfile.is_zipfile(path):
        with reading(path), zipfile.ZipFile(path) as archive:
            if "model.weights.h5" in archive.namelist():
                return "a file of Keras"
    return None


def _is_torchscript(path: Path) -> bool:
    with reading(path), zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns errors of a damaged or unknown file of weights into a ModelError that names it."""
    try:
        yield
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"The checkpoint {path} is a pickle that holds more than tensors, or is damaged, and was not loaded: "
            "running its code would not be safe. If you trust it, save only its state dict: "
            f"torch.save(network.state_dict(), file).{_what_else(error)}"
        ) from None
    except PermissionError:
        raise ModelError(f"There is no permission to read the checkpoint {path}.") from None
    except (
        SafetensorError,
        RuntimeError,
        EOFError,
        ValueError,
        KeyError,
        zipfile.BadZipFile,
        OSError,
    ) as error:
        size = f" ({path.stat().st_size} bytes)" if path.exists() else ""
        raise ModelError(
            f"The checkpoint {path}{size} cannot be read; it is truncated or in another format: {first_line(error)}. "
            "A safetensors file or a state dict written by torch.save is needed."
        ) from None


def _what_else(error: Exception) -> str:
    """The object in the pickle, taken from PyTorch's long message."""
    found = re.search(r"GLOBAL ([\w.]+)", str(error))
    return f" It holds {found[1]}." if found else ""


def is_safetensors(path: Path) -> bool:
    """Whether a file is safetensors, by its content; by its name if it is damaged."""
    with path.open("rb") as file:
        start = file.read(9)
    length = int.from_bytes(start[:8], "little")
    if start[8:] == b"{" and length < path.stat().st_size:
        return True
    return path.suffix == ".safetensors" and not start.startswith((b"PK\x03\x04", b"\x80"))


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file."""
    with safe_open(path, "pt") as file:
        return dict(file.metadata() or {})


def _read_safetensors(path: Path) -> dict[str, Any]:
    state: dict[str, Any] = load_file(path)
    metadata = read_metadata(path)
    # like safetensors' save_model: names of a shared tensor map to its first name
    state |= {name: state[kept] for name, kept in metadata.items() if name not in state and kept in state}
    return state | json.loads(metadata.get(EXTRA, "{}"))


def _read_pickle(path: Path) -> Any:
    with path.open("rb") as file:  # given a path, PyTorch would guess the format from the name
        return torch.load(file, map_location="cpu", weights_only=True)


def _found(content: Mapping[Any, Any], path: Path) -> Mapping[Any, Any]:
    """The state dict in a checkpoint, if it is unambiguous."""
    inner = dict(_state_dicts(content))
    usual = next((key for key in STATE_DICT_KEYS if key in inner), None)
    if usual is None and _tensors(content) > max(map(_tensors, inner.values()), default=0):
        return content
    if usual is None and len(inner) == 1:
        usual = next(iter(inner))
        log.info("The weights in %s are those under %r.", path, usual)
    if usual is not None:
        others = [key for key in inner if key != usual]
        if others:
            log.info(
                "The weights in %s are those under %r; it also holds %s; choose with checkpoint_key.",
                path,
                usual,
                ", ".join(map(repr, others)),
            )
        return inner[usual]
    if inner:
        raise ModelError(
            f"The checkpoint {path} holds several state dicts: {', '.join(inner)}. Choose one with "
            "--teacher.checkpoint_key, --student.checkpoint_key or, of dfad.evaluate, --checkpoint_key."
        )
    keys = ", ".join(str(key) for key in list(content)[:12]) or "nothing"
    raise ModelError(f"The checkpoint {path} has no tensors; it holds {keys}. A state dict is needed.")


def _below(content: Mapping[Any, Any], key: str, path: Path) -> Mapping[Any, Any]:
    inner = dict(_state_dicts(content))
    if key in inner:
        return inner[key]
    deeper = [name for name in inner if name.startswith(key + ".")]
    if len(deeper) == 1:
        return inner[deeper[0]]
    for state in (content, *inner.values()):
        below = {name.removeprefix(key + "."): value for name, value in state.items() if _starts(name, key + ".")}
        if _tensors(below):
            return below
    prefixes = {name.partition(".")[0] for name, value in content.items() if isinstance(value, Tensor)}
    known = [*inner, *sorted(prefixes)]
    raise ModelError(
        f"The checkpoint {path} holds no weights under {key!r}.{nearest(key, known)} There are: "
        f"{', '.join(known[:20]) or 'none'}."
    )


def _starts(name: Any, prefix: str) -> bool:
    return isinstance(name, str) and name.startswith(prefix)


def _state_dicts(content: Mapping[Any, Any], depth: int = 3) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    """State dicts in a checkpoint, by their keys; without those of optimizers, whose keys are numbers."""
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Mapping) or not depth:
            continue
        if _tensors(value):
            yield key, value
        else:
            yield from ((f"{key}.{name}", state) for name, state in _state_dicts(value, depth - 1))


def _tensors(state: Mapping[Any, Any]) -> int:
    """Number of tensors in a mapping with names as keys."""
    return sum(isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items())


def _of_state(content: Mapping[Any, Any]) -> dict[str, Any]:
    return {
        str(name): value
        for name, value in content.items()
        if isinstance(value, Tensor) or str(name).rpartition(".")[2] == EXTRA_STATE
    }


def load_weights(network: nn.Module, path: Path, key: str | None = None) -> None:
    """Load a checkpoint into a network, all names and shapes matching.

    Args:
        network: the network, written in place.
        path: see :func:`read_weights`.
        key: likewise.

    Raises:
        ModelError: if the file cannot be read or is of another architecture; see :func:`dfad.models.filling.fill`.
    """
    fill(network, read_weights(path, key), path)
