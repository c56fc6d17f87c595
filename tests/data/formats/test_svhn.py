"""SVHN: MATLAB files."""

import numpy as np
import pytest
import scipy.io

from dfad.data import DataConfig, open_dataset
from dfad.errors import DataError


def save(root, name, labels, images=None, dtype=np.uint8, **options):
    count = len(labels)
    if images is None:
        images = np.random.default_rng(0).integers(0, 256, (32, 32, 3, count), dtype=np.uint8)
    scipy.io.savemat(root / f"{name}_32x32.mat", {"X": images, "y": np.array(labels, dtype)[:, None]}, **options)
    return images


def config(root):
    return DataConfig(name="svhn", root=root)


def test_reads_images_and_counts_zero_as_ten(tmp_path):
    images = save(tmp_path, "train", [1, 10, 9])
    save(tmp_path, "test", [2, 10])
    dataset = open_dataset(config(tmp_path))
    assert dataset.train.labels.tolist() == [1, 0, 9]
    assert dataset.train.images[2, 1, 4, 7] == images[4, 7, 1, 2]


def test_damage_is_named(tmp_path):
    save(tmp_path, "train", [1, 2])
    save(tmp_path, "test", [1, 2])
    path = tmp_path / "test_32x32.mat"
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(DataError, match=r"test_32x32\.mat ends inside the element at offset 128"):
        open_dataset(config(tmp_path))


def test_another_format_is_named(tmp_path):
    save(tmp_path, "test", [1, 2])
    (tmp_path / "train_32x32.mat").write_bytes(b"\x89HDF" + bytes(200))
    with pytest.raises(DataError, match=r"train_32x32\.mat \(204 bytes\) is no MATLAB file of version 5"):
        open_dataset(config(tmp_path))


def test_compressed_files_are_read_alike(tmp_path):
    images = save(tmp_path, "train", [1, 2, 3], do_compression=True)
    save(tmp_path, "test", [1], do_compression=True)
    dataset = open_dataset(config(tmp_path))
    assert (dataset.train.images.numpy() == images.transpose(3, 2, 0, 1)).all()


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float64])
def test_labels_may_be_of_any_number_type(tmp_path, dtype):
    save(tmp_path, "train", [7, 10], dtype=dtype)
    save(tmp_path, "test", [1])
    assert open_dataset(config(tmp_path)).train.labels.tolist() == [7, 0]


def test_other_contents_are_named(tmp_path):
    save(tmp_path, "train", [1, 2], images=np.zeros((28, 28, 3, 2), np.uint8))
    with pytest.raises(DataError, match=r"train_32x32\.mat holds no X of shape \(32, 32, 3, images\)"):
        open_dataset(config(tmp_path))


def test_counts_must_agree(tmp_path):
    save(tmp_path, "train", [1, 2], images=np.zeros((32, 32, 3, 3), np.uint8))
    with pytest.raises(DataError, match="3 images and 2 labels"):
        open_dataset(config(tmp_path))


def test_a_label_out_of_range_is_named(tmp_path):
    save(tmp_path, "train", [1, 11])
    save(tmp_path, "test", [1, 2])
    with pytest.raises(DataError, match=r"train_32x32\.mat: label 11 of image 1"):
        open_dataset(config(tmp_path))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"There is no .*train_32x32\.mat"):
        open_dataset(config(tmp_path))
