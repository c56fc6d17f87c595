"""SVHN: cropped digits of 32×32 pixels in MATLAB files."""

from pathlib import Path

import numpy as np
import torch

from dfad.data.config import DataConfig
from dfad.data.dataset import Dataset
from dfad.data.decoded import DecodedSplit
from dfad.data.download import Remote, fetch, published, require_root
from dfad.errors import DataError, not_installed

REMOTES = (
    Remote("http://ufldl.stanford.edu/housenumbers/train_32x32.mat", "e26dedcc434d2e4c54c9b2d4a06d8373"),
    Remote("http://ufldl.stanford.edu/housenumbers/test_32x32.mat", "eb5a983be6a315427106f1b164d9cef3"),
)

MEAN, STD = (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)


def read_svhn(config: DataConfig) -> Dataset:
    """SVHN without its extra images.

    Raises:
        DataError: if a file is missing or not the official one, or SciPy is not installed.
    """
    root = require_root(config)
    if config.download:
        for remote in REMOTES:
            fetch(remote, root)
    train, test = (_read(published(remote, root)) for remote in REMOTES)
    return Dataset(config.name, tuple("0123456789"), MEAN, STD, train, test)


def _read(path: Path) -> DecodedSplit:
    try:
        from scipy.io import loadmat
    except ImportError:
        raise DataError(f"The data set svhn is read with SciPy. {not_installed('scipy', 'svhn')}") from None
    content = loadmat(path)
    numbers = torch.from_numpy(content["y"].reshape(-1).astype(np.int64))
    numbers[numbers == 10] = 0  # MATLAB counts from 1: the digit 0 is class 10
    return DecodedSplit(torch.from_numpy(content["X"].transpose(3, 2, 0, 1).copy()), numbers, source=str(path))
