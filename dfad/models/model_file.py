"""Self-contained model files: weights and a manifest in one safetensors file."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from dfad.environment import versions
from dfad.errors import ModelError
from dfad.files import write_atomically
from dfad.models.factory import build
from dfad.models.filling import fill, shared_tensors
from dfad.models.weights import EXTRA, MANIFEST, is_safetensors, read_metadata, read_weights, reading, require_file


def save_model(path: Path, state: Mapping[str, Any], manifest: Mapping[str, Any]) -> None:
    """Write weights and a manifest, so that the file alone is sufficient to use the network.

    Args:
        path: a ``.safetensors`` file, replaced in one step.
        state: the network's state dict. A tensor with several names is stored under the first of them, and the file's
            metadata map the other names to it, as safetensors' ``save_model`` does.
        manifest: JSON values; ``architecture`` holds ``factory``, ``kwargs`` and optionally ``taps``. Versions and a
            hash of the weights are added.

    Raises:
        ModelError: if such a file cannot hold the state.
        RunFolderError: if the file cannot be written.
    """
    weights, extra = divided(state)
    shared = {name: first for name, first in shared_tensors(weights).items() if name != first}
    stored: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name in (name for name in weights if name not in shared):
        tensor = weights[name].detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        # safetensors refuses views of one storage, such as the slices of a larger tensor
        stored[name] = tensor.clone() if storage in storages else tensor
        storages.add(storage)
    content = {**manifest, "versions": versions(), "weights_sha256": weights_hash(weights)}
    metadata = {MANIFEST: json.dumps(content), "format": "pt", **shared} | ({EXTRA: json.dumps(extra)} if extra else {})
    data = save(stored, metadata)
    write_atomically(path, lambda file: file.write(data))


def divided(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split a state dict into its tensors and its other extra state.

    Raises:
        ModelError: if extra state is neither a tensor nor JSON.
    """
    weights = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    extra = {name: value for name, value in state.items() if name not in weights}
    for name, value in extra.items():
        if not is_json(value):
            raise ModelError(
                f"The state dict holds {name}, a {type(value).__name__}, which can be stored neither as a tensor nor "
                "as JSON. Let get_extra_state return a tensor, or numbers, strings, lists and dictionaries of them."
            )
    return weights, extra


def is_json(value: Any) -> bool:
    """Whether a value is unchanged after a round trip through JSON."""
    try:
        return bool(json.loads(json.dumps(value)) == value)
    except (TypeError, ValueError):
        return False


def read_manifest(path: Path) -> dict[str, Any]:
    """What a file says about its network; empty where it was written by another program.

    Raises:
        ModelError: if the file is missing or cannot be read.
    """
    require_file(path)
    with reading(path):
        return dict(json.loads(read_metadata(path).get(MANIFEST, "{}"))) if is_safetensors(path) else {}


def load_model(path: Path | str, *, taps: Sequence[str] | None = None) -> tuple[nn.Module, dict[str, Any]]:
    """A network in eval mode, built and filled from its file alone, and its manifest.

    Args:
        path: of the file.
        taps: names for :func:`dfad.models.taps.with_taps`; None takes those of the manifest. They serve training alone.

    Raises:
        ModelError: if the file does not name an architecture, or its weights do not match their hash.
    """
    path = Path(path)
    manifest = read_manifest(path)
    architecture = manifest.get("architecture", {})
    if not architecture.get("factory"):
        known = architecture.get("class")
        raise ModelError(
            f"The model {path} does not say how its network is built"
            + (f"; it is a {known}, given in Python without a factory" if known else "")
            + ". Name a callable that builds it: --factory package.module:callable (in dfad.train, --teacher.factory) "
            "and, where it needs them, --kwargs; or name a file that dfad.train or dfad.teacher wrote."
        )
    weights = read_weights(path)
    if weights_hash(weights) != manifest.get("weights_sha256"):
        raise ModelError(f"The weights in {path} are not those that its manifest was written for; the file is damaged.")
    names = architecture.get("taps") or () if taps is None else taps
    network = build(architecture["factory"], architecture.get("kwargs"), names)
    fill(network, weights, path)
    return network.eval(), manifest


def weights_hash(state: Mapping[str, Any]) -> str:
    """SHA-256 over the tensors of a state dict: names, dtypes, shapes and values, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(state):
        if not isinstance(state[name], Tensor):
            continue
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
