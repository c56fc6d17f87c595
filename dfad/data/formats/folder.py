"""Image folders: a folder of images per class, in a folder or a tar archive."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath

from dfad.data.config import DataConfig
from dfad.data.dataset import Dataset, divide, from_encoded
from dfad.data.download import require_root
from dfad.data.encoded import EncodedSplit, encoded_split
from dfad.data.files import Blob, Tree, is_hidden, read_tree
from dfad.errors import DataError

log = logging.getLogger(__name__)

IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff")

TRAIN_NAMES = ("train", "training")

TEST_NAMES = ("test", "testing", "val", "valid", "validation")
"""Names of folders or shards of test images."""


def read_folder(config: DataConfig) -> Dataset:
    """``train/CLASS/*`` and ``test/CLASS/*``; or only ``CLASS/*``, of which a fixed fraction is held out.

    Raises:
        DataError: also if there is a folder of train images, but none of test images beside it.
    """
    tree = _below_single_folder(_visible(read_tree(require_root(config))))
    # a class may be called train as well; it holds no folders
    holders = {name.partition("/")[0] for name in tree.folders if "/" in name}
    train_name, test_name = (
        next((name for known in names for name in sorted(holders) if name.lower() == known), None)
        for names in (TRAIN_NAMES, TEST_NAMES)
    )
    if train_name:
        if not test_name:
            raise DataError(
                f"{tree.root} holds {train_name}/ with folders of train images, but no folder of test images, "
                f"called one of {', '.join(TEST_NAMES)}. There are: {', '.join(_classes(tree, ''))}."
            )
        if left_out := [name for name in _classes(tree, "") if name not in (train_name, test_name)]:
            log.info("%s: only %s and %s are read, not %s.", tree.root, train_name, test_name, ", ".join(left_out))
        classes = _classes(tree, f"{train_name}/")
        unknown = [name for name in _classes(tree, f"{test_name}/") if name not in classes]
        if unknown:
            raise DataError(
                f"{tree.root}: {test_name}/{unknown[0]} is a class that {train_name}/ lacks. "
                f"Known: {', '.join(classes)}."
            )
        train = _split(tree, f"{train_name}/", classes, config)
        test = _split(tree, f"{test_name}/", classes, config, like=train)
        return from_encoded(config, classes, train, test)
    classes = _classes(tree, "")
    everything = _split(tree, "", classes, config)
    return from_encoded(config, classes, *divide(everything, config.test_fraction, str(tree.root)))


def _visible(tree: Tree) -> Tree:
    """Files that are not hidden: previews, old versions and the like are not images of a class."""
    files = {name: blob for name, blob in tree.files.items() if not is_hidden(name)}
    return Tree(tree.root, files, {name for name in tree.folders if not is_hidden(name)})


def _below_single_folder(tree: Tree) -> Tree:
    """Skip the single folder that often contains everything in an archive; not a folder of a single class."""
    tops = {PurePosixPath(name).parts[0] for name in [*tree.files, *tree.folders]}
    if len(tops) != 1 or not any(name.count("/") >= 1 for name in tree.folders):
        return tree
    prefix = tops.pop() + "/"
    return Tree(
        tree.root,
        {name.removeprefix(prefix): blob for name, blob in tree.files.items()},
        {name.removeprefix(prefix) for name in tree.folders if name.startswith(prefix)},
    )


def _classes(tree: Tree, prefix: str) -> tuple[str, ...]:
    names = {name.removeprefix(prefix).partition("/")[0] for name in tree.folders if name.startswith(prefix)}
    classes = tuple(sorted(name for name in names if name))
    if not classes:
        raise DataError(f"{tree.root} holds no folders of classes{' in ' + prefix if prefix else ''}.")
    return classes


def _split(
    tree: Tree, prefix: str, classes: Sequence[str], config: DataConfig, like: EncodedSplit | None = None
) -> EncodedSplit:
    by_class: Mapping[str, list[Blob]] = {name: [] for name in classes}
    others = 0
    for path, blob in sorted(tree.files.items()):
        class_name, _, rest = path.removeprefix(prefix).partition("/")
        if not path.startswith(prefix):
            continue
        if rest and path.lower().endswith(IMAGES):
            by_class[class_name].append(blob)
        else:
            others += 1
    if others:
        log.info(
            "%s: %d files outside the folders of classes or without the name of an image were skipped.",
            tree.root / prefix, others,
        )  # fmt: skip
    present = classes if like is None else [name for name in classes if f"{prefix}{name}" in tree.folders]
    for name in present:
        if not by_class[name]:
            raise DataError(f"{tree.root}: the class folder {prefix}{name} holds no image. Fill it or remove it.")
    blobs = [blob for name in classes for blob in by_class[name]]
    labels = [label for label, name in enumerate(classes) for _ in by_class[name]]
    return encoded_split(blobs, labels, config, like)
