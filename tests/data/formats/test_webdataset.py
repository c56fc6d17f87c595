"""WebDataset shards."""

import pytest

from dfad.data import DataConfig, open_dataset
from dfad.errors import DataError

from ..conftest import picture, tar


def shard(first, count, labels=3):
    members = {}
    for number in range(first, first + count):
        members[f"{number:06d}.jpg"] = picture(number)
        members[f"{number:06d}.cls"] = str(number % labels).encode()
    return members


def config(root):
    return DataConfig(name="webdataset", root=root)


def test_reads_shards_in_order(tmp_path):
    for index in range(3):
        tar(tmp_path / f"digits-train-{index:06d}.tar", shard(4 * index, 4))
    tar(tmp_path / "digits-test-000000.tar", shard(50, 5))
    dataset = open_dataset(config(tmp_path))
    assert dataset.train.labels.tolist() == [number % 3 for number in range(12)]
    assert [blob.member for blob in dataset.train.blobs][:5] == [f"{n:06d}.jpg" for n in range(5)]
    assert len(dataset.test) == 5
    assert dataset.classes == ("0", "1", "2")
    assert dataset.train.decoded().images.shape == (12, 3, 6, 8)


def test_a_single_shard_is_divided(tmp_path):
    dataset = open_dataset(config(tar(tmp_path / "all.tar", shard(0, 30))))
    assert (len(dataset.train), len(dataset.test)) == (24, 6)


def test_classes_are_named_by_a_file_beside_the_shards(tmp_path):
    tar(tmp_path / "all.tar", shard(0, 30))
    for content in ("cat\ndog\neel\n", "\ufeffcat\r\ndog\r\neel"):
        (tmp_path / "classes.txt").write_bytes(content.encode())
        assert open_dataset(config(tmp_path)).classes == ("cat", "dog", "eel")
    (tmp_path / "classes.txt").write_bytes("cat\ndog\nä".encode("latin-1"))
    assert open_dataset(config(tmp_path)).classes == ("cat", "dog", "\ufffd")


def test_a_label_out_of_range_is_named(tmp_path):
    tar(tmp_path / "train-0.tar", shard(0, 30))
    tar(tmp_path / "test-0.tar", shard(0, 30))
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    with pytest.raises(DataError, match="label 2 of image 2 is out of range"):
        open_dataset(config(tmp_path))


BAD = {
    "no label": ({"000099.jpg": picture(0)}, "the sample 000099 has no file .cls"),
    "no image": ({"000099.cls": b"1"}, "the sample 000099 has no image"),
    "no number": ({"000099.jpg": picture(0), "000099.cls": b"cat"}, r"member 000099\.cls holds b'cat'"),
    "two images": ({"000001.seg.png": picture(0)}, "the sample 000001 has both 000001.jpg and 000001.seg.png"),
    "negative": ({"000099.jpg": picture(0), "000099.cls": b"-1"}, "label -1 of image 30"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_samples_are_named(tmp_path, kind):
    members, message = BAD[kind]
    tar(tmp_path / "train-0.tar", {**shard(0, 30), **members})
    tar(tmp_path / "val-0.tar", shard(0, 30))
    with pytest.raises(DataError, match=message):
        open_dataset(config(tmp_path))


def test_a_folder_without_shards_is_named(tmp_path):
    with pytest.raises(DataError, match="holds no shards"):
        open_dataset(config(tmp_path))


def test_shards_of_test_images_alone_are_named(tmp_path):
    tar(tmp_path / "test-0.tar", shard(0, 30))
    with pytest.raises(DataError, match=f"{tmp_path} holds no images to train on"):
        open_dataset(config(tmp_path))
