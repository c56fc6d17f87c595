"""Numeric arrays in MATLAB files of version 5, compressed or not.

SciPy reads far more of the format, but its parser crashes the process on damaged files.
"""

import math
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dfad.errors import DataError

HEADER = 128
MARK = b"\x00\x01IM"
"""End of the header: version 1, little-endian."""

MATRIX, COMPRESSED = 14, 15
NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
"""NumPy's names of the element types."""


def read_mat(path: Path) -> dict[str, np.ndarray]:
    """The numeric arrays of a file, by name.

    Raises:
        DataError: if it is of another format, or damaged.
    """
    content = path.read_bytes()
    if len(content) < HEADER or content[HEADER - len(MARK) : HEADER] != MARK:
        raise DataError(
            f"{path} ({len(content)} bytes) is no MATLAB file of version 5, to judge by its first 128 bytes."
        )
    arrays = {}
    for start, kind, data in _elements(path, content, HEADER):
        if kind == COMPRESSED:
            try:
                data = zlib.decompress(data)
            except zlib.error as error:
                raise DataError(f"{path} is damaged in the element at offset {start}: {error}. Get it anew.") from None
            ((_, kind, data),) = _elements(path, data, 0)
        if kind == MATRIX:
            name, array = _matrix(path, start, data)
            arrays[name] = array
    return arrays


def _elements(path: Path, content: bytes, offset: int) -> Iterator[tuple[int, int, bytes]]:
    """Offset, type and content of consecutive elements."""
    while offset < len(content):
        start = offset
        tag = content[offset : offset + 8].ljust(8, b"\0")
        kind, size = struct.unpack("<II", tag)
        offset += 8
        if kind >> 16:  # a small element: its size shares the first word, its content the tag
            kind, size, offset = kind & 0xFFFF, kind >> 16, start + 4
        if offset + size > len(content):
            raise DataError(
                f"{path} ends inside the element at offset {start}: it announces {size} bytes, {len(content) - offset} "
                "are there. Get the file anew."
            )
        yield start, kind, content[offset : offset + size]
        offset += size
        if kind != COMPRESSED:
            offset += -offset % 8


def _matrix(path: Path, start: int, content: bytes) -> tuple[str, np.ndarray]:
    damage = DataError(f"{path} holds no numeric array in the element at offset {start}. It is not the official file.")
    parts = [(kind, data) for _, kind, data in _elements(path, content, 0)]
    if len(parts) < 4 or len(parts[1][1]) % 4 or parts[3][0] not in NUMBERS:
        raise damage
    shape = np.frombuffer(parts[1][1], "<i4").tolist()
    dtype = np.dtype(NUMBERS[parts[3][0]]).newbyteorder("<")
    if min(shape, default=-1) < 0 or math.prod(shape) * dtype.itemsize != len(parts[3][1]):
        raise damage
    return parts[2][1].decode("latin1"), np.frombuffer(parts[3][1], dtype).reshape(shape, order="F")
