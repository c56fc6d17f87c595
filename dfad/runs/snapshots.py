"""Generated images of several moments of a run, of the same noise, as files in its folder."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from dfad.files import write_atomically

log = logging.getLogger(__name__)

SNAPSHOTS = "samples"
"""Folder in a run's."""

MOMENTS = 6
"""In a run, its end among them."""

IMAGES = 8
"""Of a moment."""


@dataclass(frozen=True)
class Snapshot:
    """Images of a moment."""

    round: int
    pixels: Any
    """Array ``uint8 (B, height, width[, 3])``."""
    labels: Sequence[int]
    """The teacher's."""
    confidences: Sequence[float]
    """Its probabilities of them."""


def moments(rounds: int) -> set[int]:
    """After which rounds of so many images are kept."""
    return {max(1, round(rounds * (index + 1) / MOMENTS)) for index in range(MOMENTS)}


def save_snapshot(folder: Path, snapshot: Snapshot) -> None:
    """Write one into a run's folder."""
    (folder / SNAPSHOTS).mkdir(exist_ok=True)
    tensors: dict[str, Tensor] = {
        "pixels": torch.from_numpy(snapshot.pixels).contiguous(),  # of three channels they come channels last
        "labels": torch.tensor(snapshot.labels),
        "confidences": torch.tensor(snapshot.confidences),
    }
    data = save(tensors)
    write_atomically(folder / SNAPSHOTS / f"round-{snapshot.round:07d}.safetensors", lambda file: file.write(data))


def load_snapshots(folder: Path, last_round: int) -> list[Snapshot]:
    """Those of a run's folder up to a round, in order; unreadable ones are left out, with a line in the log."""
    found = []
    for path in sorted((folder / SNAPSHOTS).glob("round-*.safetensors")):
        number = int(path.stem.removeprefix("round-"))
        if number > last_round:  # of a run that was stopped, and went on from an earlier checkpoint
            continue
        try:
            tensors = load_file(path)
            pixels = tensors["pixels"].numpy()
            found.append(Snapshot(number, pixels, tensors["labels"].tolist(), tensors["confidences"].tolist()))
        except (SafetensorError, OSError, KeyError) as error:
            log.warning("The generated images in %s cannot be read: %s", path, error)
    return found
