"""A run's folder: when it is created, when it is refused, and which state it holds."""

import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dfad.errors import RunFolderError
from dfad.files import write_text
from dfad.runs import checkpoint
from dfad.runs.recorder import EVENTS, METRICS
from dfad.runs.settings import SETTINGS_FILE, leaves, require_unchanged, saved_settings, to_yaml
from dfad.runs.snapshots import SNAPSHOTS

log = logging.getLogger(__name__)

RUN_FILES = (
    "checkpoint.pt", "checkpoint-previous.pt", "*.tmp", "teacher.safetensors", "student.safetensors",
    "student_best.safetensors", "generator.safetensors", "samples.png", "curves.png", "report.html", METRICS,
    "result.json",
)  # fmt: skip
"""Files of a run besides its settings and events."""

EXPORTS = "export"
"""Folder in it that ``dfad export`` writes its student to."""


def check_folder(folder: Path, settings: Any, *, resume: bool = False, overwrite: bool = False) -> None:
    """Check that a run can use a folder, before any expensive work.

    Args:
        folder: of the run; a new one's may exist if it is empty.
        settings: what the run is started with.
        resume: the folder must hold a run that was started with these settings, or with fewer rounds.
        overwrite: a new run may replace one that the folder holds. A folder with other files is always refused.

    Raises:
        RunFolderError: if it holds a run or other files, also one that the new run needs, or cannot be written to.
        ConfigurationError: if it holds no run that these settings continue.
    """
    if resume:
        require_unchanged(folder, saved_settings(folder, type(settings)()), settings)
        return
    # os.path, because Path.exists raises where the parent may not be read
    existing = next(path for path in (folder, *folder.absolute().parents) if os.path.exists(path))
    if not existing.is_dir():
        raise RunFolderError(f"{existing} is a file; a run needs a folder. Choose another --run_dir.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise RunFolderError(f"There is no permission to write to {existing}. Choose another --run_dir.")
    if (folder / SETTINGS_FILE).exists():
        if not overwrite:
            raise RunFolderError(
                f"{folder} already holds a run. Continue it with --resume {folder}, replace it with --overwrite, "
                "or choose another --run_dir."
            )
        for needed in _needed_of_the_old_run(folder, settings):
            raise RunFolderError(
                f"{needed}, which the run needs, is in {folder}, which --overwrite clears. Choose another --run_dir, "
                "or move it."
            )
    # a run that is killed right at its start leaves an unfinished settings file
    elif folder.exists() and any(path.suffix != ".tmp" for path in folder.iterdir()):
        raise RunFolderError(f"{folder} holds files that are not a run's. Choose an empty --run_dir.")


def _of_the_old_run(folder: Path) -> Iterator[Path]:
    """What a new run clears; what a user may have added is kept."""
    for pattern in RUN_FILES:
        yield from (path for path in folder.glob(pattern) if not path.is_dir())
    yield from (folder / name for name in (EVENTS, EXPORTS, SNAPSHOTS))


def _needed_of_the_old_run(folder: Path, settings: Any) -> Iterator[Path]:
    """What settings name of that, such as a teacher or exported images."""
    cleared = {path.resolve() for path in _of_the_old_run(folder)}
    for _, value in leaves(settings):
        if isinstance(value, (str, Path)) and os.path.exists(value):
            path = Path(value).resolve()
            if not cleared.isdisjoint((path, *path.parents)):
                yield Path(value)


def open_folder(folder: Path, settings: Any, *, resume: bool = False, overwrite: bool = False) -> dict[str, Any] | None:
    """Create the folder of a new run, without files of an earlier one, or read the state of a run to resume.

    Args:
        folder: of the run; see :func:`check_folder` for this and the others.
        settings: written as YAML for a new run, and compared with those for a resumed one, which they may extend.
        resume: continue the run in the folder.
        overwrite: replace the run in the folder.

    Returns:
        The newest readable checkpoint; None for a new run, and for one that was stopped before its first.

    Raises:
        RunFolderError: if the folder is refused or cannot be made, or no checkpoint in it can be read.
        ConfigurationError: if it holds no run that these settings continue.
    """
    check_folder(folder, settings, resume=resume, overwrite=overwrite)
    if resume:
        state = checkpoint.load(folder)
        if state is None:
            log.warning("%s was stopped before its first checkpoint; it starts from the beginning.", folder)
        return state
    text = to_yaml(settings)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in [*_of_the_old_run(folder)]:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        # last, because this file marks the folder as a run's
        write_text(folder / SETTINGS_FILE, text)
    except OSError as error:
        raise RunFolderError(
            f"{folder} cannot be created or cleared: {error.strerror}. Choose another --run_dir."
        ) from None
    return None


def extend(folder: Path, settings: Any) -> None:
    """Save the settings of a resumed run that is extended by more rounds.

    Args:
        folder: of the run.
        settings: with which the run continues, see :func:`open_folder`.

    Raises:
        RunFolderError: if the file cannot be written.
    """
    if require_unchanged(folder, saved_settings(folder, type(settings)()), settings):
        write_text(folder / SETTINGS_FILE, to_yaml(settings))
        log.info("%s is extended: its learning rates go on as those of a run of the new length do from there.", folder)
        if (folder / EXPORTS).exists():
            log.warning(
                "%s holds the student as it was before: after the run, replace it with dfad export %s --overwrite.",
                folder / EXPORTS,
                folder,
            )
