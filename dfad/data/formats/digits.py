"""scikit-learn's handwritten digits: 8×8 images that need no download."""

import torch

from dfad.data.config import DataConfig
from dfad.data.dataset import Dataset, divide, statistics
from dfad.data.decoded import DecodedSplit
from dfad.errors import DataError, not_installed

TEST_FRACTION = 0.2


def read_digits(config: DataConfig) -> Dataset:
    """1,797 greyscale images of 8×8 pixels; a fixed, stratified fifth of them is held out.

    Raises:
        DataError: if scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        need = not_installed("scikit-learn", "demo")
        raise DataError(f"The data set digits is part of scikit-learn. {need}") from None
    bunch = load_digits()
    pixels = torch.from_numpy(bunch.images * (255 / 16)).round().to(torch.uint8)  # pixel values are 0 to 16
    everything = DecodedSplit(pixels[:, None], torch.from_numpy(bunch.target).long())
    train, test = divide(everything, TEST_FRACTION, "digits")
    mean, std = statistics(train)
    return Dataset("digits", tuple("0123456789"), mean, std, train, test)
