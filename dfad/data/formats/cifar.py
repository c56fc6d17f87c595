"""CIFAR-10 and CIFAR-100: the official Python and binary versions, as archive or folder."""

import io
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dfad.data.config import DataConfig
from dfad.data.dataset import Dataset
from dfad.data.decoded import DecodedSplit
from dfad.data.download import Remote, fetch, require_root
from dfad.data.files import Blob, is_archive, read_tree
from dfad.errors import DataError

SHAPE = (3, 32, 32)
PIXELS = 3 * 32 * 32


@dataclass(frozen=True)
class _Version:
    """File names of one version."""

    train: str
    """A glob pattern."""
    test: str
    classes: str
    folder: str
    archive: str


@dataclass(frozen=True)
class _Family:
    python: _Version
    binary: _Version
    python_labels: bytes
    python_names: str
    label_bytes: int
    """Number of label bytes at the start of a binary record; the last one is the class."""
    remote: Remote
    mean: tuple[float, ...]
    std: tuple[float, ...]


FAMILIES = {
    "cifar10": _Family(
        _Version("data_batch_[1-5]", "test_batch", "batches.meta", "cifar-10-batches-py", "cifar-10-python"),
        _Version(
            "data_batch_[1-5].bin", "test_batch.bin", "batches.meta.txt", "cifar-10-batches-bin", "cifar-10-binary"
        ),
        b"labels", "label_names", 1,
        Remote("https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a"),
        (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616),
    ),
    "cifar100": _Family(
        _Version("train", "test", "meta", "cifar-100-python", "cifar-100-python"),
        _Version("train.bin", "test.bin", "fine_label_names.txt", "cifar-100-binary", "cifar-100-binary"),
        b"fine_labels", "fine_label_names", 2,
        Remote("https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85"),
        (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762),
    ),
}  # fmt: skip


def read_cifar(config: DataConfig) -> Dataset:
    """CIFAR-10 or CIFAR-100, with all train batches that exist."""
    family = FAMILIES[config.name]
    root = require_root(config)
    if config.download:
        fetch(family.remote, root)
    files, version = _locate(config, root, family)
    train_names = sorted(name for name in files if Path(name).match(version.train))
    read_labelled = _read_pickle if version is family.python else _read_records
    classes = _class_names(files[version.classes], family, binary=version is family.binary)
    train = _joined([read_labelled(files[name], family) for name in train_names])
    test = read_labelled(files[version.test], family)
    return Dataset(config.name, classes, family.mean, family.std, train, test)


def _locate(config: DataConfig, root: Path, family: _Family) -> tuple[dict[str, Blob], _Version]:
    versions = (family.python, family.binary)
    places = [root]
    for version in versions:
        places += [root / version.folder, *(root / f"{version.archive}{end}" for end in (".tar.gz", ".tar.xz", ".tar"))]
    for place in places:
        if place.is_file() and is_archive(place):
            files = {Path(name).name: blob for name, blob in read_tree(place).files.items()}
        elif place.is_dir():
            files = {path.name: Blob(path) for path in place.iterdir() if path.is_file()}
        else:
            continue
        for version in versions:
            if any(Path(name).match(version.train) for name in files):
                missing = [name for name in (version.test, version.classes) if name not in files]
                if missing:
                    raise DataError(f"{place} holds train images of {config.name}, but no {' and no '.join(missing)}.")
                return files, version
    names = [name for version in versions for name in (version.folder, version.archive + ".tar.gz")]
    raise DataError(
        f"{root} does not hold {config.name}: there is none of {', '.join(names)}, nor their files. Point --data.root "
        "at one of these or at the folder that holds it, or let --data.download fetch it there."
    )


def _class_names(blob: Blob, family: _Family, *, binary: bool) -> tuple[str, ...]:
    if binary:
        return tuple(line.strip() for line in blob.read().decode("utf-8", "replace").splitlines() if line.strip())
    names = _unpickle(blob).get(family.python_names.encode())
    if not isinstance(names, list) or not all(isinstance(name, bytes) for name in names):
        raise DataError(f"{blob} holds no list {family.python_names}; it is not the official one.")
    return tuple(name.decode("utf-8", "replace") for name in names)


def _read_records(blob: Blob, family: _Family) -> DecodedSplit:
    content = blob.read()
    record = family.label_bytes + PIXELS
    if not content or len(content) % record:
        raise DataError(
            f"{blob} ends at offset {len(content)}, inside record {len(content) // record} of {record} bytes. It is "
            "truncated, or belongs to another data set; download it again."
        )
    records = torch.frombuffer(bytearray(content), dtype=torch.uint8).view(-1, record)
    images = records[:, family.label_bytes :].reshape(-1, *SHAPE)
    return DecodedSplit(images, records[:, family.label_bytes - 1].long(), source=str(blob))


def _read_pickle(blob: Blob, family: _Family) -> DecodedSplit:
    content = _unpickle(blob)
    array, labels = content.get(b"data"), content.get(family.python_labels)
    data = array.values if isinstance(array, _Array) else None
    if data is None or data.ndim != 2 or data.shape[1] != PIXELS:
        raise DataError(f"{blob} holds no array 'data' of unsigned bytes, {PIXELS} a row; it is not the official one.")
    if (
        not isinstance(labels, list)
        or len(labels) != len(data)
        or not all(type(label) is int and 0 <= label < 256 for label in labels)
    ):
        raise DataError(f"{blob} holds no list '{family.python_labels.decode()}' of {len(data)} small numbers.")
    return DecodedSplit(torch.from_numpy(data.copy()).view(-1, *SHAPE), torch.tensor(labels), source=str(blob))


def _joined(splits: list[DecodedSplit]) -> DecodedSplit:
    return DecodedSplit(
        torch.cat([split.images for split in splits]),
        torch.cat([split.labels for split in splits]),
        source=", ".join(split.source for split in splits),
    )


class _Dtype:
    """Replaces ``numpy.dtype`` in a pickle."""

    def __init__(self, name: bytes | str, *_: object) -> None:
        self.is_byte = name in (b"u1", "u1")

    def __setstate__(self, state: object) -> None:
        """Ignores byte order and alignment, which bytes do not have."""


class _Array:
    """Replaces ``numpy.ndarray`` in a pickle: NumPy itself would crash the process on a damaged state."""

    values: np.ndarray | None = None

    def __setstate__(self, state: tuple[int, tuple[int, ...], _Dtype, bool, bytes]) -> None:
        _, shape, dtype, in_columns, content = state
        if not dtype.is_byte or in_columns:
            raise pickle.UnpicklingError("it holds an array that is not rows of unsigned bytes")
        self.values = np.frombuffer(content, np.uint8).reshape(shape)


def _new_array(*_: object) -> _Array:
    return _Array()


ADMITTED: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _new_array,
    ("numpy._core.multiarray", "_reconstruct"): _new_array,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
}
"""Names that a CIFAR pickle may contain, with their replacements; before NumPy 2 the module was ``numpy.core``."""


class _ArrayUnpickler(pickle.Unpickler):
    """Accepts only what the official files hold: numbers, bytes, lists, dictionaries and arrays of bytes."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ADMITTED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which CIFAR files do not hold")
        return ADMITTED[module, name]


def _unpickle(blob: Blob) -> dict[bytes, Any]:
    stream = io.BytesIO(blob.read())
    try:
        content = _ArrayUnpickler(stream, encoding="bytes").load()
    except Exception as error:  # a damaged pickle can make the unpickler raise anything
        raise DataError(
            f"{blob} was not read beyond offset {stream.tell()}: {error}. It is damaged, or not the official file; "
            "none of its code was run."
        ) from None
    if not isinstance(content, dict):
        raise DataError(
            f"{blob} holds a {type(content).__name__} instead of a dictionary; it is not the official file."
        )
    return content
