"""CIFAR: python and binary versions, archives and folders, and pickles that hold more than they should."""

import os
import pickle

import numpy as np
import pytest

from dfad.data import DataConfig, open_dataset
from dfad.errors import DataError

from ..conftest import below, cifar_arrays, cifar_files, tar, write

FOLDERS = {
    ("python", 10): "cifar-10-batches-py",
    ("binary", 10): "cifar-10-batches-bin",
    ("python", 100): "cifar-100-python",
    ("binary", 100): "cifar-100-binary",
}


def lay_out(tmp_path, form, version, classes):
    files = cifar_files(version, classes)
    folder = FOLDERS[version, classes]
    if form == "folder":
        return write(tmp_path, files)
    if form == "folder below":
        write(tmp_path / folder, files)
        return tmp_path
    archive = tar(tmp_path / f"any{form}", below(folder, files))
    return archive


@pytest.mark.parametrize("form", ["folder", "folder below", ".tar.gz", ".tar.xz", ".tar"])
@pytest.mark.parametrize(("version", "classes"), FOLDERS)
def test_reads_every_official_form(tmp_path, form, version, classes):
    root = lay_out(tmp_path, form, version, classes)
    dataset = open_dataset(DataConfig(name=f"cifar{classes}", root=root))
    first_pixels, first_labels = cifar_arrays(7 if classes == 10 else 12, classes, seed=0)
    assert len(dataset.train) == 12
    assert (dataset.train.images[: len(first_pixels)].numpy() == first_pixels.reshape(-1, 3, 32, 32)).all()
    assert dataset.train.labels[: len(first_labels)].tolist() == first_labels.tolist()
    assert len(dataset.test) == 4
    assert dataset.classes == tuple(f"class {number}" for number in range(classes))


def test_finds_the_archive_in_its_folder(tmp_path):
    tar(tmp_path / "cifar-10-python.tar.gz", below("cifar-10-batches-py", cifar_files("python", 10)))
    assert len(open_dataset(DataConfig(name="cifar10", root=tmp_path)).train) == 12


class RunsCode:
    def __reduce__(self):
        return os.system, ("touch ran",)


def pixels(count=7):
    return np.zeros((count, 3072), np.uint8)


BAD_PICKLES = {
    "code": (pickle.dumps({b"data": RunsCode()}), "names (posix|nt).system.*none of its code was run"),
    "other NumPy function": (pickle.dumps(np.frombuffer), "names numpy"),
    "truncated": (cifar_files("python", 10)["data_batch_1"][:500], "not read beyond offset"),
    "empty": (b"", "Ran out of input"),
    "no dictionary": (pickle.dumps([1]), "holds a list"),
    "no data": (pickle.dumps({b"labels": [1]}), "no array 'data'"),
    "data of another type": (
        pickle.dumps({b"data": pixels().astype(float), b"labels": [1] * 7}),
        "not rows of unsigned bytes",
    ),
    "objects as data": (
        pickle.dumps({b"data": np.array([["x"] * 3072], object), b"labels": [1]}),
        "not rows of unsigned bytes",
    ),
    "data in columns": (
        pickle.dumps({b"data": np.asfortranarray(pixels()), b"labels": [1] * 7}),
        "not rows of unsigned bytes",
    ),
    "data of another shape": (pickle.dumps({b"data": pixels().T.copy(), b"labels": [1] * 7}), "no array 'data'"),
    "fewer labels": (pickle.dumps({b"data": pixels(), b"labels": [1] * 6}), "no list 'labels' of 7"),
    "text as labels": (pickle.dumps({b"data": pixels(), b"labels": ["1"] * 7}), "no list 'labels' of 7"),
    "label out of range": (
        pickle.dumps({b"data": pixels(), b"labels": [1, 2, 11, 3, 4, 5, 6]}),
        "label 11 of image 2",
    ),
}


@pytest.mark.parametrize("kind", BAD_PICKLES)
def test_bad_pickles_are_named_and_never_run(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    content, message = BAD_PICKLES[kind]
    files = {**cifar_files("python", 10), "data_batch_1": content}
    with pytest.raises(DataError, match=message) as raised:
        open_dataset(DataConfig(name="cifar10", root=write(tmp_path, files)))
    assert "data_batch_1" in str(raised.value)
    assert not (tmp_path / "ran").exists()


def test_a_pickle_without_class_names_is_refused(tmp_path):
    files = {**cifar_files("python", 10), "batches.meta": pickle.dumps({b"label_names": 3})}
    with pytest.raises(DataError, match=r"batches\.meta holds no list label_names"):
        open_dataset(DataConfig(name="cifar10", root=write(tmp_path, files)))


def test_a_cut_record_is_named_with_its_offset(tmp_path):
    files = cifar_files("binary", 10)
    files["data_batch_2.bin"] = files["data_batch_2.bin"][:5000]
    with pytest.raises(DataError, match=r"data_batch_2\.bin ends at offset 5000, inside record 1 of 3073 bytes"):
        open_dataset(DataConfig(name="cifar10", root=write(tmp_path, files)))


def test_a_label_out_of_range_is_named(tmp_path):
    files = cifar_files("binary", 10)
    files["test_batch.bin"] = b"\x0a" + files["test_batch.bin"][1:]
    with pytest.raises(DataError, match=r"test_batch\.bin: label 10 of image 0"):
        open_dataset(DataConfig(name="cifar10", root=write(tmp_path, files)))


@pytest.mark.parametrize("missing", ["test_batch.bin", "batches.meta.txt"])
def test_a_missing_part_is_named(tmp_path, missing):
    files = cifar_files("binary", 10)
    del files[missing]
    with pytest.raises(DataError, match=f"no {missing}"):
        open_dataset(DataConfig(name="cifar10", root=write(tmp_path, files)))


def test_another_data_set_is_not_taken_for_it(tmp_path):
    with pytest.raises(DataError, match="does not hold cifar100"):
        open_dataset(DataConfig(name="cifar100", root=write(tmp_path, cifar_files("binary", 10))))


def test_reads_the_real_images(shared_data):
    dataset = open_dataset(DataConfig(name="cifar10", root=shared_data / "cifar10-lossless-5k.tar.xz"))
    assert (len(dataset.train), len(dataset.test)) == (4000, 1000)
    assert dataset.classes[dataset.test.labels[0]] == "cat"
    means = dataset.train.images.double().mean((0, 2, 3)) / 255
    assert means.tolist() == pytest.approx(dataset.mean, abs=0.01)
