"""torchvision and Hugging Face, with stand-ins for the interfaces in use."""

import os
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from dfad.data import DataConfig, open_dataset
from dfad.errors import DataError


def samples(count, mode="RGB"):
    shape = (4, 5, 3) if mode == "RGB" else (4, 5)
    return [(Image.fromarray(np.full(shape, 10 * k, np.uint8)), k % 2) for k in range(count)]


class TrainFlag:
    """A data set like CIFAR10."""

    classes = ("even", "odd")

    def __init__(self, root, train=True, download=False):
        if download:
            raise RuntimeError("no network here")
        self.samples = samples(6 if train else 4)

    def __iter__(self):
        return iter(self.samples)


class SplitName(TrainFlag):
    """A data set like SVHN."""

    classes = None

    def __init__(self, root, split="train", download=False):
        super().__init__(root, split == "train")


class Whole:
    """A data set like ImageFolder, without splits."""

    classes = ("even", "odd")

    def __init__(self, root):
        self.samples = samples(20, "L")

    def __iter__(self):
        return iter(self.samples)


@pytest.fixture
def torchvision(monkeypatch):
    module = ModuleType("torchvision.datasets")
    module.TrainFlag, module.SplitName, module.Whole = TrainFlag, SplitName, Whole
    monkeypatch.setitem(sys.modules, "torchvision", ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.datasets", module)


@pytest.mark.parametrize("name", ["TrainFlag", "SplitName"])
@pytest.mark.usefixtures("torchvision")
def test_reads_torchvision(tmp_path, name):
    dataset = open_dataset(DataConfig(name=f"torchvision/{name}", root=tmp_path))
    assert dataset.train.images.shape == (6, 3, 4, 5)
    assert dataset.train.images[3].unique().tolist() == [30]
    assert dataset.test.labels.tolist() == [0, 1, 0, 1]
    assert dataset.classes == (("even", "odd") if name == "TrainFlag" else ("0", "1"))


@pytest.mark.usefixtures("torchvision")
def test_divides_what_torchvision_does_not(tmp_path):
    dataset = open_dataset(DataConfig(name="torchvision/Whole", root=tmp_path))
    assert (len(dataset.train), len(dataset.test), dataset.image_shape) == (16, 4, (1, 4, 5))


@pytest.mark.usefixtures("torchvision")
def test_errors_of_torchvision_are_told(tmp_path):
    with pytest.raises(DataError, match="no data set 'TrainFlags'. Did you mean 'TrainFlag'?"):
        open_dataset(DataConfig(name="torchvision/TrainFlags", root=tmp_path))
    with pytest.raises(DataError, match="cannot open TrainFlag in .*: no network here"):
        open_dataset(DataConfig(name="torchvision/TrainFlag", root=tmp_path, download=True))


FEATURES = {"img": type("Image", (), {})(), "label": type("ClassLabel", (), {"names": ("even", "odd")})()}


class Part(list):
    """A split of a Hugging Face data set."""

    features = FEATURES


@pytest.fixture
def datasets(monkeypatch):
    module = ModuleType("datasets")
    parts = {
        name: Part({"img": image, "label": label} for image, label in samples(count))
        for name, count in (("train", 6), ("validation", 4))
    }
    module.calls = []
    module.config = SimpleNamespace(HF_HUB_OFFLINE=True)
    module.load_dataset = lambda path: module.calls.append((path, os.environ.get("HF_HUB_OFFLINE"))) or parts
    module.load_from_disk = lambda path: parts["train"]
    monkeypatch.setitem(sys.modules, "datasets", module)
    monkeypatch.setenv("HF_HUB_OFFLINE", "")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    return module


@pytest.mark.parametrize("download", [True, False])
def test_reads_hugging_face(datasets, download):
    dataset = open_dataset(DataConfig(name="huggingface/someone/pictures", download=download))
    assert datasets.calls == [("someone/pictures", None if download else "1")]
    assert (len(dataset.train), len(dataset.test), dataset.classes) == (6, 4, ("even", "odd"))
    assert dataset.train.images[3].unique().tolist() == [30]


def test_nothing_is_fetched_where_hugging_face_is_online_already(datasets):
    datasets.config.HF_HUB_OFFLINE = False
    with pytest.raises(DataError, match="would be looked for on the network"):
        open_dataset(DataConfig(name="huggingface/someone/pictures"))
    assert not datasets.calls


@pytest.mark.usefixtures("datasets")
def test_reads_what_hugging_face_saved(tmp_path):
    dataset = open_dataset(DataConfig(name="huggingface", root=tmp_path, test_fraction=0.34))
    assert (len(dataset.train), len(dataset.test)) == (3, 3)


@pytest.mark.parametrize("name", ["torchvision/CIFAR10", "huggingface/mnist"])
def test_a_missing_package_is_named(tmp_path, monkeypatch, name):
    module = {"torchvision/CIFAR10": "torchvision.datasets", "huggingface/mnist": "datasets"}[name]
    monkeypatch.setitem(sys.modules, module, None)  # makes the import fail
    with pytest.raises(DataError, match=f"needs the package {module.partition('.')[0]}"):
        open_dataset(DataConfig(name=name, root=tmp_path))
