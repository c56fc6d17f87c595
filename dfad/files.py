"""Files and folders that are never seen half written."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from dfad.errors import RunFolderError


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file so that at every moment it holds its old or its new content, never a part.

    Args:
        path: the file.
        write: called with a binary file to write to; if it raises, the old content stays and nothing else is left.

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


def write_text(path: Path, text: str) -> None:
    """Write a text in UTF-8, atomically, into a folder that is made if there is none.

    Raises:
        RunFolderError: see :func:`write_atomically`.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: file.write(text.encode()))


@contextmanager
def whole_folder(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A folder to write into, which becomes ``path`` when the block ends; if the block raises, ``path`` is as it was.

    Args:
        path: must not exist yet.
        overwrite: may exist, and is replaced.

    Raises:
        RunFolderError: if it exists, or the disk is full, or it may not be written.
    """
    if os.path.lexists(path) and not overwrite:
        raise RunFolderError(f"{path} already exists. Replace it with --overwrite, or choose another folder.")
    if path.exists() and not path.is_dir():
        raise RunFolderError(f"{path} is a file, not a folder. Choose another one.")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}-", suffix=".tmp", dir=path.parent))
    new, old = temporary / "new", temporary / "old"
    try:
        new.mkdir()
        yield new
        with writing(path):
            try:
                if path.exists():
                    path.replace(old)
                new.replace(path)
            except BaseException:
                if old.exists():
                    old.replace(path)
                raise
            _sync_folder(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns errors of a full disk or missing permissions into a RunFolderError that names the file."""
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
    # torch.save reports a full disk as a RuntimeError
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
