"""Image folders, as folder and archive, whole and damaged."""

import pytest
import torch

from dfad.data import DataConfig, open_dataset
from dfad.errors import DataError

from ..conftest import CLASSES, below, folder_files, picture, tar, write

SPLIT_FILES = {**below("train", folder_files()), **below("test", folder_files(2))}


def config(root, **options):
    return DataConfig(name="folder", root=root, **options)


@pytest.mark.parametrize("form", ["folder", ".tar", ".tar.xz", "wrapped.tar.xz"])
def test_reads_train_and_test(tmp_path, form):
    files = below("images", SPLIT_FILES) if form.startswith("wrapped") else SPLIT_FILES
    root = write(tmp_path / "root", files) if form == "folder" else tar(tmp_path / f"images{form}", files)
    dataset = open_dataset(config(root))
    assert dataset.classes == CLASSES
    assert dataset.image_shape == (3, 6, 8)
    assert dataset.train.labels.tolist() == [0] * 5 + [1] * 5 + [2] * 5
    assert dataset.test.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert torch.equal(dataset.test.decoded().images[3], dataset.train.decoded().images[6])  # dog/1.jpg


@pytest.mark.parametrize("names", [("training", "testing"), ("Train", "Test"), ("TRAIN", "Val")])
def test_folders_of_train_and_test_images_have_several_names(tmp_path, names):
    files = {**below(names[0], folder_files()), **below(names[1], folder_files(2))}
    dataset = open_dataset(config(write(tmp_path, files)))
    assert dataset.classes == CLASSES
    assert (len(dataset.train), len(dataset.test)) == (15, 6)


def test_a_folder_of_train_images_is_no_class(tmp_path):
    files = {**below("train", folder_files()), **below("holdout", folder_files(2))}
    with pytest.raises(DataError, match=r"no folder of test images, called one of test, .* are: holdout, train\."):
        open_dataset(config(write(tmp_path, files)))


def test_train_may_be_a_class(tmp_path):
    files = {f"{name}/{number}.jpg": picture(number) for name in ("car", "test", "train") for number in range(5)}
    assert open_dataset(config(write(tmp_path, files))).classes == ("car", "test", "train")


def test_folders_beside_train_and_test_are_named(tmp_path, caplog):
    caplog.set_level("INFO")
    open_dataset(config(write(tmp_path, {**SPLIT_FILES, "val/cat/0.jpg": picture(0)})))
    assert "only train and test are read, not val" in caplog.text


def test_mean_and_deviation_are_those_of_the_train_images(tmp_path):
    dataset = open_dataset(config(write(tmp_path, SPLIT_FILES)))
    pixels = dataset.train.decoded().images.double() / 255
    assert dataset.mean == pytest.approx(pixels.mean((0, 2, 3)).tolist())
    assert dataset.std == pytest.approx(pixels.permute(1, 0, 2, 3).flatten(1).std(1, correction=0).tolist())


def test_holds_out_a_fixed_part_of_every_class(tmp_path):
    root = write(tmp_path, folder_files(10))
    first, second = (open_dataset(config(root, test_fraction=0.3)) for _ in range(2))
    assert torch.bincount(first.test.labels).tolist() == [3, 3, 3]
    held_out = {str(blob) for blob in first.test.blobs}
    assert held_out == {str(blob) for blob in second.test.blobs}
    assert held_out.isdisjoint(str(blob) for blob in first.train.blobs)
    assert len(first.train) == 21


def test_a_class_of_one_image_cannot_be_divided(tmp_path):
    with pytest.raises(DataError, match="cannot be divided into train and test images of every class"):
        open_dataset(config(write(tmp_path, {**folder_files(), "eel2/0.jpg": picture(0)})))


def test_grey_images_have_one_channel(tmp_path):
    assert open_dataset(config(write(tmp_path, folder_files(mode="L")))).image_shape == (1, 6, 8)


def test_size_and_channels_can_be_asked_for(tmp_path):
    files = {**folder_files(), "cat/9.jpg": picture(9, size=(20, 30)), "dog/9.png": picture(9, mode="L", kind="png")}
    dataset = open_dataset(config(write(tmp_path, files), image_size=12, channels=3))
    assert dataset.train.decoded().images.shape == (13, 3, 12, 12)


BAD_FILES = {
    "cut": (picture(9)[:-100], "cannot be decoded as an image"),
    "no image": (b"hello", r"\(5 bytes\) cannot be decoded as an image: cannot identify image file"),
    "empty": (b"", r"\(0 bytes\) cannot be decoded"),
    "greyscale among RGB": (picture(9, mode="L"), "is greyscale .mode L., others are in colour.*--data.channels"),
    "other size": (picture(9, size=(9, 9)), "has 9×9 pixels, others have 8×6.*--data.image_size"),
}


@pytest.mark.parametrize("archived", [True, False])
@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_bad_file_is_named(tmp_path, kind, archived):
    content, message = BAD_FILES[kind]
    files = {**SPLIT_FILES, "train/dog/9.jpg": content}
    root = tar(tmp_path / "images.tar", files) if archived else write(tmp_path, files)
    with pytest.raises(DataError, match=message) as raised:
        open_dataset(config(root))
    assert ("images.tar, member train/dog/9.jpg" if archived else "train/dog/9.jpg") in str(raised.value)


def test_bad_files_are_skipped_and_listed_where_that_is_asked_for(tmp_path, caplog):
    caplog.set_level("INFO")
    bad = {f"train/cat/bad{number}.jpg": content for number, (content, _) in enumerate(BAD_FILES.values())}
    dataset = open_dataset(config(write(tmp_path, {**SPLIT_FILES, **bad}), skip_corrupt=True))
    assert len(dataset.train) == 15
    assert dataset.train.labels.tolist() == [0] * 5 + [1] * 5 + [2] * 5
    assert len(dataset.skipped) == len(bad)
    assert all(any(name in reason for reason in dataset.skipped) for name in bad)
    assert f"{len(bad)} corrupt files were skipped" in caplog.text
    assert "bad0.jpg" in caplog.text


def test_linked_classes_files_and_folders_inside_them_are_followed(tmp_path):
    store = write(tmp_path / "store", {**folder_files(5), **below("more", {f"{n}.jpg": picture(n) for n in range(3)})})
    root = tmp_path / "root"
    (root / "dog" / "inner").mkdir(parents=True)
    (root / "cat").symlink_to(store / "cat")  # a class
    (root / "dog" / "linked").symlink_to(store / "more")  # a folder inside one
    for number in range(5):
        (root / "dog" / "inner" / f"{number}.jpg").symlink_to(store / "dog" / f"{number}.jpg")
    dataset = open_dataset(config(root))
    assert dataset.classes == ("cat", "dog")
    assert torch.bincount(torch.cat([dataset.train.labels, dataset.test.labels])).tolist() == [5, 8]


def test_a_link_to_a_folder_around_it_is_not_followed(tmp_path, caplog):
    root = write(tmp_path / "root", folder_files())
    (root / "cat" / "again").symlink_to(root)
    (root / "eel" / "dogs").symlink_to(root / "dog")
    (root / "dog" / "eels").symlink_to(root / "eel")
    dataset = open_dataset(config(root))
    # each of dog and eel holds the other's images as well, but not its own a second time
    assert torch.bincount(torch.cat([dataset.train.labels, dataset.test.labels])).tolist() == [5, 10, 10]
    assert caplog.text.count("is a link to a parent folder; it is not followed") == 3
    assert f"{root / 'cat' / 'again'} is a link" in caplog.text


def test_a_link_that_leads_nowhere_is_named(tmp_path):
    root = write(tmp_path / "root", folder_files())
    (root / "cat" / "gone.jpg").symlink_to(tmp_path / "gone.jpg")
    with pytest.raises(DataError, match=r"cat/gone\.jpg cannot be read: No such file"):
        _ = [split.decoded() for dataset in [open_dataset(config(root))] for split in (dataset.train, dataset.test)]
    assert len(open_dataset(config(root, skip_corrupt=True)).skipped) == 1


def test_a_link_to_itself_is_a_file_that_cannot_be_read(tmp_path):
    root = write(tmp_path / "root", SPLIT_FILES)
    (root / "train" / "cat" / "loop").symlink_to("loop")
    (root / "test" / "loop").symlink_to("loop")
    assert open_dataset(config(root)).classes == CLASSES
    (root / "train" / "cat" / "loop.jpg").symlink_to("loop.jpg")
    with pytest.raises(DataError, match=r"cat/loop\.jpg cannot be read: Too many levels"):
        open_dataset(config(root))


def test_names_need_not_be_utf8(tmp_path):
    root = write(tmp_path, {**SPLIT_FILES, "train/\udce4/\udcff.jpg": picture(7)})
    dataset = open_dataset(config(root))
    assert dataset.classes == (*CLASSES, "\udce4")
    assert dataset.fingerprint != open_dataset(config(write(tmp_path / "other", SPLIT_FILES))).fingerprint


@pytest.mark.parametrize("form", ["folder", ".tar"])
def test_what_is_hidden_is_not_counted(tmp_path, form):
    hidden = {
        "cat/.ipynb_checkpoints/0.jpg": picture(7),
        "cat/._0.jpg": b"Mac OS X",
        ".thumbnails/0.jpg": picture(8),
        "__MACOSX/cat/._0.jpg": b"Mac OS X",
    }
    files = below("images", {**folder_files(), **hidden}) | {"._images": b"Mac OS X", ".DS_Store": b"x"}
    root = write(tmp_path / "root", files) if form == "folder" else tar(tmp_path / f"images{form}", files)
    dataset = open_dataset(config(root))
    assert dataset.classes == CLASSES
    assert len(dataset.train) + len(dataset.test) == 15


def test_an_empty_class_is_named(tmp_path):
    root = write(tmp_path, SPLIT_FILES)
    (root / "train" / "fox").mkdir()
    with pytest.raises(DataError, match="the class folder train/fox holds no image"):
        open_dataset(config(root))


def test_a_class_without_train_images_is_named(tmp_path):
    with pytest.raises(DataError, match="test/fox is a class that train/ lacks"):
        open_dataset(config(write(tmp_path, {**SPLIT_FILES, "test/fox/0.jpg": picture(0)})))


def test_other_files_are_left_out(tmp_path, caplog):
    caplog.set_level("INFO")
    others = {"train/cat/Thumbs.db": b"x", "train/0.jpg": picture(0)}
    dataset = open_dataset(config(write(tmp_path, {**SPLIT_FILES, **others})))
    assert len(dataset.train) == 15
    assert "2 files outside the folders of classes or without the name of an image were skipped" in caplog.text


def test_a_folder_without_classes_is_named(tmp_path):
    with pytest.raises(DataError, match="holds no folders of classes"):
        open_dataset(config(write(tmp_path, {"0.jpg": picture(0)})))


def test_reads_the_real_jpegs(shared_data):
    dataset = open_dataset(config(shared_data / "cifar10-jpeg.tar.xz"))
    assert (len(dataset.train), len(dataset.test), dataset.image_shape) == (50_000, 10_000, (3, 32, 32))
    assert dataset.classes[0] == "airplane"
    assert dataset.mean == pytest.approx((0.4914, 0.4822, 0.4465), abs=2e-3)
