"""Data sets by name."""

from collections.abc import Callable

from dfad.data.config import DataConfig
from dfad.data.dataset import Dataset
from dfad.data.formats.cifar import read_cifar
from dfad.data.formats.digits import read_digits
from dfad.data.formats.external import read_huggingface, read_torchvision
from dfad.data.formats.folder import read_folder
from dfad.data.formats.idx import read_mnist
from dfad.data.formats.svhn import read_svhn
from dfad.data.formats.webdataset import read_webdataset
from dfad.errors import DataError, unknown

READERS: dict[str, Callable[[DataConfig], Dataset]] = {
    "digits": read_digits,
    "mnist": read_mnist,
    "fashion-mnist": read_mnist,
    "cifar10": read_cifar,
    "cifar100": read_cifar,
    "svhn": read_svhn,
    "folder": read_folder,
    "webdataset": read_webdataset,
    "torchvision": read_torchvision,
    "huggingface": read_huggingface,
}
"""Readers by the part of a name before the first slash."""


def open_dataset(config: DataConfig) -> Dataset:
    """The data set that a configuration names.

    Raises:
        DataError: if it is unknown, missing or damaged.
    """
    kind = config.name.partition("/")[0]
    if kind not in READERS:
        raise DataError(unknown("data set", config.name, READERS))
    return READERS[kind](config)
