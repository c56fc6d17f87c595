"""Generated images from several points of a run and the same noise, as files in its folder."""

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
"""Folder in the run's folder."""

MOMENTS = 6
"""Number of snapshots in a run, including its end."""

IMAGES = 8
"""Number of images in a snapshot."""


@dataclass(frozen=True)
class Snapshot:
    """Generated images at one point of a run."""

    round: int
    pixels: Any
    """Array ``uint8 (B, height, width[, 3])``."""
    labels: Sequence[int]
    """The teacher's predicted classes."""
    confidences: Sequence[float]
    """The teacher's probabilities of these classes."""


def moments(rounds: int) -> set[int]:
    """The rounds after which images are kept."""
    return {max(1, round(rounds * (index + 1) / MOMENTS)) for index in range(MOMENTS)}


def save_snapshot(folder: Path, snapshot: Snapshot) -> None:
    """Write a snapshot into a run's folder."""
    (folder / SNAPSHOTS).mkdir(exist_ok=True)
    tensors: dict[str, Tensor] = {
        "pixels": torch.from_numpy(snapshot.pixels).contiguous(),  # with three channels they are channels-last
        "labels": torch.tensor(snapshot.labels),
        "confidences": torch.tensor(snapshot.confidences),
    }
    data = save(tensors)
    write_atomically(folder / SNAPSHOTS / f"round-{snapshot.round:07d}.safetensors", lambda file: file.write(data))


def load_snapshots(folder: Path, last_round: int) -> list[Snapshot]:
    """The snapshots in a run's folder up to a round, in order; unreadable ones are skipped, with a line in the log."""
    found = []
    for path in sorted((folder / SNAPSHOTS).glob("round-*.safetensors")):
        number = int(path.stem.removeprefix("round-"))
        if number > last_round:  # from a run that was stopped and continued from an earlier checkpoint
            continue
        try:
            tensors = load_file(path)
            pixels = tensors["pixels"].numpy()
            found.append(Snapshot(number, pixels, tensors["labels"].tolist(), tensors["confidences"].tolist()))
        except (SafetensorError, OSError, KeyError) as error:
            log.warning("The generated images in %s cannot be read: %s", path, error)
    return found
