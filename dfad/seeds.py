"""Seeds of independent random streams, derived from one seed."""

import random
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

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
    """Seed the global generators of Python, NumPy and PyTorch for a block, and restore their states afterwards.

    Args:
        seed: for all of them.
        device: a GPU whose generator is also restored.
    """
    with random_state_kept([device] if device is not None and device.type == "cuda" else []):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002 the stream that networks draw from
        yield


@contextmanager
def random_state_kept(devices: Sequence[torch.device] | None = None) -> Iterator[None]:
    """Restore the states of the global generators of Python, NumPy and PyTorch afterwards.

    Args:
        devices: GPUs whose generators are restored as well; by default all.
    """
    states = random_states()
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            set_random_states(states)


def random_states() -> dict[str, Any]:
    """The states of the global generators of Python and NumPy, of types that a checkpoint may hold."""
    _, keys, *position = np.random.get_state()  # noqa: NPY002
    return {"python": random.getstate(), "numpy": (torch.from_numpy(np.asarray(keys, np.int64)), *position)}


def set_random_states(states: dict[str, Any]) -> None:
    """Set the states that :func:`random_states` returned."""
    random.setstate(states["python"])
    keys, *position = states["numpy"]
    np.random.set_state(("MT19937", keys.numpy(), *position))  # noqa: NPY002
