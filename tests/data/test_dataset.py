"""What all data sets have in common: the catalog, digits, fingerprints, configuration."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from dfad.data import DataConfig, Dataset, open_dataset
from dfad.data.decoded import DecodedSplit
from dfad.errors import DataError

from .conftest import folder_files, write


def small(**changes):
    torch.manual_seed(0)
    train = DecodedSplit(torch.randint(0, 256, (6, 1, 4, 4), dtype=torch.uint8), torch.tensor([0, 1, 0, 1, 0, 1]))
    test = DecodedSplit(train.images[:2], train.labels[:2])
    return Dataset(
        **{
            "name": "small",
            "classes": ("a", "b"),
            "mean": (0.5,),
            "std": (0.2,),
            "train": train,
            "test": test,
            **changes,
        }
    )


def test_the_trainer_has_no_way_to_data():
    program = (
        "import sys, dfad.distillation.distiller; print([name for name in sys.modules if name.startswith('dfad.data')])"
    )
    assert subprocess.check_output([sys.executable, "-c", program], text=True).strip() == "[]"


def test_digits_are_divided_once_and_for_all():
    first, second = open_dataset(DataConfig()), open_dataset(DataConfig())
    assert (len(first.train), len(first.test), first.image_shape) == (1437, 360, (1, 8, 8))
    assert first.fingerprint == second.fingerprint
    assert torch.bincount(first.test.labels).min() >= 35
    assert first.train.images.max() == 255


def test_the_fingerprint_tells_pixels_labels_classes_and_order():
    reference = small()
    train = reference.train
    brighter = train.images.clone()
    brighter[3, 0, 2, 2] += 1
    relabelled = train.labels.clone()
    relabelled[4] = 1
    others = [
        small(train=DecodedSplit(brighter, train.labels)),
        small(train=DecodedSplit(train.images, relabelled)),
        small(classes=("a", "c")),
        small(train=train.subset([1, 0, 2, 3, 4, 5])),
        small(train=reference.test, test=train),
    ]
    assert small().fingerprint == reference.fingerprint
    assert len({dataset.fingerprint for dataset in others} | {reference.fingerprint}) == 6


def test_the_fingerprint_of_files_tells_their_bytes(tmp_path):
    def fingerprint(name, files):
        return open_dataset(DataConfig(name="folder", root=write(tmp_path / name, files))).fingerprint

    files = folder_files()
    changed = {**files, "cat/1.jpg": files["cat/2.jpg"]}
    assert fingerprint("here", files) == fingerprint("there", files) != fingerprint("changed", changed)


def test_labels_out_of_range_are_named():
    with pytest.raises(DataError, match=r"small \(train\): label 1 of image 1 is out of range; there are 1 classes"):
        small(classes=("a",))


def test_an_empty_split_is_named():
    with pytest.raises(DataError, match="holds no test images"):
        small(test=small().train.subset([]))


def test_an_unknown_name_is_an_error_with_the_nearest():
    with pytest.raises(DataError, match="no data set 'minst'. Did you mean 'mnist'?"):
        open_dataset(DataConfig(name="minst"))


@pytest.mark.parametrize("options", [{"test_fraction": 1.0}, {"test_fraction": 0.0}, {"image_size": 0}], ids=str)
def test_configuration_is_validated(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        replace(DataConfig(), **options)
