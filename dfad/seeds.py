"""Seeds of independent random-number streams, made of one."""

import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def stream_seed(seed: int, stream: str | int) -> int:
    """A seed of 32 bits for one of the streams of a run; PyTorch's CPU generator takes no notice of more.

    Args:
        seed: of the run.
        stream: what is drawn from it, such as ``noise``, or the number of an epoch.
    """
    part = zlib.crc32(stream.encode()) if isinstance(stream, str) else stream
    return int(np.random.SeedSequence((seed, part)).generate_state(1)[0])


@contextmanager
def seeded(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """PyTorch's global generators start from a seed; after the block they are as they were before.

    Args:
        seed: for all of them.
        device: a GPU whose generator is to be as before, besides the CPU's.
    """
    with torch.random.fork_rng(devices=[device] if device is not None and device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
