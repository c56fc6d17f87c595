"""Both backends carry out a plan in the same way: same images, order and numbers, every image once."""

import pytest
import torch
from torch.testing import assert_close

from dfad.data import AugmentConfig, DataConfig, backends, batch_source, in_order, open_dataset, shuffled
from dfad.data.dali import DaliBackend, dali_installed
from dfad.data.native import NativeBackend
from dfad.errors import DataError

from .conftest import folder_files, mnist_files, picture, tar, write
from .formats.test_webdataset import shard

CPU = torch.device("cpu")

DECODER_TOLERANCE = 1 / 255
"""Largest difference of a pixel between the decoders, in 0–1: one step of a byte."""

needs_dali = pytest.mark.skipif(not dali_installed(), reason="NVIDIA DALI is not installed (extra dali)")

AUGMENT = AugmentConfig(flip=True, translate=2, cutout=3)


@pytest.fixture
def dataset(tmp_path):
    return open_dataset(DataConfig(name="folder", root=write(tmp_path / "images", folder_files(10))))


def collect(source, plan, batch_size=4, drop_last=False):
    batches = list(source.batches(plan, batch_size, drop_last=drop_last))
    return torch.cat([images for images, _ in batches]), torch.cat([labels for _, labels in batches])


def native(dataset, split=None):
    return NativeBackend(split or dataset.train, dataset.mean, dataset.std, CPU)


def test_evaluation_sees_every_image_once_in_order(dataset):
    images, labels = collect(native(dataset), in_order(len(dataset.train)), batch_size=7)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (dataset.mean, dataset.std))
    assert torch.equal(labels, dataset.train.labels)
    assert_close(images * std + mean, dataset.train.decoded().images / 255)


def test_training_images_are_normalised(dataset):
    images, _ = collect(native(dataset), in_order(len(dataset.train)))
    assert_close(images.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    assert_close(images.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-5, rtol=0)


def test_an_epoch_is_a_permutation_that_its_number_decides(dataset):
    def plan(epoch, seed=3):
        return shuffled(24, dataset.image_shape, AUGMENT, seed=seed, epoch=epoch)

    first, again, next_one, other = plan(0), plan(0), plan(1), plan(0, seed=4)
    assert sorted(first.indices.tolist()) == list(range(24))
    for field in ("indices", "shifts", "flips", "holes"):
        assert torch.equal(getattr(first, field), getattr(again, field))
        assert not torch.equal(getattr(first, field), getattr(next_one, field))
        assert not torch.equal(getattr(first, field), getattr(other, field))


def test_the_draws_cover_their_range():
    plan = shuffled(4000, (1, 8, 8), AUGMENT, seed=0, epoch=0)
    assert plan.shifts.unique().tolist() == [-2, -1, 0, 1, 2]
    assert plan.flips.float().mean() == pytest.approx(0.5, abs=0.05)
    assert plan.holes.unique().tolist() == list(range(-1, 7))


def test_a_short_last_batch_is_kept_or_dropped(dataset):
    def sizes(drop_last):
        return [len(labels) for _, labels in native(dataset).batches(in_order(24), 7, drop_last=drop_last)]

    assert sizes(drop_last=False) == [7, 7, 7, 3]
    assert sizes(drop_last=True) == [7, 7, 7]


def test_augmentation_is_what_the_plan_says(dataset):
    plan = shuffled(24, dataset.image_shape, AUGMENT, seed=1, epoch=0)
    images, labels = collect(native(dataset), plan)
    pixels = dataset.train.decoded().images.float() / 255
    mean, std = (torch.tensor(values) for values in (dataset.mean, dataset.std))
    for place in range(24):
        (down, right), (row, column) = plan.shifts[place].tolist(), plan.holes[place].tolist()
        source = pixels[plan.indices[place]]
        expected = torch.zeros(3, 6, 8)
        for y in range(6):
            for x in range(8):
                from_y, from_x = y + down, (7 - x if plan.flips[place] else x) + right
                inside = 0 <= from_y < 6 and 0 <= from_x < 8
                value = source[:, from_y, from_x] if inside else torch.zeros(3)
                cut = row <= y < row + 3 and column <= x < column + 3
                expected[:, y, x] = torch.zeros(3) if cut else (value - mean) / std
        assert_close(images[place], expected, atol=1e-5, rtol=1e-5)
        assert labels[place] == dataset.train.labels[plan.indices[place]]


@needs_dali
@pytest.mark.parametrize("kind", ["folder", "grey folder", "tar.xz", "webdataset", "resized"])
@pytest.mark.parametrize("augmented", [True, False])
def test_dali_gives_the_same_numbers(tmp_path, kind, augmented):
    options = {"mode": "L"} if kind == "grey folder" else {}
    if kind == "webdataset":
        config = DataConfig(name="webdataset", root=tar(tmp_path / "all.tar", shard(0, 30)))
    elif kind == "tar.xz":
        config = DataConfig(name="folder", root=tar(tmp_path / "all.tar.xz", folder_files(10)))
    else:
        files = folder_files(10, **options)
        if kind == "resized":
            files["cat/big.jpg"] = picture(77, size=(16, 16))
        size = 12 if kind == "resized" else None
        config = DataConfig(name="folder", root=write(tmp_path, files), image_size=size)
    dataset = open_dataset(config)
    count = len(dataset.train)
    plan = shuffled(count, dataset.image_shape, AUGMENT, seed=5, epoch=2) if augmented else in_order(count)
    dali = DaliBackend(dataset.train, dataset.mean, dataset.std, CPU)
    images, labels = collect(dali, plan, batch_size=7)
    expected, expected_labels = collect(native(dataset), plan, batch_size=7)
    assert torch.equal(labels, expected_labels)
    difference = (images - expected).abs() * torch.tensor(dataset.std).view(-1, 1, 1)
    steps = 3 if kind == "resized" else 1  # two roundings more, of the two passes of resizing
    assert difference.max() <= steps * DECODER_TOLERANCE
    assert images.is_contiguous()


@needs_dali
def test_dali_sees_every_image_once_in_every_epoch(dataset):
    source = DaliBackend(dataset.train, dataset.mean, dataset.std, CPU)
    for _ in range(2):
        sizes = [len(labels) for _, labels in source.batches(in_order(24), 7, drop_last=False)]
        assert sizes == [7, 7, 7, 3]


@needs_dali
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (picture(0)[:-40], "cannot be decoded"),
        (b"hello", "cannot be decoded"),
        (picture(0, mode="L"), "is greyscale"),
        (picture(0, size=(9, 9)), "has 9×9 pixels"),
    ],
)
def test_dali_names_a_bad_file(tmp_path, content, message):
    root = write(tmp_path, folder_files(10))
    dataset = open_dataset(DataConfig(name="folder", root=root))
    victim = dataset.train.blobs[13].path
    victim.write_bytes(content)
    source = DaliBackend(dataset.train, dataset.mean, dataset.std, CPU)
    with pytest.raises(DataError, match=message) as raised:
        collect(source, in_order(24))
    assert str(victim) in str(raised.value)


def test_auto_keeps_small_data_resident_and_says_so(dataset, caplog):
    caplog.set_level("INFO")
    source = batch_source(dataset, dataset.train, "auto", CPU)
    assert source.name == "native"
    assert "Data backend: native, for 24 images of folder: decoded they take" in caplog.text


@pytest.mark.parametrize("installed", [True, False])
def test_auto_leaves_large_data_to_dali_where_it_is_installed(dataset, monkeypatch, caplog, installed):
    caplog.set_level("INFO")
    monkeypatch.setattr(backends, "usable_memory", lambda device: 1000)
    monkeypatch.setattr(backends, "dali_installed", lambda: installed)
    monkeypatch.setattr("dfad.data.dali.dali_installed", lambda: installed)
    source = batch_source(dataset, dataset.train, "auto", CPU)
    assert source.name == ("dali" if installed else "native")
    assert f"Data backend: {source.name}" in caplog.text
    assert ("not installed (extra dali)" in caplog.text) == (not installed)


def test_auto_keeps_pixels_and_says_so(tmp_path, caplog):
    caplog.set_level("INFO")
    dataset = open_dataset(DataConfig(name="mnist", root=write(tmp_path, mnist_files())))
    assert batch_source(dataset, dataset.test, "auto", CPU).name == "native"
    assert "Data backend: native, for 10 images of mnist: they are stored as pixels" in caplog.text


def test_dali_missing_is_an_error_where_it_is_asked_for(dataset, monkeypatch):
    monkeypatch.setattr("dfad.data.dali.dali_installed", lambda: False)
    with pytest.raises(DataError, match=r"pip install 'dfad\[dali\]'"):
        batch_source(dataset, dataset.train, "dali", CPU)


def test_dali_is_not_for_pixels(tmp_path):
    dataset = open_dataset(DataConfig(name="mnist", root=write(tmp_path, mnist_files())))
    with pytest.raises(DataError, match="mnist is stored as pixels"):
        batch_source(dataset, dataset.train, "dali", CPU)


@pytest.mark.gpu
def test_batches_are_on_the_gpu(dataset):
    device = torch.device("cuda")
    for backend in ("native", "dali") if dali_installed() else ("native",):
        source = batch_source(dataset, dataset.train, backend, device)
        plan = shuffled(24, dataset.image_shape, AUGMENT, seed=1, epoch=0)
        images, labels = collect(source, plan)
        expected, expected_labels = collect(native(dataset), plan)
        assert images.device.type == labels.device.type == "cuda"
        assert torch.equal(labels.cpu(), expected_labels)
        steps = 1 if backend == "native" else 8  # the decoder of the GPU rounds otherwise
        difference = (images.cpu() - expected).abs() * torch.tensor(dataset.std).view(-1, 1, 1)
        assert difference.max() <= steps * DECODER_TOLERANCE
