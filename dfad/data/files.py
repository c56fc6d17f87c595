"""Files where they lie: in folders or in archives, read without unpacking.

Nothing is ever written, so an archive cannot place a file anywhere; one that tries to is refused all the same.
"""

import lzma
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TypeVar

from dfad.errors import DataError

ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.bz2")

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Blob:
    """A run of bytes: a file, or a member of an archive."""

    path: Path
    """The file or the archive."""

    member: str = ""
    """Name inside the archive."""

    offset: int = 0
    size: int | None = None
    content: bytes | None = None
    """The bytes themselves, where the archive is compressed and has no random access."""

    def __str__(self) -> str:
        return f"{self.path}, member {self.member}" if self.member else str(self.path)

    def read(self) -> bytes:
        """All of it.

        Raises:
            DataError: if it cannot be read, or ends early.
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
                f"{self} is truncated: {len(data)} of {self.size} bytes are there from offset {self.offset} on. "
                "Get the archive anew."
            )
        return data


def is_archive(path: Path) -> bool:
    """Whether a name is that of a tar archive."""
    return path.name.endswith(ARCHIVES)


def files_in(root: Path) -> dict[str, Blob]:
    """The files below a folder or in a tar archive, by their path inside it with forward slashes, sorted.

    Raises:
        DataError: if there is no such folder or archive, or the archive is damaged, or a member is a link, a device, or
            has a path outside the archive's root.
    """
    if root.is_dir():
        paths = sorted(path for path in root.rglob("*") if path.is_file())
        return {path.relative_to(root).as_posix(): Blob(path) for path in paths}
    if not root.exists():
        raise DataError(f"There is no {root}. Point --data.root at the folder or archive that holds the data set.")
    if not is_archive(root):
        raise DataError(f"{root} is neither a folder nor a tar archive ({', '.join(ARCHIVES)}).")
    return dict(sorted(reading_archive(root, lambda: list(_members(root)))))


def _members(archive: Path) -> Iterator[tuple[str, Blob]]:
    with tarfile.open(archive) as tar:
        compressed = archive.suffix != ".tar"
        for info in tar:
            _check_member(archive, info)
            if not info.isfile():
                continue
            content = None
            if compressed:
                stream = tar.extractfile(info)
                assert stream is not None  # only None for what is no file
                content = stream.read()
            name = PurePosixPath(info.name).as_posix()
            yield name, Blob(archive, info.name, info.offset_data, info.size, content)


def _check_member(archive: Path, info: tarfile.TarInfo) -> None:
    path = PurePosixPath(info.name)
    kind = ""
    if path.is_absolute() or ".." in path.parts:
        kind = "has a path outside the archive's root"
    elif info.issym() or info.islnk():
        kind = f"is a link to {info.linkname}"
    elif not (info.isfile() or info.isdir()):
        kind = "is a device or pipe"
    if kind:
        raise DataError(
            f"{archive}: member {info.name} {kind}. A data set holds plain files alone; the archive was not read any "
            "further, and should not be trusted."
        )


def reading_archive(path: Path, read: Callable[[], _Result]) -> _Result:
    """Call ``read``; what damaged compression or a damaged archive makes it raise becomes a DataError."""
    try:
        return read()
    except EOFError as error:
        raise DataError(f"{path} ({path.stat().st_size} bytes) is truncated: {error}. Get the file anew.") from None
    except (tarfile.TarError, lzma.LZMAError, zlib.error, OSError) as error:
        raise DataError(f"{path} ({path.stat().st_size} bytes) is damaged: {error}. Get the file anew.") from None
