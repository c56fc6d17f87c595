"""The memory of tensors on a CPU, which is the C library's."""

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST = (1 << 31) - 1


def keep_freed_memory() -> bool:
    """Let this process keep what tensors let go of, for the tensors of the next round.

    Otherwise the system takes large blocks back, and clears them page by page when they are touched the next time.

    Returns:
        Whether the C library can (glibc's ``mallopt``).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(mallopt(what, LARGEST) for what in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD))
