"""Checkpoints that survive a kill at any moment."""

import logging
import os
import pickle
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from dfad.errors import RunFolderError, first_line
from dfad.files import write_atomically

log = logging.getLogger(__name__)

NAME = "checkpoint.pt"
PREVIOUS = "checkpoint-previous.pt"


def save(folder: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint, and keep the previous one."""
    newest, previous = folder / NAME, folder / PREVIOUS
    if newest.exists():
        # a link, not a rename, so that the newest checkpoint exists at every moment
        link = folder / (PREVIOUS + ".tmp")
        link.unlink(missing_ok=True)
        with suppress(OSError):  # without links, only the newest checkpoint is kept
            os.link(newest, link)
            link.replace(previous)
    write_atomically(newest, lambda file: torch.save(state, file))


def exists(folder: Path) -> bool:
    """Whether a folder holds a checkpoint."""
    return (folder / NAME).exists()


def load(folder: Path) -> dict[str, Any] | None:
    """The newest readable checkpoint, on the CPU; None where the run was stopped before its first.

    Raises:
        RunFolderError: if there are checkpoints, but none can be read.
    """
    failures = []
    for path in (folder / NAME, folder / PREVIOUS):
        if not path.exists():
            continue
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, zipfile.BadZipFile, KeyError) as error:
            failures.append(f"{path.name}: {first_line(error)}")
            log.warning("The checkpoint %s cannot be read; trying the previous one.", path)
        else:
            return state
    if failures:
        raise RunFolderError(
            f"No checkpoint in {folder} can be read ({'; '.join(failures)}). Start again with --overwrite, or "
            "elsewhere with --run_dir."
        )
    return None
