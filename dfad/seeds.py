"""Seeds of independent random streams, derived from one seed."""

import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def stream_seed(seed: int, stream: str | int) -> int:
    """A 32-bit seed for one random stream of a run; PyTorch's CPU generator ignores further bits.

    Args:
        seed: of the run.
        stream: what is drawn from it, such as ``noise``, or the number of an epoch.
    """
    part = zlib.crc32(stream.encode()) if isinstance(stream, str) else stream
    return int(np.random.SeedSequence((seed, part)).generate_state(1)[0])


@contextmanager
def seeded(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Seed PyTorch's global generators for a block, and restore their states afterwards.

    Args:
        seed: for all of them.
        device: a GPU whose generator is also restored.
    """
    with torch.random.fork_rng(devices=[device] if device is not None and device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
