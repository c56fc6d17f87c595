"""WebDataset: tar shards in which files of one sample share their name up to the first dot."""

import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from dfad.data.config import DataConfig
from dfad.data.dataset import Dataset, divide, from_encoded
from dfad.data.download import require_root
from dfad.data.encoded import encoded_split
from dfad.data.files import Blob, is_hidden, read_tree
from dfad.data.formats.folder import IMAGES, TEST_NAMES
from dfad.errors import DataError

CLASS_FILES = ("classes.txt", "classnames.txt")
"""File beside the shards with the names of the classes, one per line; without it, names are numbers."""


def read_webdataset(config: DataConfig) -> Dataset:
    """Shards ``*.tar`` of images and ``cls`` files; those named after test or validation are held out."""
    root = require_root(config)
    shards = [root]
    if root.is_dir():
        files = read_tree(root).files
        shards = [blob.path for name, blob in files.items() if name.endswith(".tar") and not is_hidden(name)]
    if not shards:
        raise DataError(f"{root} holds no shards (*.tar).")
    tests = [shard for shard in shards if _is_test(root, shard)]
    train_blobs, train_labels = _samples([shard for shard in shards if shard not in tests])
    if not train_blobs:
        raise DataError(
            f"{root} holds no images to train on: its shards are empty, or all are named after test or validation."
        )
    test_blobs, test_labels = _samples(tests)
    classes = _classes(root, [*train_labels, *test_labels])
    train = encoded_split(train_blobs, train_labels, config)
    if tests:
        return from_encoded(config, classes, train, encoded_split(test_blobs, test_labels, config, like=train))
    return from_encoded(config, classes, *divide(train, config.test_fraction, str(root)))


def _is_test(root: Path, shard: Path) -> bool:
    words = re.split(r"[^a-z]+", shard.relative_to(root).as_posix().lower()) if root.is_dir() else []
    return any(word in TEST_NAMES for word in words)


def _samples(shards: Sequence[Path]) -> tuple[list[Blob], list[int]]:
    images: list[Blob] = []
    labels: list[int] = []
    for shard in shards:
        image_of: dict[str, Blob] = {}
        label_of: dict[str, Blob] = {}
        for name, blob in read_tree(shard).files.items():
            if is_hidden(name):
                continue
            path = PurePosixPath(name)
            stem, _, ending = path.name.partition(".")
            key = (path.parent / stem).as_posix()
            if f".{ending}".lower().endswith(IMAGES):
                kind = image_of
            elif ending == "cls":
                kind = label_of
            else:
                continue
            if key in kind:
                raise DataError(f"{shard}: the sample {key} has both {kind[key].member} and {name}. Remove one.")
            kind[key] = blob
        for key in [*image_of, *label_of]:
            if key not in image_of or key not in label_of:
                missing = "image" if key in label_of else "file .cls"
                raise DataError(f"{shard}: the sample {key} has no {missing}.")
        images += image_of.values()
        labels += [_label(label_of[key]) for key in image_of]
    return images, labels


def _label(blob: Blob) -> int:
    text = blob.read()
    try:
        return int(text)
    except ValueError:
        raise DataError(f"{blob} holds {text[:40]!r}; the number of a class is needed.") from None


def _classes(root: Path, labels: Sequence[int]) -> tuple[str, ...]:
    folder = root if root.is_dir() else root.parent
    for name in CLASS_FILES:
        if (folder / name).is_file():
            names = (folder / name).read_text(encoding="utf-8-sig", errors="replace")
            return tuple(line for line in names.splitlines() if line)
    return tuple(str(label) for label in range(max(labels, default=-1) + 1))
