"""Networks as files that explain themselves: weights and a manifest in one safetensors file."""

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from dfad.errors import ModelError
from dfad.files import write_atomically
from dfad.models.factory import build
from dfad.models.weights import fill, read_weights

MANIFEST = "manifest"
"""Name of the manifest among a file's metadata."""


def save_model(path: Path, state: Mapping[str, Tensor], manifest: Mapping[str, Any]) -> None:
    """Write weights and what is known about them, so that the file alone suffices to use the network.

    Args:
        path: a ``.safetensors`` file, replaced in one step.
        state: the network's state dict.
        manifest: JSON values; ``architecture`` holds ``factory``, ``kwargs`` and optionally ``taps``. Versions and a
            hash of the weights are added.
    """
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    content = {**manifest, "versions": versions(), "weights_sha256": weights_hash(weights)}
    data = save(weights, {MANIFEST: json.dumps(content), "format": "pt"})
    write_atomically(path, lambda file: file.write(data))


def read_manifest(path: Path) -> dict[str, Any]:
    """What a file says about its network; empty where it was written by another program.

    Raises:
        ModelError: if the file is missing or cannot be read.
    """
    if path.suffix != ".safetensors":
        return {}
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(MANIFEST, "{}")
        return dict(json.loads(text))
    except FileNotFoundError:
        raise ModelError(f"The model {path} does not exist. Name a safetensors file.") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"The model {path} cannot be read; it is truncated or damaged: {error}.") from None


def load_model(path: Path) -> tuple[nn.Module, dict[str, Any]]:
    """A network in eval mode, built and filled from its file alone, and its manifest.

    Raises:
        ModelError: if the file tells no architecture, or its weights are not those that were written.
    """
    manifest = read_manifest(path)
    architecture = manifest.get("architecture", {})
    if not architecture.get("factory"):
        raise ModelError(
            f"The model {path} does not tell its architecture. Name a file that dfad.train or dfad.teacher wrote, or "
            "give the architecture with --factory and, where it needs them, --kwargs."
        )
    weights = read_weights(path)
    if weights_hash(weights) != manifest.get("weights_sha256"):
        raise ModelError(f"The weights in {path} are not those that its manifest was written for; the file is damaged.")
    network = build(architecture["factory"], architecture.get("kwargs"), architecture.get("taps") or ())
    fill(network, weights, path)
    return network.eval(), manifest


def weights_hash(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and values, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Of what a result depends on."""
    packages = {name: importlib.metadata.version(name) for name in ("torch", "numpy")}
    return {"dfad": _own_version(), "python": platform.python_version(), **packages}


def _own_version() -> str:
    try:
        return importlib.metadata.version("dfad")
    except importlib.metadata.PackageNotFoundError:  # run from a folder, not installed
        return "not installed"
