"""Networks by source: a hub's name, a factory, a folder or a file."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dfad import models
from dfad.errors import ModelError
from dfad.models.exported import is_exported, load_exported, normalisation_of
from dfad.models.factory import build
from dfad.models.hubs import hub_of
from dfad.models.likeness import require_origin
from dfad.models.model_file import load_model, read_manifest
from dfad.models.outputs import Outputs
from dfad.models.probing import Images, answer_to_blanks, channels_of, declared_images, image_shape_of
from dfad.models.taps import with_taps
from dfad.models.weights import WEIGHT_FILES, load_weights, require_file
from dfad.models.wrappers import LogitsAlone
from dfad.modes import set_mode

PROGRAM = ".pt2"

SOURCES = (
    "timm:NAME, torchvision:NAME, hf:FOLDER-or-NAME, package.module:callable, the bare name of a network of "
    "dfad.models, or a file that holds a network: one of this project, or a program of torch.export (.pt2)"
)


@dataclass(frozen=True)
class Loaded:
    """A network with information from its source."""

    network: nn.Module
    trained: bool
    """Whether its weights came from a file; False for a network from a callable, which may be trained or not."""
    image_shape: tuple[int, int, int] | None = None
    """``(channels, height, width)``, if a file of this project, of its network or its weights, or a program says so."""
    images: Images = field(default_factory=Images)
    manifest: Mapping[str, Any] = field(default_factory=dict)
    """Manifest of a file that this project wrote, of the network or of its weights; empty for others."""
    exported: bool = False
    """Whether it is a program of ``torch.export``, which has a single mode and cannot be trained."""


def load_network(
    source: str,
    checkpoint: Path | str | None = None,
    *,
    checkpoint_key: str | None = None,
    kwargs: Mapping[str, Any] | None = None,
    taps: Sequence[str] = (),
) -> nn.Module:
    """A network in eval mode, from a name, a factory, a folder or a file; nothing is downloaded.

    A network that returns a tuple, a mapping or an object with logits is wrapped, and returns them alone.

    Args:
        source: ``timm:NAME``, ``torchvision:NAME``, ``hf:FOLDER-or-NAME``, ``package.module:callable``, a bare name of
            :mod:`dfad.models`, or a file that holds a network: one of this project, or a program of ``torch.export``.
        checkpoint: its weights: safetensors, or a state dict written by ``torch.save``. Without one, those that the
            source itself has: of a hub, the published ones, where its client has them on this machine; of a callable,
            what it returns.
        checkpoint_key: entry of a larger checkpoint that holds them.
        kwargs: keyword arguments of the factory.
        taps: names for :func:`dfad.models.taps.with_taps`.

    Raises:
        ModelError: if it cannot be built or filled, or returns no logits.
    """
    loaded = load(source, checkpoint, checkpoint_key=checkpoint_key, kwargs=kwargs, taps=taps)
    set_mode(loaded.network, training=False)
    if isinstance(loaded.network, LogitsAlone):
        return loaded.network
    answer = answer_to_blanks(loaded.network, shape_of(loaded))
    return loaded.network if isinstance(answer, (Tensor, Outputs)) else LogitsAlone(loaded.network)


def load(
    source: str,
    checkpoint: Path | str | None = None,
    *,
    checkpoint_key: str | None = None,
    kwargs: Mapping[str, Any] | None = None,
    taps: Sequence[str] = (),
    pretrained: bool = True,
) -> Loaded:
    """Like :func:`load_network`, with information about the network's images.

    Args:
        source: as there.
        checkpoint: as there.
        checkpoint_key: as there.
        kwargs: as there.
        taps: as there.
        pretrained: without a checkpoint, use a hub's published weights instead of random ones.
    """
    arguments = dict(kwargs or {})
    file, given = file_of(source), None if checkpoint is None else Path(checkpoint)
    if file is None:
        return _built(source, given, checkpoint_key, arguments, taps, pretrained=pretrained)
    if is_exported(file):
        _refuse_extras(source, "weights", given, arguments)
        return _program(file, taps)
    _refuse_extras(source, "keyword arguments", None, arguments)
    network, manifest = load_model(file, taps=tuple(taps) or None)
    if given is not None:
        load_weights(network, given, checkpoint_key)
        if own := read_manifest(given):
            manifest, file = own, given
    return Loaded(network, True, *_images_of(manifest, file), manifest)


def _program(file: Path, taps: Sequence[str]) -> Loaded:
    network, size = load_exported(file)
    shape = (size[0], size[1], size[2]) if len(size) == 3 else None
    images = Images(None, *normalisation_of(file), f"the file {file}")
    return Loaded(_tapped(network, taps), True, shape, images, exported=True)


def _built(
    source: str,
    checkpoint: Path | None,
    checkpoint_key: str | None,
    arguments: dict[str, Any],
    taps: Sequence[str],
    *,
    pretrained: bool,
) -> Loaded:
    """A network of a hub or a factory."""
    found = hub_of(source)
    published = found is not None and checkpoint is None and pretrained
    network = _published(source, arguments) if published else build(source, arguments)
    images = found[0].images(found[1], network) if found else declared_images(network)
    if images.mean and channels_of(network) not in (None, len(images.mean)):  # built for other images than published
        images = replace(images, mean=(), std=())
    if checkpoint is None:
        return Loaded(_tapped(network, taps), published, images=images)
    load_weights(network, checkpoint, checkpoint_key)
    require_origin(network, checkpoint, source, arguments)
    manifest = read_manifest(checkpoint)
    shape, recorded = _images_of(manifest, checkpoint)
    # what the weights were trained on says more than what the network is usually given
    images = recorded if recorded.mean else replace(images, size=None if shape else images.size)
    return Loaded(_tapped(network, taps), True, shape, images, manifest)


def _published(source: str, arguments: dict[str, Any]) -> nn.Module:
    """A hub's network with its published weights."""
    found = hub_of(source)
    assert found is not None
    hub, name = found
    try:
        return hub.trained(name, arguments)
    except ModelError:
        raise
    except Exception as error:  # packages raise various errors for their arguments
        raise ModelError(f"{source} called with {arguments} failed: {type(error).__name__}: {error}.") from error


def _images_of(manifest: Mapping[str, Any], file: Path) -> tuple[tuple[int, int, int] | None, Images]:
    """``(channels, height, width)`` and normalisation of a network's images, as far as its manifest contains them."""
    shape = manifest.get("image_shape")
    images = Images(None, tuple(manifest.get("mean") or ()), tuple(manifest.get("std") or ()), f"the file {file}")
    return (shape[0], shape[1], shape[2]) if shape else None, images


def load_trained(source: str) -> Loaded:
    """A network with the weights that its source has.

    Raises:
        ModelError: if it has none: a callable may return random ones.
    """
    if not has_weights(source):
        lack = f"{source} has no weights of its own" if ":" in source else f"There is no file {source}"
        raise ModelError(
            f"{lack}. Name a file, or a network whose weights are published; with dfad evaluate, give the file as "
            "--model and what builds the network as --factory."
        )
    return load(source)


def _tapped(network: nn.Module, taps: Sequence[str]) -> nn.Module:
    return with_taps(network, taps) if taps else network


def _refuse_extras(source: str, what: str, checkpoint: object, arguments: Mapping[str, Any]) -> None:
    if checkpoint is not None or arguments:
        raise ModelError(
            f"{source} holds its network whole; it takes no {what} ({checkpoint or dict(arguments)}) from elsewhere. "
            "Leave them out, or name what builds the network."
        )


def has_weights(source: str) -> bool:
    """Whether a source should come with weights: a hub's name, or a file."""
    return hub_of(source) is not None or file_of(source) is not None


def file_of(source: str) -> Path | None:
    """The file of a source; None for other kinds of sources.

    Raises:
        ModelError: if it is a folder, or is written as a file's name and there is none, or holds no network.
    """
    path = Path(source)
    if hub_of(source) is not None or source in models.__all__:
        return None
    written_so = ":" not in source and (path.suffix in (PROGRAM, *WEIGHT_FILES) or os.sep in source)
    if not path.exists() and not written_so:
        return None
    if (path / "config.json").is_file():
        raise ModelError(f"{source} is a folder with a network of Hugging Face. Name it hf:{source}.")
    require_file(path)
    return path


def architecture_of(source: str, kwargs: Mapping[str, Any], taps: Sequence[str] = ()) -> dict[str, Any]:
    """The architecture for a manifest; for a file, the one of the file."""
    file = file_of(source)
    if file is not None and not is_exported(file):
        architecture = dict(read_manifest(file).get("architecture", {}))
        return architecture | ({"taps": list(taps)} if taps else {})
    return {"factory": source, "kwargs": dict(kwargs), "taps": taps}


def shape_of(
    loaded: Loaded, channels: int | None = None, image_size: int | tuple[int, int] | None = None
) -> tuple[int, int, int]:
    """``(channels, height, width)`` of a network's images: as given, else from its file or source, else found by trial.

    Raises:
        ModelError: if the network takes no such images.
    """
    if loaded.image_shape is None:
        return image_shape_of(loaded.network, channels, image_size or loaded.images.size)
    own_channels, *own_size = loaded.image_shape
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size or own_size
    return channels or own_channels, height, width
