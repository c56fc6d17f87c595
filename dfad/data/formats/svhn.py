"""SVHN: cropped digits of 32×32 pixels in MATLAB files."""

from pathlib import Path

import numpy as np
import torch

from dfad.data.config import DataConfig
from dfad.data.dataset import Dataset
from dfad.data.decoded import DecodedSplit
from dfad.data.download import Remote, fetch, require_root
from dfad.data.formats.mat import read_mat
from dfad.errors import DataError

REMOTES = (
    Remote("http://ufldl.stanford.edu/housenumbers/train_32x32.mat", "e26dedcc434d2e4c54c9b2d4a06d8373"),
    Remote("http://ufldl.stanford.edu/housenumbers/test_32x32.mat", "eb5a983be6a315427106f1b164d9cef3"),
)

MEAN, STD = (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)


def read_svhn(config: DataConfig) -> Dataset:
    """SVHN without its extra images."""
    root = require_root(config)
    if config.download:
        for remote in REMOTES:
            fetch(remote, root)
    train, test = (_read(root / remote.name) for remote in REMOTES)
    return Dataset(config.name, tuple("0123456789"), MEAN, STD, train, test)


def _read(path: Path) -> DecodedSplit:
    if not path.is_file():
        raise DataError(f"There is no {path}. Point --data.root at its folder, or let --data.download fetch it there.")
    content = read_mat(path)
    images, labels = content.get("X"), content.get("y")
    if images is None or labels is None or images.ndim != 4 or images.shape[:3] != (32, 32, 3):
        raise DataError(f"{path} holds no X of shape (32, 32, 3, images) with y; it is not the official file.")
    if images.dtype != np.uint8 or labels.size != images.shape[3]:
        raise DataError(f"{path} holds X of {images.dtype} for {images.shape[3]} images and {labels.size} labels in y.")
    numbers = torch.from_numpy(labels.reshape(-1).astype(np.int64))
    numbers[numbers == 10] = 0  # MATLAB counts from 1: the digit 0 is class 10
    return DecodedSplit(torch.from_numpy(images.transpose(3, 2, 0, 1).copy()), numbers, source=str(path))
