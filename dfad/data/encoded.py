"""Encoded images: JPEG, PNG and the like."""

import dataclasses
import hashlib
import io
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from dfad.data.config import DataConfig
from dfad.data.decoded import DecodedSplit
from dfad.data.files import Blob
from dfad.data.pixels import ORIENTATION, brightest, eight_bits, is_grey, is_plain, pillow, require_bright
from dfad.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

log = logging.getLogger(__name__)

SAMPLE = 16
"""Number of evenly spaced images that are decoded for what headers do not contain."""


@dataclass(frozen=True)
class EncodedSplit:
    """Images in files or archives, decoded when they are needed."""

    blobs: tuple[Blob, ...]
    labels: Tensor
    """``int64 (N,)``."""

    image_shape: tuple[int, int, int]
    """``(channels, height, width)`` after decoding and optional resizing."""

    resized: bool = False
    """Resize to :attr:`image_shape` instead of requiring that size."""

    converted: bool = False
    """Convert to the channels of :attr:`image_shape` instead of requiring them."""

    bits: int | None = None
    """Significant bits per channel of images with more than eight; by default as each file says."""

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
            DataError: if it cannot be decoded, or differs in size or kind from the rest.
        """
        data = blob.read()
        channels, height, width = self.image_shape
        with _opened(blob, data) as image:
            self._check(blob, image)
            picture = eight_bits(image, blob, self.bits).convert("L" if channels == 1 else "RGB")
        if picture.size != (width, height):
            picture = picture.resize((width, height), pillow().Resampling.BILINEAR)
        pixels = torch.from_numpy(np.array(picture))
        return pixels[None] if channels == 1 else pixels.permute(2, 0, 1)

    def plain(self, blob: Blob, data: bytes) -> bytes | None:
        """An image as a PNG that every decoder reads in the same way; None if the file itself is such an image.

        Raises:
            DataError: naming the file, if its size or kind differs from the rest.
        """
        with _opened(blob, data) as image:
            self._check(blob, image)
            if is_plain(image):
                return None
            stream = io.BytesIO()
            eight_bits(image, blob, self.bits).save(stream, "png", compress_level=1)
            return stream.getvalue()

    @property
    def decoded_bytes(self) -> int:
        """Bytes of all images when decoded."""
        return len(self) * math.prod(self.image_shape)

    def _check(self, blob: Blob, image: "Image.Image") -> None:
        channels, height, width = self.image_shape
        if not self.resized and image.size != (width, height):
            raise DataError(
                f"{blob} has {image.size[0]}×{image.size[1]} pixels, others have {width}×{height}. Give "
                "--data.image_size to resize all."
            )
        grey = is_grey(image)
        if not self.converted and grey != (channels == 1):
            kinds = ("greyscale", "in colour") if grey else ("in colour", "greyscale")
            raise DataError(
                f"{blob} is {kinds[0]} (mode {image.mode}), others are {kinds[1]}. Give --data.channels 1 or 3 to "
                "convert all, or remove it."
            )

    def without_corrupt(self) -> tuple["EncodedSplit", tuple[str, ...]]:
        """The split without the files that :meth:`decode` refuses, and the reason for each of those."""
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
        labels: of the files.
        config: size and channels, if images are to be resized or converted.
        like: the split whose size and channels the images must have otherwise; by default those of the first image that
            can be read.
    """
    if like is not None:
        return dataclasses.replace(like, blobs=tuple(blobs), labels=torch.tensor(labels))
    (width, height), grey = _first_header(blobs)
    if config.image_size is not None:
        width = height = config.image_size
    shape = (config.channels or (1 if grey else 3), height, width)
    _look_at_some(blobs, config)
    return EncodedSplit(
        tuple(blobs),
        torch.tensor(labels),
        shape,
        resized=config.image_size is not None,
        converted=config.channels is not None,
        bits=config.bits,
    )


def _look_at_some(blobs: Sequence[Blob], config: DataConfig) -> None:
    """Check for images with too few significant bits; log what of a file is not applied or not read."""
    deep, turned, several = [], [], []
    for blob in blobs[:: -(-len(blobs) // SAMPLE)]:
        with suppress(DataError), _opened(blob, blob.read()) as image:
            if (value := brightest(image)) is not None:
                deep.append(value)
            if image.format != "TIFF" and image.getexif().get(ORIENTATION, 1) != 1:
                turned.append(blob)
            if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:  # of a photograph in MPO, previews follow
                several.append(blob)
    if config.bits is None:
        require_bright(deep, config.root or config.name)
    if turned:
        log.warning(
            "%s has an EXIF orientation, and others may have one. It is not applied: pixels are taken "
            "in the order of the file, as torchvision and timm do.",
            turned[0],
        )
    if several:
        log.warning("%s holds several images, and others may. Only the first of each file is read.", several[0])


def _first_header(blobs: Sequence[Blob]) -> tuple[tuple[int, int], bool]:
    failure = DataError("There are no images to determine a size from.")
    for index, blob in enumerate(blobs):
        try:
            data = blob.read()
            with _opened(blob, data) as image:
                return image.size, is_grey(image)
        except DataError as error:
            failure = failure if index else error
    raise failure


@contextmanager
def _opened(blob: Blob, data: bytes) -> Iterator["Image.Image"]:
    """The image in a file, its header read."""
    opener = pillow()
    with decoding(blob, data), opener.open(io.BytesIO(data)) as image:
        yield image


@contextmanager
def decoding(blob: Blob, data: bytes) -> Iterator[None]:
    """Turns errors of a decoder into a DataError that names the file."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # a decoder may raise anything for a damaged file
        reason = str(error).partition("<")[0].strip().rstrip(".")
        raise DataError(
            f"{blob} ({len(data)} bytes) cannot be decoded as an image: {reason}. Replace or remove it, or skip such "
            "files with --data.skip_corrupt."
        ) from None
