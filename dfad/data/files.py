"""Files in folders or in archives, read without unpacking.

Nothing is ever written, so an archive cannot place a file anywhere; one that tries is refused nevertheless.
"""

import io
import logging
import lzma
import os
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from dfad.errors import DataError

log = logging.getLogger(__name__)

ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.bz2")


@dataclass(frozen=True)
class Blob:
    """A range of bytes: a file, or a member of an archive."""

    path: Path
    """The file or the archive."""

    member: str = ""
    """Name inside the archive."""

    offset: int = 0
    size: int | None = None
    content: bytes | None = field(default=None, repr=False)
    """The bytes themselves, if the archive is compressed and has no random access."""

    def __str__(self) -> str:
        return f"{self.path}, member {self.member}" if self.member else str(self.path)

    def read(self) -> bytes:
        """All bytes.

        Raises:
            DataError: if the file cannot be read or is too short.
        """
        if self.content is not None:
            return self.content
        try:
            with self.path.open("rb") as file:
                file.seek(self.offset)
                data = file.read() if self.size is None else file.read(self.size)
        except OSError as error:
            raise DataError(f"{self} cannot be read: {error.strerror}.") from None
        if self.size is not None and len(data) < self.size:
            raise DataError(
                f"{self} is truncated: {len(data)} of {self.size} bytes exist from offset {self.offset} on. "
                "Download the archive again."
            )
        return data


@dataclass(frozen=True)
class Tree:
    """Files and folders, by their path relative to the root, with forward slashes."""

    root: Path
    files: dict[str, Blob]
    """The files: of a folder, sorted; of an archive, in its order."""
    folders: set[str]


def is_archive(path: Path) -> bool:
    """Whether a name is that of a tar archive."""
    return path.name.endswith(ARCHIVES)


def read_tree(root: Path) -> Tree:
    """The files below a folder or in a tar archive. In a folder, links are followed.

    Raises:
        DataError: if there is no such folder or archive, or the archive is damaged, or a member is a link, a device, or
            has a path outside the archive's root.
    """
    if root.is_dir():
        paths = [path.relative_to(root).as_posix() for path in sorted(_below(root))]
        return Tree(
            root,
            {name: Blob(root / name) for name in paths if _is_file(root / name)},
            {name for name in paths if os.path.isdir(root / name)},
        )
    if not root.exists():
        raise DataError(f"There is no {root}. Point --data.root at the folder or archive that holds the data set.")
    if not is_archive(root):
        raise DataError(f"{root} is neither a folder nor a tar archive ({', '.join(ARCHIVES)}).")
    files: dict[str, Blob] = {}
    folders: set[str] = set()
    for name, blob in _members(root):
        folders.update(parent.as_posix() for parent in PurePosixPath(name).parents[:-1])
        if blob is None:
            folders.add(name)
        else:
            files[name] = blob
    return Tree(root, files, folders)


def is_hidden(name: str) -> bool:
    """Whether a path below a root is, or is in, something that file managers hide or create."""
    return any(part.startswith(".") or part == "__MACOSX" for part in PurePosixPath(name).parts)


def _is_file(path: Path) -> bool:
    """Whether it is a file, or something that cannot be read, such as a broken link."""
    return os.path.isfile(path) or not os.path.exists(path)


def _below(folder: Path, around: tuple[str, ...] = ()) -> Iterator[Path]:
    """Files and folders, at any depth; a link to a parent folder is not followed."""
    here = os.path.realpath(folder)
    if here in around:
        log.warning("%s is a link to a parent folder; it is not followed.", folder)
        return
    try:
        entries = list(os.scandir(folder))
    except OSError as error:
        raise DataError(f"{folder} cannot be read: {error.strerror}.") from None
    for entry in entries:
        yield folder / entry.name
        if os.path.isdir(entry):  # DirEntry.is_dir raises for a link to itself
            yield from _below(folder / entry.name, (*around, here))


def _members(archive: Path) -> Iterator[tuple[str, Blob | None]]:
    with damage_reported(archive), tarfile.open(archive) as tar:
        compressed = not isinstance(tar.fileobj, io.BufferedReader)  # its name may say something else
        for info in tar:
            _check_member(archive, info)
            # the same file may be written as a/b and as ./a/b
            name = PurePosixPath(info.name).as_posix()
            if not info.isfile():
                yield name, None
                continue
            stream = tar.extractfile(info) if compressed else None
            content = stream.read() if stream else None
            yield name, Blob(archive, info.name, info.offset_data, info.size, content)


def _check_member(archive: Path, info: tarfile.TarInfo) -> None:
    path = PurePosixPath(info.name)
    if path.is_absolute() or ".." in path.parts:
        fault = "has a path outside the archive's root"
    elif info.issym() or info.islnk():
        fault = f"is a link to {info.linkname}"
    elif not (info.isfile() or info.isdir()):
        fault = "is a device or a pipe"
    else:
        return
    raise DataError(
        f"{archive}: member {info.name} {fault}. A data set holds only plain files; nothing of the archive was used."
    )


@contextmanager
def damage_reported(path: Path) -> Iterator[None]:
    """Turns errors of a damaged or truncated archive or compressed file into a DataError that names it."""
    try:
        yield
    except EOFError as error:
        raise DataError(f"{path} ({path.stat().st_size} bytes) is truncated: {error} Download it again.") from None
    except (tarfile.TarError, lzma.LZMAError, zlib.error, OSError) as error:
        raise DataError(f"{path} cannot be read, it may be damaged: {error}. Download it again.") from None
