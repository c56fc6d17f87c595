"""A folder as files of limited size, checked by their hashes on arrival."""

import hashlib
import io
import json
import shutil
import tarfile
from pathlib import Path

LIMIT = 15_000_000
"""Bytes of a part."""

MANIFEST = "parcel.json"


class ParcelError(Exception):
    """Parts are missing or damaged."""


def send(folder: Path, destination: Path, limit: int = LIMIT) -> list[Path]:
    """Write a folder as ``parcel-0``, ``parcel-1``, … and a manifest, in place of an earlier parcel.

    Args:
        folder: to be sent.
        destination: folder of the parts.
        limit: largest size of a part in bytes.
    """
    destination.mkdir(parents=True, exist_ok=True)
    for old in destination.glob("parcel*"):
        old.unlink()
    stream = io.BytesIO()
    # trained weights compress hardly better at higher presets
    with tarfile.open(fileobj=stream, mode="w:xz", preset=1) as archive:
        archive.add(folder, arcname=".")
    data = stream.getvalue()
    hashes = {}
    for index, start in enumerate(range(0, len(data), limit)):
        part = data[start : start + limit]
        name = f"parcel-{index}"
        (destination / name).write_bytes(part)
        hashes[name] = hashlib.sha256(part).hexdigest()
    manifest = destination / MANIFEST
    manifest.write_text(json.dumps(hashes, indent=1) + "\n")
    return [*(destination / name for name in hashes), manifest]


def receive(source: Path, folder: Path) -> None:
    """Unpack a parcel as the folder that was sent, which must not exist yet.

    Raises:
        ParcelError: if a part is missing or is not what was sent; nothing is unpacked then.
    """
    data = b""
    for name, sent in json.loads((source / MANIFEST).read_text()).items():
        part = source / name
        if not part.is_file():
            raise ParcelError(
                f"{source} lacks {name}, which its {MANIFEST} names. Copy every part of the parcel there, or remove "
                f"{source / MANIFEST} to start again."
            )
        content = part.read_bytes()
        if hashlib.sha256(content).hexdigest() != sent:
            raise ParcelError(
                f"{part} ({len(content)} bytes) is not what was sent: it is damaged, or of another parcel. Copy it "
                f"again, or remove {source / MANIFEST} to start again."
            )
        data += content
    arriving = folder.with_name(folder.name + ".arriving")
    shutil.rmtree(arriving, ignore_errors=True)
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:xz") as archive:
        archive.extractall(arriving, filter="data")
    arriving.rename(folder)
