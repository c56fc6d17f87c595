"""MNIST and Fashion-MNIST: the IDX format of LeCun et al."""

import gzip
import math
import struct
from pathlib import Path

import torch
from torch import Tensor

from dfad.data.config import DataConfig
from dfad.data.dataset import Dataset
from dfad.data.decoded import DecodedSplit
from dfad.data.download import Remote, fetch, require_root
from dfad.data.files import damage_reported
from dfad.errors import DataError

UNSIGNED_BYTE = 0x08
"""Type code of unsigned bytes, the only one for images and labels."""

SIDE = 28

PREFIXES = {"train": "train", "test": "t10k"}

_MNIST = "https://ossci-datasets.s3.amazonaws.com/mnist/"
_FASHION = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"

REMOTES = {
    "mnist": (
        Remote(_MNIST + "train-images-idx3-ubyte.gz", "f68b3c2dcbeaaa9fbdd348bbdeb94873"),
        Remote(_MNIST + "train-labels-idx1-ubyte.gz", "d53e105ee54ea40749a09fcbcd1e9432"),
        Remote(_MNIST + "t10k-images-idx3-ubyte.gz", "9fb629c4189551a2d022fa330f9573f3"),
        Remote(_MNIST + "t10k-labels-idx1-ubyte.gz", "ec29112dd5afa0611ce80d1b7f02629c"),
    ),
    "fashion-mnist": (
        Remote(_FASHION + "train-images-idx3-ubyte.gz", "8d4fb7e6c68d591d4c3dfef9ec88bf0d"),
        Remote(_FASHION + "train-labels-idx1-ubyte.gz", "25c81989df183df01b3e8a0aad5dffbe"),
        Remote(_FASHION + "t10k-images-idx3-ubyte.gz", "bef4ecab320f06d8554ea6380940ec79"),
        Remote(_FASHION + "t10k-labels-idx1-ubyte.gz", "bb300cfdad3c16e7a12a480ee83cd310"),
    ),
}

CLASSES = {
    "mnist": tuple("0123456789"),
    "fashion-mnist": (
        "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
    ),
}  # fmt: skip

STATISTICS = {"mnist": ((0.1307,), (0.3081,)), "fashion-mnist": ((0.2860,), (0.3530,))}
"""Mean and standard deviation commonly used in the field."""


def read_mnist(config: DataConfig) -> Dataset:
    """MNIST, or Fashion-MNIST in the same format; gzipped or not."""
    root = require_root(config)
    if config.download:
        for remote in REMOTES[config.name]:
            fetch(remote, root)
    mean, std = STATISTICS[config.name]
    train, test = (_read_split(config, root, prefix) for prefix in PREFIXES.values())
    return Dataset(config.name, CLASSES[config.name], mean, std, train, test)


def _read_split(config: DataConfig, root: Path, prefix: str) -> DecodedSplit:
    image_path = _find(config, root, f"{prefix}-images-idx3-ubyte")
    label_path = _find(config, root, f"{prefix}-labels-idx1-ubyte")
    images, labels = read_idx(image_path, 3), read_idx(label_path, 1)
    if images.shape[1:] != (SIDE, SIDE):
        raise DataError(f"{image_path} holds images of {images.shape[1]}×{images.shape[2]} pixels; 28×28 are needed.")
    if len(images) != len(labels):
        raise DataError(f"{image_path} holds {len(images)} images, but {label_path} {len(labels)} labels.")
    return DecodedSplit(images[:, None], labels.long(), source=str(label_path))


def _find(config: DataConfig, root: Path, name: str) -> Path:
    for folder in (root, root / config.name, root / "raw", root / "MNIST" / "raw", root / "FashionMNIST" / "raw"):
        for path in (folder / name, folder / f"{name}.gz"):
            if path.is_file():
                return path
    raise DataError(
        f"{root} holds neither {name} nor {name}.gz. Point --data.root at the folder of the four IDX files of "
        f"{config.name}, or download them with --data.download."
    )


def read_idx(path: Path, dimensions: int) -> Tensor:
    """An array of unsigned bytes.

    Args:
        path: an IDX file; gzipped if its name ends in .gz.
        dimensions: required number.

    Raises:
        DataError: if it is damaged, truncated, longer than its header says, or in another format.
    """
    with damage_reported(path), gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        content = file.read()
    magic = bytes([0, 0, UNSIGNED_BYTE, dimensions])
    header = len(magic) + 4 * dimensions
    if content[: len(magic)] != magic:
        raise DataError(
            f"{path} begins with the bytes {content[: len(magic)].hex(' ') or '(none)'} at offset 0, but needs "
            f"{magic.hex(' ')}: an IDX file of unsigned bytes in {dimensions} dimensions. It has another format."
        )
    if len(content) < header:
        raise DataError(
            f"{path} ends at offset {len(content)}, inside its header of {header} bytes. Download it again."
        )
    shape = struct.unpack_from(f">{dimensions}I", content, len(magic))
    if len(content) != header + math.prod(shape):
        raise DataError(
            f"{path} announces {shape} bytes, {header + math.prod(shape)} with its header, but its content ends at "
            f"offset {len(content)}. Download it again."
        )
    if not math.prod(shape):
        raise DataError(f"{path} announces {shape} bytes: it is empty.")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=header).view(shape)
