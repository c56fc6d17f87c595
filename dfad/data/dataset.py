"""Data sets in memory, independent of the format of their files."""

import hashlib
import logging
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import numpy as np
from torch import Tensor

from dfad.data.config import DataConfig
from dfad.data.decoded import DecodedSplit
from dfad.data.encoded import EncodedSplit
from dfad.errors import DataError, not_installed

log = logging.getLogger(__name__)

STATISTICS_SAMPLE = 10_000
"""Number of evenly spaced images for mean and standard deviation, if these are not published."""

SplitT = TypeVar("SplitT", DecodedSplit, EncodedSplit)

Split = DecodedSplit | EncodedSplit
"""The images and labels for training or for measuring."""


@dataclass(frozen=True)
class Dataset:
    """A data set of labelled images."""

    name: str
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    """Mean per channel over the train split, for pixels in 0–1."""
    std: tuple[float, ...]
    train: Split
    test: Split
    skipped: tuple[str, ...] = ()
    """For each skipped image file, why it cannot be decoded or does not fit; empty unless skipping was requested."""

    def __post_init__(self) -> None:
        for name, split in (("train", self.train), ("test", self.test)):
            if len(split) == 0:
                raise DataError(f"The data set {self.name} holds no {name} images.")
            source = split.source if isinstance(split, DecodedSplit) and split.source else f"{self.name} ({name})"
            check_labels(split.labels, len(self.classes), source)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """``(channels, height, width)``."""
        return self.test.image_shape

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over classes, and content and labels of both splits in order: equal data, equal fingerprint."""
        digest = hashlib.sha256("\n".join(self.classes).encode(errors="surrogateescape"))
        for split in (self.train, self.test):
            digest.update(split.content_hash())
        return digest.hexdigest()


def check_labels(labels: Tensor, classes: int, source: str) -> None:
    """Check that labels are in ``range(classes)``.

    Raises:
        DataError: naming the first invalid label and its position.
    """
    wrong = ((labels < 0) | (labels >= classes)).nonzero()
    if len(wrong):
        index = int(wrong[0])
        raise DataError(
            f"{source}: label {int(labels[index])} of image {index} is out of range; there are {classes} classes, "
            f"0 to {classes - 1}. The file is damaged, or belongs to another data set."
        )


def statistics(split: Split) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel, of pixels in 0–1."""
    step = -(-len(split) // STATISTICS_SAMPLE)
    images = split.subset(range(0, len(split), step)).decoded().images.double() / 255
    mean, std = images.mean((0, 2, 3)), images.std((0, 2, 3), correction=0)
    # a constant channel carries no information; dividing by its deviation of zero would give NaN
    return tuple(mean.tolist()), tuple(std.clamp_min(1e-3).tolist())


def from_encoded(config: DataConfig, classes: tuple[str, ...], train: EncodedSplit, test: EncodedSplit) -> Dataset:
    """A data set of image files, without those that cannot be decoded if skipping was requested."""
    skipped: tuple[str, ...] = ()
    if config.skip_corrupt:
        train, train_skipped = train.without_corrupt()
        test, test_skipped = test.without_corrupt()
        skipped = train_skipped + test_skipped
        for reason in skipped:
            log.warning("Skipped: %s", reason)
        log.info("%s: %d corrupt files were skipped.", config.name, len(skipped))
    return Dataset(config.name, classes, *statistics(train), train, test, skipped)


def divide(split: SplitT, test_fraction: float, source: str) -> tuple[SplitT, SplitT]:
    """A fixed, stratified division of the images into train and test.

    Raises:
        DataError: if a class has too few images to be in both, or scikit-learn is not installed.
    """
    try:
        from sklearn.model_selection import train_test_split
    except ImportError:
        need = not_installed("scikit-learn", "images")
        raise DataError(f"{source} is divided into train and test images by scikit-learn. {need}") from None
    indices = np.arange(len(split))
    try:
        train, test = train_test_split(indices, test_size=test_fraction, stratify=split.labels.numpy(), random_state=0)
    except ValueError as error:
        raise DataError(
            f"{source} cannot be divided into train and test images of every class: {error} Add images, or give train/ "
            "and test/ folders."
        ) from None
    return split.subset(sorted(train.tolist())), split.subset(sorted(test.tolist()))
