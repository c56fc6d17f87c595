"""Images of every kind: correct values or an error, never silently black or white."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from dfad.data import DataConfig, batch_source, in_order, open_dataset
from dfad.data.dali import dali_installed
from dfad.data.formats.external import _decode
from dfad.errors import DataError

from .conftest import write

SHADES = np.linspace(0, 1, 64).reshape(8, 8)
"""From black to white."""

BYTES = np.round(255 * SHADES).astype(np.uint8)


def encoded(content: np.ndarray | Image.Image, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    image = content if isinstance(content, Image.Image) else Image.fromarray(content)
    image.save(stream, kind, **options)
    return stream.getvalue()


def whole(white: int, dtype: str = "<u2") -> np.ndarray:
    return np.round(white * SHADES).astype(dtype)


def png(bits: int, colour: int, rows: np.ndarray) -> bytes:
    """A PNG of a kind that Pillow does not write: bits per sample, colour type, bytes of each row."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", 8, 8, bits, colour, 0, 0, 0)
    rows = rows if bits < 16 else rows.astype(">u2")
    lines = b"".join(b"\0" + row.tobytes() for row in rows)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


def tiff(samples: np.ndarray, tags: dict[int, object], planes: bool = False) -> bytes:
    """A TIFF of a kind that Pillow does not write."""
    height, width, channels = samples.shape
    bits = 8 * samples.itemsize
    parts = [part.tobytes() for part in (samples.transpose(2, 0, 1) if planes else [samples])]
    starts = [8 + sum(map(len, parts[:index])) for index in range(len(parts))]
    entries: dict[int, object] = {
        256: [width], 257: [height], 258: [bits] * channels, 259: [1], 262: [2 if channels > 2 else 1], 273: starts,
        277: [channels], 278: [height], 279: [len(part) for part in parts], 284: [2 if planes else 1], **tags,
    }  # fmt: skip
    table, beyond = b"", b""
    end = 8 + sum(map(len, parts)) + 2 + 12 * len(entries) + 4
    for tag, values in sorted(entries.items()):
        packed = struct.pack(f"<{len(values)}H", *values)
        place = packed.ljust(4, b"\0") if len(packed) <= 4 else struct.pack("<I", end + len(beyond))
        beyond += packed if len(packed) > 4 else b""
        table += struct.pack("<HHI", tag, 3, len(values)) + place
    header = b"II*\0" + struct.pack("<I", 8 + sum(map(len, parts)))
    return header + b"".join(parts) + struct.pack("<H", len(entries)) + table + bytes(4) + beyond


def with_tag(tag: int, value: int) -> dict[str, object]:
    from PIL.TiffImagePlugin import ImageFileDirectory_v2

    tags = ImageFileDirectory_v2()
    tags[tag] = value
    return {"tiffinfo": tags}


def dataset(tmp_path, content: bytes, ending: str, **options):
    files = {f"{split}/cat/{n}.{ending}": content for split in ("train", "test") for n in range(2)}
    return open_dataset(DataConfig(name="folder", root=write(tmp_path, files), **options))


def read(tmp_path, content: bytes, ending: str, **options) -> np.ndarray:
    return dataset(tmp_path, content, ending, **options).test.decoded().images[0].numpy()


RGB16 = np.repeat(whole(65535, ">u2")[:, :, None], 3, axis=2)
COLOUR = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
OPAQUE = np.dstack([COLOUR, np.full((8, 8), 255, np.uint8)])
TRANSPARENT = np.dstack([COLOUR, np.full((8, 8), 254, np.uint8)])
GREY_OPAQUE = np.dstack([BYTES, np.full((8, 8), 255, np.uint8)])

GREY_FILES = {
    "PNG, 16 bits": (encoded(whole(65535), "png"), "png", {}),
    "TIFF, 16 bits": (encoded(whole(65535), "tiff"), "tif", {}),
    "TIFF, 16 bits, big-endian": (encoded(whole(65535, ">u2"), "tiff"), "tif", {}),
    "PGM, 16 bits": (b"P5 8 8 65535\n" + whole(65535, ">u2").tobytes(), "pgm", {}),
    "PGM, 12 bits": (b"P5 8 8 4095\n" + whole(4095, ">u2").tobytes(), "pgm", {}),
    "PGM, 12 bits, as a user says it": (b"P5 8 8 4095\n" + whole(4095, ">u2").tobytes(), "pgm", {"bits": 12}),
    "PNG, 12 in 16 bits, as a user says it": (encoded(whole(4095), "png"), "png", {"bits": 12}),
    "TIFF, 12 in 16 bits, as its tag says it": (encoded(whole(4095), "tiff", **with_tag(281, 4095)), "tif", {}),
    "TIFF, 16 bits, tagged with its brightest pixel": (
        encoded(np.minimum(whole(65535), 65534), "tiff", **with_tag(281, 65534)), "tif", {},
    ),
    "PNG with opaque alpha": (encoded(GREY_OPAQUE, "png"), "png", {}),
    "PNG with opaque alpha, 16 bits": (
        png(16, 4, np.dstack([whole(65535, ">u2"), np.full((8, 8), 65535, ">u2")])), "png", {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", GREY_FILES)
def test_greyscale_comes_out_from_black_to_white(kind, tmp_path):
    content, ending, options = GREY_FILES[kind]
    pixels = read(tmp_path, content, ending, **options)
    assert pixels.shape == (1, 8, 8)
    np.testing.assert_allclose(pixels[0].astype(int), BYTES, atol=1)
    assert (pixels.min(), pixels.max()) == (0, 255)
    assert read(tmp_path, content, ending, **options, channels=3).shape == (3, 8, 8)


COLOUR_FILES = {
    "PNG": (encoded(COLOUR, "png"), COLOUR),
    "PNG, 16 bits": (png(16, 2, RGB16), np.repeat(BYTES[:, :, None], 3, axis=2)),
    "PNG with opaque alpha": (encoded(OPAQUE, "png"), COLOUR),
    "PNG with opaque alpha, 16 bits": (
        png(16, 6, np.dstack([RGB16, np.full((8, 8), 65535, ">u2")])),
        np.repeat(BYTES[:, :, None], 3, axis=2),
    ),
    "TIFF, CMYK": (encoded(Image.fromarray(COLOUR).convert("CMYK"), "tiff"), COLOUR),
}


@pytest.mark.parametrize("kind", COLOUR_FILES)
def test_colours_are_kept(kind, tmp_path):
    content, expected = COLOUR_FILES[kind]
    pixels = read(tmp_path, content, "tif" if "TIFF" in kind else "png")
    np.testing.assert_allclose(pixels.transpose(1, 2, 0).astype(int), expected, atol=1)


def test_palettes_and_few_bits(tmp_path):
    palette = Image.fromarray(COLOUR).quantize(64)
    expected = np.asarray(palette.convert("RGB")).transpose(2, 0, 1)
    np.testing.assert_array_equal(read(tmp_path / "palette", encoded(palette, "png"), "png"), expected)
    for bits in (1, 2, 4):
        values = np.arange(8) % 2**bits
        packed = np.packbits(np.unpackbits(values.astype(np.uint8)[:, None], axis=1)[:, 8 - bits :])
        pixels = read(tmp_path / f"{bits}", png(bits, 0, np.tile(packed, (8, 1))), "png")
        np.testing.assert_array_equal(pixels[0, 0], values * 255 // (2**bits - 1))


REFUSED = {
    "floats": (encoded(SHADES.astype(np.float32), "tiff"), "tif", {}, r"holds floating-point numbers \(mode F\)"),
    "32 bits": (encoded(whole(65535, "<i4"), "tiff"), "tif", {}, "holds integers of 32 bits"),
    "12 in 16 bits": (encoded(whole(4095), "png"), "png", {}, "is 4095. Probably only 12 bits .* give --data.bits 12"),
    "8 in 16 bits": (encoded(whole(255), "tiff"), "tif", {}, "is 255. Probably only 8 bits"),
    "12 in 16 bits, in colour": (png(16, 2, RGB16 // 16), "png", {}, "Probably only 12 bits"),
    "12 in 16 bits, in colour, as a user says it": (
        png(16, 2, RGB16 // 16), "png", {"bits": 12}, "upper 8 are read; --data.bits 12 cannot",
    ),
    "12 in 16 bits, tagged with its brightest pixel": (
        encoded(whole(4000), "tiff", **with_tag(281, 4000)), "tif", {}, "is 4000. Probably only 12 bits",
    ),
    "signed bytes": (tiff(BYTES[:, :, None], {339: [2]}), "tif", {}, "holds signed integers"),
    "an infrared channel": (tiff(OPAQUE, {338: [0]}), "tif", {}, "holds 4 channels"),
    "a second channel": (tiff(GREY_OPAQUE, {338: [0]}), "tif", {}, "holds 2 channels"),
    "planes of 16 bits": (tiff(RGB16.astype("<u2"), {}, planes=True), "tif", {}, "holds planes of 16 bits"),
    "brighter than white": (encoded(whole(65535), "png"), "png", {"bits": 12}, "pixel of 65535, more than the 4095"),
    "transparent": (encoded(TRANSPARENT, "png"), "png", {}, "has transparent pixels"),
    "a transparent colour of a palette": (
        encoded(np.arange(64, dtype=np.uint8).reshape(8, 8), "png", transparency=3), "png", {}, "transparent pixels",
    ),
    "a transparent grey of 16 bits": (
        encoded(whole(65535), "png", transparency=65535), "png", {}, "transparent pixels",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_has_no_right_value_is_refused(kind, tmp_path):
    content, ending, options, message = REFUSED[kind]
    with pytest.raises(DataError, match=message):
        read(tmp_path, content, ending, **options)


def test_images_that_are_dark_may_be_declared_so(tmp_path):
    assert read(tmp_path, encoded(whole(4095), "png"), "png", bits=16).max() == 16


def test_planes_of_bytes_are_read(tmp_path):
    np.testing.assert_array_equal(read(tmp_path, tiff(COLOUR, {}, planes=True), "tif"), COLOUR.transpose(2, 0, 1))


@pytest.mark.parametrize("kind", ["png", "tiff", "webp"])
def test_of_several_images_in_a_file_the_first_is_read_and_that_is_said(kind, tmp_path, caplog):
    options = {"lossless": True} if kind == "webp" else {}
    content = encoded(COLOUR, kind, save_all=True, append_images=[Image.fromarray(255 - COLOUR)], **options)
    np.testing.assert_array_equal(read(tmp_path, content, kind), COLOUR.transpose(2, 0, 1))
    assert "holds several images" in caplog.text


def turned() -> bytes:
    exif = Image.Exif()
    exif[274] = 6
    return encoded(COLOUR[:4], "png", exif=exif)


def test_an_orientation_is_not_applied_and_that_is_said(tmp_path, caplog):
    np.testing.assert_array_equal(read(tmp_path, turned(), "png"), COLOUR[:4].transpose(2, 0, 1))
    assert "EXIF orientation" in caplog.text
    caplog.clear()
    read(tmp_path / "upright", encoded(COLOUR, "png"), "png")
    assert not caplog.text


UPSIDE_DOWN = tiff(COLOUR, {274: [3]})


def test_an_orientation_of_tiff_is_applied(tmp_path, caplog):
    np.testing.assert_array_equal(read(tmp_path, UPSIDE_DOWN, "tif"), COLOUR[::-1, ::-1].transpose(2, 0, 1))
    assert not caplog.text


@pytest.mark.skipif(not dali_installed(), reason="needs NVIDIA DALI")
@pytest.mark.parametrize(
    ("content", "ending", "options"),
    [
        *GREY_FILES.values(),
        *((content, "png", {}) for kind, (content, _) in COLOUR_FILES.items() if "CMYK" not in kind),
        (turned(), "png", {}),
        (UPSIDE_DOWN, "tif", {}),
    ],
    ids=[*GREY_FILES, *(f"colour: {kind}" for kind in COLOUR_FILES if "CMYK" not in kind), "turned", "upside down"],
)
def test_both_backends_see_the_same(content, ending, options, tmp_path):
    opened = dataset(tmp_path, content, ending, **options)
    native, dali = (
        next(batch_source(opened, opened.test, name, torch.device("cpu")).batches(in_order(2), 2, drop_last=False))[0]
        for name in ("native", "dali")
    )
    torch.testing.assert_close(dali, native, atol=1.01 / 255 / min(opened.std), rtol=0)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.fromarray(whole(65535)), BYTES[None]),
        (Image.fromarray(BYTES > 127), 255 * (BYTES > 127)[None]),
        (Image.fromarray(COLOUR).convert("P"), None),
        (Image.fromarray(GREY_OPAQUE), BYTES[None]),
    ],
    ids=["16 bits", "1 bit", "palette", "opaque alpha"],
)
def test_images_of_other_packages_are_converted_alike(image, expected):
    split = _decode([(image, 0), (image, 1)], "elsewhere", None)
    expected = np.asarray(image.convert("RGB")).transpose(2, 0, 1) if expected is None else expected
    np.testing.assert_allclose(split.images[1].numpy().astype(int), expected, atol=1)


def test_dark_images_of_other_packages_are_refused():
    with pytest.raises(DataError, match=r"elsewhere: the brightest pixel of 2 images .* give --data\.bits 12"):
        _decode([(Image.fromarray(whole(4095)), 0)] * 2, "elsewhere", None)
