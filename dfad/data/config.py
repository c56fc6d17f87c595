"""Which data set, from where, and how it is read."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dfad.validation import positive, require

Backend = Literal["auto", "native", "dali"]


@dataclass(frozen=True)
class DataConfig:
    """A data set for training a teacher or for measuring; distilling never sees one."""

    name: str = "digits"
    """One of digits, mnist, fashion-mnist, cifar10, cifar100, svhn, folder, webdataset, torchvision/…, huggingface/…"""

    root: Path | None = None
    """Folder or archive that holds it."""

    download: bool = False
    """Fetch it into root where it is not there yet."""

    backend: Backend = "auto"
    """Images resident on the device (native), decoded as they are needed (dali), or whichever suits their size."""

    image_size: int | None = None
    """Height and width in pixels that image files are resized to; without it, all must be of one size."""

    channels: Literal[1, 3] | None = None
    """Channels that image files are converted to; without it, all must be of one kind."""

    bits: int | None = None
    """Significant bits per channel of image files with more than 8, such as 12; by the file where not given."""

    test_fraction: float = 0.2
    """Part that is held out of an image folder or shards that have no test split."""

    skip_corrupt: bool = False
    """Leave out image files that do not decode or do not fit the rest, and list them, instead of stopping."""

    def __post_init__(self) -> None:
        require(0 < self.test_fraction < 1, "test_fraction", self.test_fraction, "between 0 and 1")
        if self.image_size is not None:
            positive(image_size=self.image_size)
        require(self.bits is None or 1 <= self.bits <= 16, "bits", self.bits, "between 1 and 16")
