"""The choice of a data set, its location, and how it is read."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dfad.validation import positive, require

Backend = Literal["auto", "native", "dali"]


@dataclass(frozen=True)
class DataConfig:
    """A data set for training a teacher or for measuring; distillation never uses it."""

    name: str = "digits"
    """One of digits, mnist, fashion-mnist, cifar10, cifar100, svhn, folder, webdataset, torchvision/…, huggingface/…"""

    root: Path | None = None
    """Folder or archive that holds it."""

    download: bool = False
    """Download it into root if it is not there yet."""

    backend: Backend = "auto"
    """native keeps images on the device, dali decodes them when needed, auto chooses by their size."""

    image_size: int | None = None
    """Height and width in pixels that image files are resized to; by default all must have the same size."""

    channels: Literal[1, 3] | None = None
    """Channels that image files are converted to; by default all must have the same number."""

    bits: int | None = None
    """Significant bits per channel of image files with more than 8, such as 12; by default as the file says."""

    test_fraction: float = 0.2
    """Fraction to hold out of an image folder or shards without a test split."""

    skip_corrupt: bool = False
    """Skip image files that cannot be decoded or do not fit the rest, and list them, instead of stopping."""

    def __post_init__(self) -> None:
        require(0 < self.test_fraction < 1, "test_fraction", self.test_fraction, "between 0 and 1")
        if self.image_size is not None:
            positive(image_size=self.image_size)
        require(self.bits is None or 1 <= self.bits <= 16, "bits", self.bits, "between 1 and 16")
