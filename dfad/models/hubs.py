"""Networks of timm, torchvision and Hugging Face by name, with weights if their files are on this machine.

Nothing is downloaded: if a file is missing, the message says how to download it with the owner's client.
"""

import importlib
import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from torch import nn

from dfad.errors import ModelError, first_line, nearest
from dfad.models.exported import weights_alone
from dfad.models.probing import Images, channels_of, declared_images
from dfad.models.weights import read_weights, reading
from dfad.models.wrappers import LogitsAlone

log = logging.getLogger(__name__)


class Hub(ABC):
    """A package that builds networks by name."""

    package: str

    def import_package(self, module: str = "") -> Any:
        """The package, or a module of it.

        Raises:
            ModelError: if it is not installed, or does not fit this PyTorch.
        """
        try:
            return importlib.import_module(module or self.package)
        except ModuleNotFoundError as error:
            raise ModelError(
                f"{self.package} is not installed ({first_line(error)}). Install it with: pip install {self.package}."
            ) from None
        except Exception as error:  # a build for another PyTorch may raise anything
            raise ModelError(
                f"{self.package} cannot be imported: {type(error).__name__}: {first_line(error)}. Install the version "
                f"of it, and of what it needs, that is made for PyTorch {torch.__version__}."
            ) from None

    @abstractmethod
    def build(self, name: str, kwargs: Mapping[str, Any]) -> nn.Module:
        """A network with random weights."""

    @abstractmethod
    def trained(self, name: str, kwargs: Mapping[str, Any]) -> nn.Module:
        """A network with the published weights.

        Raises:
            ModelError: if their file is not on this machine, or does not fill the whole network.
        """

    @abstractmethod
    def images(self, name: str, network: nn.Module) -> Images:
        """A network's images, from the hub's own configuration."""

    @abstractmethod
    def names(self) -> Sequence[str]:
        """Names of all networks."""


class Timm(Hub):
    """``timm:NAME``, such as ``timm:resnet18.a1_in1k``."""

    package = "timm"

    def build(self, name: str, kwargs: Mapping[str, Any]) -> nn.Module:
        timm = self._timm(name)
        return timm.create_model(name, pretrained=False, **kwargs)

    def trained(self, name: str, kwargs: Mapping[str, Any]) -> nn.Module:
        timm = self._timm(name)
        published = timm.get_pretrained_cfg(name)
        repository, url = getattr(published, "hf_hub_id", None), getattr(published, "url", None)
        file = getattr(published, "hf_hub_filename", None) or "pytorch_model.bin"
        found = (repository and _in_hugging_face_cache(repository, "model.safetensors", file)) or _in_torch_hub(url)
        if found is None:
            where = repository and f"hf download {repository} model.safetensors"
            raise _not_here(f"timm:{name}", where or url)
        _require_published_classes(f"timm:{name}", kwargs.get("num_classes"), published.num_classes)
        weights = read_weights(found)
        network = timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"state_dict": weights}, **kwargs)
        network.pretrained_cfg.pop("state_dict", None)
        return network

    def images(self, name: str, network: nn.Module) -> Images:
        return declared_images(network)

    def names(self) -> Sequence[str]:
        return self.import_package().list_models()

    def _timm(self, name: str) -> Any:
        timm = self.import_package()
        if not timm.is_model(name):
            raise _unknown(self, name)
        return timm


class Torchvision(Hub):
    """``torchvision:NAME``, such as ``torchvision:resnet18``."""

    package = "torchvision"

    def build(self, name: str, kwargs: Mapping[str, Any]) -> nn.Module:
        return self._models(name).get_model(name, weights=None, **kwargs)

    def trained(self, name: str, kwargs: Mapping[str, Any]) -> nn.Module:
        models = self._models(name)
        kinds = models.get_model_weights(name)
        default = getattr(kinds, "DEFAULT", None)
        candidates = [*([default] if default else []), *(kind for kind in kinds if kind is not default)]
        for weights in candidates:
            file = _in_torch_hub(weights.url)
            if file is not None:
                _require_published_classes(
                    f"torchvision:{name}", kwargs.get("num_classes"), len(weights.meta["categories"])
                )
                log.info("torchvision:%s has the weights %s.", name, weights)
                with weights_alone(), reading(file):
                    return models.get_model(name, weights=weights, **kwargs)
        raise _not_here(f"torchvision:{name}", default.url if default else None)

    def images(self, name: str, network: nn.Module) -> Images:
        default = getattr(self._models(name).get_model_weights(name), "DEFAULT", None)
        if default is None:
            return Images()
        try:
            (crop,) = set(default.transforms().crop_size)
            size = (int(crop), int(crop))
            mean, std = (tuple(map(float, getattr(default.transforms(), key))) for key in ("mean", "std"))
        except (AttributeError, TypeError, ValueError):  # not every transformation is for a classifier
            return Images()
        return Images(size, mean, std, origin=f"torchvision's configuration of {default}")

    def names(self) -> Sequence[str]:
        return self.import_package("torchvision.models").list_models()

    def _models(self, name: str) -> Any:
        models = self.import_package("torchvision.models")
        if name not in models.list_models():
            raise _unknown(self, name)
        return models


class HuggingFace(Hub):
    """``hf:FOLDER-or-NAME``: a folder of ``save_pretrained``, or a name whose files are in the Hub's cache."""

    package = "transformers"

    def build(self, name: str, kwargs: Mapping[str, Any]) -> nn.Module:
        transformers = self.import_package()
        network = transformers.AutoModelForImageClassification.from_config(
            self._config(name, kwargs), trust_remote_code=False
        )
        return LogitsAlone(network)

    def trained(self, name: str, kwargs: Mapping[str, Any]) -> nn.Module:
        config = self._config(name, kwargs)
        classifier = self.import_package().AutoModelForImageClassification
        try:
            with weights_alone():
                network, report = classifier.from_pretrained(
                    name, config=config, local_files_only=True, trust_remote_code=False, output_loading_info=True
                )
        except Exception as error:  # the files may be anything
            raise ModelError(
                f"The weights of hf:{name} cannot be read: {type(error).__name__}: {first_line(error)}. Nothing is "
                f"downloaded by this program. {self._remedy(name)}"
            ) from None
        lacking = [*report.get("missing_keys", ()), *(entry[0] for entry in report.get("mismatched_keys", ()))]
        if lacking:
            raise ModelError(
                f"The weights of hf:{name} do not fill a {type(network).__name__}: {len(lacking)} are missing or of "
                f"another shape, first {min(lacking)}, and would be random. Name a network that is trained to classify."
            )
        return LogitsAlone(network)

    def images(self, name: str, network: nn.Module) -> Images:
        path = _file_of(name, "preprocessor_config.json")
        if path is None:
            return Images()
        try:
            said = json.loads(path.read_text(encoding="utf-8"))
            size = _hugging_face_size(said)
            mean, std = _hugging_face_normalisation(said, channels_of(network) or 3)
        except (OSError, ValueError, TypeError) as error:
            raise ModelError(f"{path} cannot be read: {first_line(error)}. Download it again.") from None
        return Images(size, mean, std, f"{path.name} of hf:{name}")

    def names(self) -> Sequence[str]:
        return ()

    def _config(self, name: str, kwargs: Mapping[str, Any]) -> Any:
        transformers = self.import_package()
        kwargs = {"num_labels" if key == "num_classes" else key: value for key, value in kwargs.items()}
        folder = Path(name)
        if folder.is_dir() and not (folder / "config.json").is_file():
            files = sorted(path.name for path in folder.iterdir())
            raise ModelError(
                f"The folder {name} holds no config.json"
                + (f", but {', '.join(files[:5])}" if files else "; it is empty")
                + ". Needed is a folder that save_pretrained of a network and of its image processor wrote."
            )
        try:
            return transformers.AutoConfig.from_pretrained(
                name, local_files_only=True, trust_remote_code=False, **kwargs
            )
        except Exception as error:  # whatever the configuration says
            if "trust_remote_code" in str(error):
                raise ModelError(
                    f"hf:{name} is built by code of its own, which this program does not run. Name what builds the "
                    "network, as package.module:callable, with model.safetensors of that folder as its checkpoint."
                ) from None
            raise ModelError(
                f"hf:{name} is neither a folder with a network nor in the Hugging Face cache, or its configuration "
                f"cannot be used here: {type(error).__name__}: {first_line(error)}. Nothing is downloaded by this "
                f"program. {self._remedy(name)}"
            ) from None

    @staticmethod
    def _remedy(name: str) -> str:
        if Path(name).is_dir():
            return "Save the network into that folder again, with save_pretrained."
        return f"Download it once, with: hf download {name}."


HUBS: dict[str, Hub] = {"timm": Timm(), "torchvision": Torchvision(), "hf": HuggingFace()}
"""Hubs by the part of a source before the colon."""


def hub_of(source: str) -> tuple[Hub, str] | None:
    """The hub that a source names, and the network's name there; None for a source of another kind."""
    prefix, colon, name = source.partition(":")
    if not colon or prefix not in HUBS:
        return None
    if prefix == "timm" and name == "create_model":  # the package's own factory, as package.module:callable
        return None
    return HUBS[prefix], name


def _unknown(hub: Hub, name: str) -> ModelError:
    names = hub.names()
    return ModelError(
        f"{hub.package} has no network {name!r}.{nearest(name, names)} It has {len(names)}: "
        f"{hub.package}.{'models.' if hub.package == 'torchvision' else ''}list_models()."
    )


def _not_here(source: str, where: str | None) -> ModelError:
    way = f" Their file is not on this machine; bring it here once, with: {where}." if where else ""
    if where and where.startswith("http"):
        way = f" Their file is not on this machine; download {where} into {_torch_hub_folder()}."
    return ModelError(
        f"There are no weights for {source}.{way or ' None are published.'} Nothing is downloaded by this program. Or "
        "give weights of your own: --teacher.checkpoint FILE; to dfad evaluate, as --model FILE --factory SOURCE."
    )


def _require_published_classes(source: str, asked: int | None, published: int) -> None:
    if asked is not None and asked != published:
        raise ModelError(
            f"The published weights of {source} are for {published} classes, and {asked} are asked for: its last layer "
            "would be random. Give weights that are trained for them: --teacher.checkpoint FILE."
        )


def _torch_hub_folder() -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints"


def _in_torch_hub(url: str | None) -> Path | None:
    path = _torch_hub_folder() / Path(urlparse(url or "").path).name
    return path if url and path.is_file() else None


def _in_hugging_face_cache(repository: str, *files: str) -> Path | None:
    try:
        hub = importlib.import_module("huggingface_hub")
    except ImportError:
        return None
    for file in files:
        found = hub.try_to_load_from_cache(repository, file)
        if isinstance(found, str):  # not the marker that the Hub has no such file
            return Path(found)
    return None


def _file_of(name: str, file: str) -> Path | None:
    if Path(name).is_dir():
        path = Path(name) / file
        return path if path.is_file() else None
    return _in_hugging_face_cache(name, file)


def _hugging_face_normalisation(said: Mapping[str, Any], channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel, for pixels in 0–1, of what an image processor returns."""
    scale = 255 * float(said.get("rescale_factor") or 1 / 255) if said.get("do_rescale", True) else 255.0
    mean, std = (said.get(key) or () for key in ("image_mean", "image_std"))
    if not said.get("do_normalize", True):
        mean, std = [0.0] * channels, [1.0] * channels
    return tuple(float(value) / scale for value in mean), tuple(float(value) / scale for value in std)


def _hugging_face_size(said: Mapping[str, Any]) -> tuple[int, int] | None:
    """Height and width after an image processor."""
    size = said.get("crop_size") if said.get("do_center_crop") else None
    size = size or said.get("size")
    if isinstance(size, int):
        return size, size
    if isinstance(size, Mapping):
        if "height" in size and "width" in size:
            return int(size["height"]), int(size["width"])
        if isinstance(side := size.get("shortest_edge"), int):
            return side, side
    return None
