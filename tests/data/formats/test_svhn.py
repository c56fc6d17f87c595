"""SVHN: MATLAB files, read only if they are the published ones."""

import hashlib
import sys
from dataclasses import replace

import numpy as np
import pytest
import scipy.io

from dfad.data import DataConfig, open_dataset
from dfad.data.formats import svhn
from dfad.errors import DataError


@pytest.fixture
def publish(tmp_path, monkeypatch):
    """Writes a file as if it were the published one; returns its images."""

    def call(name: str, labels: list[int]) -> np.ndarray:
        images = np.random.default_rng(0).integers(0, 256, (32, 32, 3, len(labels)), dtype=np.uint8)
        path = tmp_path / f"{name}_32x32.mat"
        scipy.io.savemat(path, {"X": images, "y": np.array(labels, np.uint8)[:, None]}, do_compression=True)
        md5 = hashlib.md5(path.read_bytes()).hexdigest()
        remotes = tuple(replace(r, md5=md5) if r.name == path.name else r for r in svhn.REMOTES)
        monkeypatch.setattr(svhn, "REMOTES", remotes)
        return images

    return call


def config(root):
    return DataConfig(name="svhn", root=root)


def test_reads_images_and_counts_zero_as_ten(publish, tmp_path):
    images = publish("train", [1, 10, 9])
    publish("test", [2, 10])
    dataset = open_dataset(config(tmp_path))
    assert dataset.train.labels.tolist() == [1, 0, 9]
    assert dataset.test.labels.tolist() == [2, 0]
    assert (dataset.train.images.numpy() == images.transpose(3, 2, 0, 1)).all()


@pytest.mark.parametrize("damage", [lambda content: content[:3000], lambda content: content[:-1] + b"?"])
def test_a_file_that_is_not_the_published_one_is_refused_unread(publish, damage, tmp_path, monkeypatch):
    publish("train", [1, 2])
    publish("test", [1, 2])
    path = tmp_path / "train_32x32.mat"
    path.write_bytes(damage(path.read_bytes()))
    monkeypatch.setattr(scipy.io, "loadmat", None)  # calling it would fail: damage crashes its parser
    with pytest.raises(DataError, match=r"train_32x32\.mat .* is damaged or not the official file: its MD5 is"):
        open_dataset(config(tmp_path))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"There is no .*train_32x32\.mat"):
        open_dataset(config(tmp_path))


def test_without_scipy_the_extra_is_named(publish, tmp_path, monkeypatch):
    publish("train", [1])
    publish("test", [1])
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(DataError, match=r"pip install 'dfad\[svhn\]'"):
        open_dataset(config(tmp_path))
