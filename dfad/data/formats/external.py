"""Data sets of torchvision and Hugging Face, if those packages are installed."""

import importlib
import inspect
import os
from collections.abc import Iterable
from types import ModuleType
from typing import Any

import numpy as np
import torch

from dfad.data.config import DataConfig
from dfad.data.dataset import Dataset, divide, statistics
from dfad.data.decoded import DecodedSplit
from dfad.data.download import require_root
from dfad.data.formats.folder import TEST_NAMES
from dfad.data.pixels import brightest, eight_bits, pillow, require_bright
from dfad.errors import DataError, nearest


def read_torchvision(config: DataConfig) -> Dataset:
    """``torchvision/CLASS``: a classification data set of torchvision, by the name of its class."""
    module = _import("torchvision.datasets", config)
    name = config.name.partition("/")[2]
    kind = getattr(module, name, None)
    if kind is None:
        raise DataError(f"torchvision has no data set {name!r}.{nearest(name, dir(module))}")
    root = require_root(config)
    parameters = inspect.signature(kind).parameters
    choices: list[dict[str, Any]]
    if "train" in parameters:
        choices = [{"train": True}, {"train": False}]
    elif "split" in parameters:
        choices = [{"split": "train"}, {"split": "test"}]
    else:
        choices = [{}]
    if "download" in parameters:
        choices = [{**choice, "download": config.download} for choice in choices]
    try:
        sources = [kind(str(root), **choice) for choice in choices]
    except Exception as error:  # torchvision raises RuntimeError and other errors for missing and damaged files
        raise DataError(f"torchvision cannot open {name} in {root}: {error}") from None
    splits = [_decode(source, f"{config.name} in {root}", config.bits) for source in sources]
    train, test = splits if len(splits) == 2 else divide(splits[0], config.test_fraction, config.name)
    classes = getattr(sources[0], "classes", None) or range(int(train.labels.max()) + 1)
    return Dataset(config.name, tuple(map(str, classes)), *statistics(train), train, test)


def read_huggingface(config: DataConfig) -> Dataset:
    """``huggingface/PATH``: a data set of the Hub; or, with a root, one that ``save_to_disk`` wrote there."""
    if not config.download:
        # must be set before the import; the package's option for local files still contacts the Hub
        os.environ["HF_HUB_OFFLINE"] = "1"
    datasets = _import("datasets", config)
    if not (config.download or config.root or datasets.config.HF_HUB_OFFLINE):
        raise DataError(
            f"{config.name} would be looked for on the network, because the package datasets was imported before. Give "
            "--data.download, or set HF_HUB_OFFLINE=1 before the program starts."
        )
    path = config.name.partition("/")[2]
    try:
        loaded = datasets.load_from_disk(str(config.root)) if config.root else datasets.load_dataset(path)
    except Exception as error:  # many kinds of errors: missing files, no network, damaged tables
        raise DataError(
            f"Hugging Face cannot open {config.root or path}: {error} Without --data.download only its cache is used."
        ) from None
    parts = dict(loaded) if isinstance(loaded, dict) else {"train": loaded}
    test_name = next((name for name in TEST_NAMES if name in parts), None)
    if "train" not in parts:
        raise DataError(f"{config.name} has no split 'train'; there are: {', '.join(parts)}.")
    features = parts["train"].features
    image_column = _column(features, "Image", config)
    label_column = _column(features, "ClassLabel", config)
    names = ("train", test_name) if test_name else ("train",)
    splits = [
        _decode(((row[image_column], row[label_column]) for row in parts[name]), f"{config.name} ({name})", config.bits)
        for name in names
    ]
    train, test = splits if test_name else divide(splits[0], config.test_fraction, config.name)
    return Dataset(config.name, tuple(features[label_column].names), *statistics(train), train, test)


def _import(module: str, config: DataConfig) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise DataError(
            f"The data set {config.name} needs the package {package}, which cannot be imported ({error}). Install it, "
            "or use a data set that does not need it."
        ) from None


def _column(features: Any, kind: str, config: DataConfig) -> str:
    for name, feature in features.items():
        if type(feature).__name__ == kind:
            return str(name)
    raise DataError(f"{config.name} has no column of kind {kind}; its columns are {', '.join(features)}.")


def _decode(samples: Iterable[tuple[Any, int]], source: str, bits: int | None) -> DecodedSplit:
    arrays: list[np.ndarray] = []
    labels: list[int] = []
    deep: list[int] = []
    for index, (image, label) in enumerate(samples):
        if isinstance(image, pillow().Image):
            if bits is None and (value := brightest(image)) is not None:
                deep.append(value)
            image = eight_bits(image, f"{source}: image {index}", bits)
        array = np.asarray(image)
        if arrays and array.shape != arrays[0].shape:
            raise DataError(
                f"{source}: image {index} has shape {array.shape}, image 0 {arrays[0].shape}; all must have the same."
            )
        arrays.append(array)
        labels.append(int(label))
    if not arrays:
        raise DataError(f"{source} holds no images.")
    require_bright(deep, source)
    if arrays[0].dtype != np.uint8 or arrays[0].ndim not in (2, 3):
        raise DataError(f"{source} holds arrays of {arrays[0].dtype}, {arrays[0].shape}; images of bytes are needed.")
    images = torch.from_numpy(np.stack(arrays))
    images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()
    return DecodedSplit(images, torch.tensor(labels), source=source)
