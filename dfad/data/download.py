"""Downloads of data sets, if requested."""

import hashlib
import logging
import shutil
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from dfad.data.config import DataConfig
from dfad.errors import DataError

log = logging.getLogger(__name__)

TIMEOUT = 60.0
"""Timeout in seconds without a byte."""


@dataclass(frozen=True)
class Remote:
    """A published file."""

    url: str
    md5: str
    """MD5 as published; it detects a damaged transfer, not an attack."""

    @property
    def name(self) -> str:
        """Of the file."""
        return self.url.rpartition("/")[2]


def require_root(config: DataConfig) -> Path:
    """The data set's root.

    Raises:
        DataError: if none is given.
    """
    if config.root is None:
        raise DataError(f"The data set {config.name} is read from files: give their folder with --data.root FOLDER.")
    return config.root


def fetch(remote: Remote, folder: Path) -> Path:
    """A published file, downloaded unless it exists; it appears in the folder whole or not at all.

    Raises:
        DataError: if it cannot be downloaded, or is not the published file.
    """
    path = folder / remote.name
    if path.exists():
        return path
    log.info("Downloading %s to %s.", remote.url, folder)
    temporary = path.with_name(path.name + ".part")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(remote.url, timeout=TIMEOUT) as response, temporary.open("wb") as file:
            shutil.copyfileobj(response, file)
        found = _md5(temporary)
        if found != remote.md5:
            raise DataError(
                f"{remote.url} is not the published file: its MD5 is {found}, not {remote.md5}. Nothing "
                f"was kept. Try again, or put the file into {folder} yourself."
            )
        temporary.replace(path)
    except OSError as error:  # includes URLError
        raise DataError(
            f"{remote.url} cannot be downloaded: {error}. Nothing was kept. Put the file into {folder} yourself, or "
            "try again."
        ) from None
    finally:
        temporary.unlink(missing_ok=True)
    return path


def published(remote: Remote, folder: Path) -> Path:
    """A file in a folder, checked to be the published one: for formats whose parsers do not handle damage.

    Raises:
        DataError: if it is missing, damaged or another file.
    """
    path = folder / remote.name
    if not path.is_file():
        raise DataError(f"There is no {path}. Point --data.root at its folder, or download it with --data.download.")
    found = _md5(path)
    if found != remote.md5:
        raise DataError(
            f"{path} ({path.stat().st_size} bytes) is damaged or not the official file: its MD5 is {found}, not "
            f"{remote.md5}. Delete it and download it again with --data.download, or from {remote.url}."
        )
    return path


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
