"""Seeds of independent random-number streams, made of one."""

import zlib

import numpy as np


def stream_seed(seed: int, stream: str | int) -> int:
    """A seed of 32 bits for one of the streams of a run; PyTorch's CPU generator takes no notice of more.

    Args:
        seed: of the run.
        stream: what is drawn from it, such as ``noise``, or the number of an epoch.
    """
    part = zlib.crc32(stream.encode()) if isinstance(stream, str) else stream
    return int(np.random.SeedSequence((seed, part)).generate_state(1)[0])
