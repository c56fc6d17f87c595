"""Keeps memory that one round frees in the C library for the next one; on a CPU."""

import ctypes
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

log = logging.getLogger(__name__)

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3

LARGEST = (1 << 31) - 1

AFTERWARDS = {M_MMAP_THRESHOLD: 32 << 20, M_TRIM_THRESHOLD: 64 << 20}
"""Bytes: the largest thresholds that glibc chooses by itself for large blocks, until one is set."""


def has_mallopt() -> bool:
    """Whether the C library lets its thresholds be set (glibc)."""
    return hasattr(_libc(), "mallopt")


@contextmanager
def keep_memory() -> Iterator[None]:
    """Keep the memory of freed tensors in this process, for the tensors of the next round.

    Without it, large blocks are returned to the system, which clears them page by page when they are used again.

    Afterwards free memory is returned to the system, and the thresholds are those that glibc's own adjustment reaches
    in a process with large tensors. The adjustment itself stays off: glibc has no call to turn it on again, or to read
    the thresholds.
    """
    kept = {parameter: _set(parameter, LARGEST) for parameter in AFTERWARDS}
    if not all(kept.values()):
        log.info("Without engine.keep_memory: the C library refuses to keep blocks of any size.")
    try:
        yield
    finally:
        for parameter, value in AFTERWARDS.items():
            _set(parameter, value)
        _libc().malloc_trim(0)


def _set(parameter: int, value: int) -> bool:
    return bool(_libc().mallopt(parameter, value))


def _libc() -> Any:
    return ctypes.CDLL(None)
