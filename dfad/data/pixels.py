"""Conversion of images to greyscale or RGB with 8 bits per channel: correctly scaled, or refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dfad.errors import DataError, not_installed

if TYPE_CHECKING:
    from PIL import Image

BITS_PER_SAMPLE, PHOTOMETRIC, MAX_SAMPLE_VALUE, PLANES, EXTRA_SAMPLES, SAMPLE_FORMAT = 258, 262, 281, 284, 338, 339
"""Tags of TIFF."""

ORIENTATION = 274
"""Tag of EXIF and TIFF; 1 is upright."""

MANY_BITS = 16
DARK = 2**14
"""Brightest pixel below which 16-bit images seem to have fewer significant bits."""


def pillow() -> Any:
    """The module that opens image files.

    Raises:
        DataError: if Pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError:
        raise DataError(f"Image files are read with Pillow. {not_installed('Pillow', 'images')}") from None
    return Image


def is_grey(image: Image.Image) -> bool:
    """Whether an image that is not loaded yet has one channel besides its transparency."""
    return image.mode in ("1", "L", "LA", "La", "I", "F") or is_deep(image) or _raw_mode(image).startswith("LA")


def is_deep(image: Image.Image) -> bool:
    """Whether an image that is not loaded yet is greyscale with more than 8 bits."""
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM")


def is_plain(image: Image.Image) -> bool:
    """Whether all decoders give the same pixels for an image that is not loaded yet."""
    return (
        image.mode in ("L", "RGB")
        and ";" not in _raw_mode(image)
        and "transparency" not in image.info
        and image.format != "TIFF"  # of which no two decoders read the same
    )


def eight_bits(image: Image.Image, source: object, bits: int | None = None) -> Image.Image:
    """An image in mode L or RGB. Its EXIF orientation is not applied; Pillow applies that of TIFF.

    Args:
        image: not loaded yet, if it comes from a file.
        source: its name, for messages.
        bits: significant bits per channel of images with more than 8; by default as the file says.

    Raises:
        DataError: if the value of white is unknown, pixels are brighter than white, or pixels are transparent.
    """
    if image.mode == "F" or (image.mode == "I" and not is_deep(image)):
        kind = "floating-point numbers" if image.mode == "F" else "integers of 32 bits"
        raise DataError(
            f"{source} holds {kind} (mode {image.mode}), and the value of white is unknown. Convert it to 8 or "
            "16 bits per channel."
        )
    if unread := _unread(image):
        raise DataError(f"{source} holds {unread}. Convert it to 8 bits per channel, greyscale or RGB.")
    grey, transparent = is_grey(image), image.info.get("transparency")
    if is_deep(image):
        white, inverted = _white(image, bits), _tags(image).get(PHOTOMETRIC) == 0
        pixels = np.asarray(image).astype(np.int64)
        if pixels.max(initial=0) > white:
            raise DataError(
                f"{source} has a pixel of {pixels.max()}, more than the {white} of {white.bit_length()} bits. Give the "
                f"right --data.bits."
            )
        if transparent is not None and (pixels == transparent).any():
            raise _transparency(source)
        scaled = (255 * pixels + white // 2) // white
        return pillow().fromarray((255 - scaled if inverted else scaled).astype(np.uint8))
    if ";16" in _raw_mode(image) and bits not in (None, MANY_BITS):
        raise DataError(
            f"{source} is in colour with 16 bits per channel, of which the upper 8 are read; --data.bits {bits} cannot "
            "be applied. Convert it to 8 bits per channel."
        )
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or transparent is not None:
        image = image.convert("RGBA")
        if np.asarray(image)[..., 3].min(initial=255) < 255:
            raise _transparency(source)
        image = image.convert("RGB")
    return image.convert("L" if grey else "RGB")


def _unread(image: Image.Image) -> str:
    """What Pillow drops or misreads of a TIFF without an error."""
    tags = _tags(image)
    if 0 in tags.get(EXTRA_SAMPLES, ()):
        return f"{len(tags[BITS_PER_SAMPLE])} channels"
    if 2 in tags.get(SAMPLE_FORMAT, ()):
        return "signed integers"
    if tags.get(PLANES) == 2 and max(tags.get(BITS_PER_SAMPLE, (1,))) > 8:
        return "planes of 16 bits"
    return ""


def _transparency(source: object) -> DataError:
    return DataError(
        f"{source} has transparent pixels, and their background is unknown. Flatten it onto a background, or "
        "skip such files with --data.skip_corrupt."
    )


def brightest(image: Image.Image) -> int | None:
    """The largest value in an image with 16 bits per channel that does not state its significant bits."""
    if is_deep(image):
        declared = _white(image, None) != 2**MANY_BITS - 1 or _scaled_by_pillow(image)
        return None if declared else int(np.asarray(image).max(initial=0))
    if ";16" in _raw_mode(image):
        extrema: Any = image.convert("RGB").getextrema()
        return 256 * max(high for _, high in extrema) + 255
    return None


def require_bright(values: Sequence[int], source: object) -> None:
    """Check that 16-bit images are not all dark, which happens if fewer bits are significant.

    Args:
        values: the largest value of each of some images, see :func:`brightest`.
        source: of the images, for messages.

    Raises:
        DataError: with the number of bits that seem significant.
    """
    if not values or max(values) >= DARK:
        return
    bits = next(bits for bits in (8, 10, 12, 14) if max(values) < 2**bits)
    raise DataError(
        f"{source}: the brightest pixel of {len(values)} images with 16 bits per channel is {max(values)}. Probably "
        f"only {bits} bits are significant: give --data.bits {bits}. If the images really are that dark, give "
        "--data.bits 16."
    )


def _white(image: Image.Image, bits: int | None) -> int:
    if _scaled_by_pillow(image):
        return 2**MANY_BITS - 1
    if bits is not None:
        return 2**bits - 1
    tags = _tags(image)
    highest = tags.get(MAX_SAMPLE_VALUE)
    highest = highest[0] if isinstance(highest, tuple) and highest else highest
    if isinstance(highest, int) and 0 < highest < 2**MANY_BITS and not highest & (highest + 1):
        return highest  # any other is the brightest pixel of this one image
    return int(2 ** tags.get(BITS_PER_SAMPLE, (MANY_BITS,))[0]) - 1


def _scaled_by_pillow(image: Image.Image) -> bool:
    """PGM files name the value of white; where it is no power of two, Pillow scales it."""
    return image.format == "PPM" and isinstance(_decoder_arguments(image), tuple)


def _tags(image: Image.Image) -> Any:
    return getattr(image, "tag_v2", {})


def _raw_mode(image: Image.Image) -> str:
    """Layout of the pixels in the file; empty if there is no file, or it is loaded."""
    arguments = _decoder_arguments(image)
    return str(arguments[0] if isinstance(arguments, tuple) else arguments)


def _decoder_arguments(image: Image.Image) -> Any:
    tiles = getattr(image, "tile", None)
    return (tiles[0][3] or "") if tiles else ""
