"""Images that are still JPEG, PNG or the like."""

import dataclasses
import hashlib
import io
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dfad.data.config import DataConfig
from dfad.data.decoded import DecodedSplit
from dfad.data.files import Blob
from dfad.errors import DataError

GREY_MODES = ("1", "L", "LA", "I", "I;16", "F")


@dataclass(frozen=True)
class EncodedSplit:
    """Images in files or archives, decoded when they are needed."""

    blobs: tuple[Blob, ...]
    labels: Tensor
    """``int64 (N,)``."""

    image_shape: tuple[int, int, int]
    """``(channels, height, width)`` after decoding and, where asked for, resizing."""

    resized: bool = False
    """Resize to :attr:`image_shape` instead of demanding that size of every file."""

    converted: bool = False
    """Convert to the channels of :attr:`image_shape` instead of demanding them of every file."""

    def __len__(self) -> int:
        return len(self.blobs)

    def subset(self, indices: Sequence[int]) -> "EncodedSplit":
        """The images at these indices."""
        blobs = tuple(self.blobs[index] for index in indices)
        return dataclasses.replace(self, blobs=blobs, labels=self.labels[torch.as_tensor(indices, dtype=torch.int64)])

    def decoded(self) -> DecodedSplit:
        """All images in memory."""
        images = torch.empty((len(self), *self.image_shape), dtype=torch.uint8)
        for index, blob in enumerate(self.blobs):
            images[index] = self.decode(blob)
        return DecodedSplit(images, self.labels)

    def decode(self, blob: Blob) -> Tensor:
        """One image, ``uint8 (channels, height, width)``.

        Raises:
            DataError: if it does not decode, or is of another size or kind than the rest.
        """
        data = blob.read()
        channels, height, width = self.image_shape
        with decoding(blob, data), Image.open(io.BytesIO(data)) as image:
            self._check(blob, image)
            picture = image.convert("L" if channels == 1 else "RGB")
        if picture.size != (width, height):
            picture = picture.resize((width, height), Image.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.array(picture))
        return pixels[None] if channels == 1 else pixels.permute(2, 0, 1)

    def check_header(self, blob: Blob, data: bytes) -> None:
        """Refuse an image whose header tells another size or kind than the rest, without decoding it.

        Raises:
            DataError: naming the file.
        """
        with decoding(blob, data), Image.open(io.BytesIO(data)) as image:
            self._check(blob, image)

    @property
    def decoded_bytes(self) -> int:
        """That all images would take in memory."""
        return len(self) * math.prod(self.image_shape)

    def _check(self, blob: Blob, image: Image.Image) -> None:
        channels, height, width = self.image_shape
        if not self.resized and image.size != (width, height):
            raise DataError(
                f"{blob} is of {image.size[0]}×{image.size[1]} pixels, others are of {width}×{height}. Give "
                "--data.image_size to resize all."
            )
        grey = image.mode in GREY_MODES
        if not self.converted and grey != (channels == 1):
            kinds = ("greyscale", "in colour") if grey else ("in colour", "greyscale")
            raise DataError(
                f"{blob} is {kinds[0]} (mode {image.mode}), others are {kinds[1]}. Give --data.channels 1 or 3 to "
                "convert all, or remove it."
            )

    def without_corrupt(self) -> tuple["EncodedSplit", tuple[str, ...]]:
        """The split without the files that :meth:`decode` refuses, and what is wrong with each of those."""
        kept, skipped = [], []
        for index, blob in enumerate(self.blobs):
            try:
                self.decode(blob)
            except DataError as error:
                skipped.append(str(error))
            else:
                kept.append(index)
        return self.subset(kept), tuple(skipped)

    def content_hash(self) -> bytes:
        """SHA-256 of the encoded files and labels."""
        digest = hashlib.sha256(str(self.image_shape).encode())
        for blob in self.blobs:
            digest.update(hashlib.sha256(blob.read()).digest())
        digest.update(self.labels.numpy().tobytes())
        return digest.digest()


def encoded_split(
    blobs: Sequence[Blob], labels: Sequence[int], config: DataConfig, like: EncodedSplit | None = None
) -> EncodedSplit:
    """A split of image files.

    Args:
        blobs: the files.
        labels: of each.
        config: size and channels, where all are to be brought to the same.
        like: the split whose size and channels the images must have where that is not asked for; without one, those
            of the first image that can be read.
    """
    if like is not None:
        return dataclasses.replace(like, blobs=tuple(blobs), labels=torch.tensor(labels))
    (width, height), mode = _first_header(blobs)
    if config.image_size is not None:
        width = height = config.image_size
    shape = (config.channels or (1 if mode in GREY_MODES else 3), height, width)
    return EncodedSplit(
        tuple(blobs),
        torch.tensor(labels),
        shape,
        resized=config.image_size is not None,
        converted=config.channels is not None,
    )


def _first_header(blobs: Sequence[Blob]) -> tuple[tuple[int, int], str]:
    failure = DataError("There are no images to tell a size from.")
    for index, blob in enumerate(blobs):
        try:
            data = blob.read()
            with decoding(blob, data), Image.open(io.BytesIO(data)) as image:
                return image.size, image.mode
        except DataError as error:
            failure = failure if index else error
    raise failure


@contextmanager
def decoding(blob: Blob, data: bytes) -> Iterator[None]:
    """Turns what a decoder raises into a DataError that names the file."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # of a damaged file, a decoder may raise anything
        reason = str(error).partition("<")[0].strip().rstrip(".")
        raise DataError(
            f"{blob} ({len(data)} bytes) does not decode as an image: {reason}. Replace or remove it, or leave such "
            "files out with --data.skip_corrupt."
        ) from None
