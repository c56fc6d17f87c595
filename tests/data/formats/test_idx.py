"""MNIST: IDX files, plain and gzipped, whole and damaged."""

import gzip
import re

import numpy as np
import pytest

from dfad.data import DataConfig, open_dataset
from dfad.errors import DataError

from ..conftest import idx, mnist_files, write


def config(root, name="mnist"):
    return DataConfig(name=name, root=root)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_reads_images_in_order(tmp_path, name, zipped):
    dataset = open_dataset(config(write(tmp_path, mnist_files(zipped=zipped)), name))
    assert dataset.train.images.shape == (20, 1, 28, 28)
    assert dataset.train.images[:, 0, 3, 5].tolist() == list(range(20))
    assert dataset.train.labels.tolist() == [k % 10 for k in range(20)]
    assert len(dataset.test) == 10
    assert len(dataset.classes) == 10


def test_finds_files_where_other_programs_put_them(tmp_path):
    write(tmp_path / "MNIST" / "raw", mnist_files(zipped=False))
    assert len(open_dataset(config(tmp_path)).train) == 20


def truncated(content):
    return content[: len(content) // 2]


def spoilt_checksum(content):
    return content[:-6] + bytes(6)


DAMAGES = {
    "truncated gzip": ("train-images-idx3-ubyte.gz", truncated, "truncated"),
    "no gzip": ("train-images-idx3-ubyte.gz", lambda _: b"hello", "damaged: Not a gzipped file"),
    "damaged gzip": ("t10k-images-idx3-ubyte.gz", spoilt_checksum, "damaged: CRC check failed"),
    "labels for images": (
        "train-images-idx3-ubyte.gz",
        lambda _: gzip.compress(idx(np.zeros(20, np.uint8))),
        "bytes 00 00 08 01 at offset 0, but needs 00 00 08 03",
    ),
    "empty": ("train-labels-idx1-ubyte.gz", lambda _: gzip.compress(b""), r"bytes \(none\) at offset 0"),
    "no images": (
        "train-images-idx3-ubyte.gz",
        lambda _: gzip.compress(idx(np.zeros((0, 28, 28), np.uint8))),
        r"announces \(0, 28, 28\) bytes: it is empty",
    ),
    "cut in the header": (
        "train-images-idx3-ubyte.gz",
        lambda content: gzip.compress(gzip.decompress(content)[:10]),
        "ends at offset 10, inside its header of 16 bytes",
    ),
    "cut in the pixels": (
        "t10k-images-idx3-ubyte.gz",
        lambda content: gzip.compress(gzip.decompress(content)[:-1]),
        f"ends at offset {16 + 7840 - 1}",
    ),
    "longer than it says": (
        "t10k-images-idx3-ubyte.gz",
        lambda content: gzip.compress(gzip.decompress(content) + b"x"),
        f"ends at offset {16 + 7840 + 1}",
    ),
    "other size": (
        "train-images-idx3-ubyte.gz",
        lambda _: gzip.compress(idx(np.zeros((20, 32, 32), np.uint8))),
        "32×32 pixels; 28×28 are needed",
    ),
    "fewer labels": (
        "train-labels-idx1-ubyte.gz",
        lambda _: gzip.compress(idx(np.zeros(19, np.uint8))),
        "20 images, but .* 19 labels",
    ),
    "label out of range": (
        "train-labels-idx1-ubyte.gz",
        lambda _: gzip.compress(idx(np.array([3] * 12 + [10] + [3] * 7, np.uint8))),
        "label 10 of image 12 is out of range",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_an_error_that_names_the_file(tmp_path, damage):
    name, spoil, message = DAMAGES[damage]
    files = mnist_files()
    files[name] = spoil(files[name])
    with pytest.raises(DataError, match=message) as raised:
        open_dataset(config(write(tmp_path, files)))
    assert name in str(raised.value)


def test_a_missing_file_is_named(tmp_path):
    files = mnist_files()
    del files["t10k-labels-idx1-ubyte.gz"]
    with pytest.raises(DataError, match=re.escape(f"{tmp_path} holds neither t10k-labels-idx1-ubyte")):
        open_dataset(config(write(tmp_path, files)))


def test_needs_a_root():
    with pytest.raises(DataError, match=r"--data\.root"):
        open_dataset(DataConfig(name="mnist"))


def test_reads_the_real_mnist(shared_data):
    dataset = open_dataset(config(shared_data / "mnist"))
    pixels = dataset.train.images.double() / 255
    assert (len(dataset.train), len(dataset.test)) == (60_000, 10_000)
    assert dataset.train.labels[:8].tolist() == [5, 0, 4, 1, 9, 2, 1, 3]
    assert (pixels.mean().item(), pixels.std().item()) == pytest.approx((dataset.mean[0], dataset.std[0]), abs=1e-4)
