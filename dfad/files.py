"""Files that are never seen half written."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from dfad.errors import RunFolderError


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file so that at every moment its old or its new content is there, never a part.

    Args:
        path: the file.
        write: called with a binary file to write to; whatever it raises leaves the old content and nothing else.

    Raises:
        RunFolderError: if the disk is full, or the file may not be written.
    """
    temporary = path.with_name(path.name + ".tmp")
    with writing(path):
        try:
            with temporary.open("wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
        _sync_folder(path.parent)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns what a full disk or missing rights raise into a RunFolderError that names the file."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        reason = _system_error(error)
        if reason is None:
            raise
        kept = " The last whole one is kept." if path.exists() else ""
        raise RunFolderError(
            f"{path} cannot be written: {reason.strerror or reason}.{kept} Make room there or mend the rights, or "
            "choose another folder."
        ) from error


def _system_error(error: BaseException | None) -> OSError | None:
    # torch.save hides a full disk behind a RuntimeError of its own
    while error is not None and not isinstance(error, OSError):
        error = error.__context__
    return error


def _sync_folder(folder: Path) -> None:
    # the rename itself must reach the disk
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
