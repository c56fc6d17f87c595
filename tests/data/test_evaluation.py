"""The evaluation set against the networks, before a run."""

import pytest
import torch
from torch import nn

from dfad import models
from dfad.data import DataConfig
from dfad.data.evaluation import Evaluator
from dfad.errors import ModelError

DIGITS = DataConfig(name="digits")


@pytest.fixture(scope="module")
def evaluator() -> Evaluator:
    return Evaluator(DIGITS, torch.device("cpu"))


def network(classes: int = 10, channels: int = 1) -> nn.Module:
    return models.convnet(channels=(4,), num_classes=classes, in_channels=channels)


def test_what_fits_is_measured(evaluator, caplog):
    evaluator.require_fitting(network(), (1, 8, 8))
    assert 0 <= evaluator(network()) <= 1
    assert not caplog.text


def test_other_sizes_are_measured_and_said(evaluator, caplog):
    evaluator.require_fitting(network(), (1, 28, 28))
    assert "images of 8×8 pixels, the size of digits; the teacher's images are 28×28" in caplog.text


@pytest.mark.parametrize(
    ("found", "shape", "message"),
    [
        (network(classes=7), (1, 8, 8), "ConvNet has 7 classes and digits 10"),
        (network(channels=3), (3, 8, 8), "images of digits have 1 channels, those of the teacher 3.*--no_evaluate"),
        (
            nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2 * 26 * 26, 10)),
            (1, 28, 28),
            r"does not take the images of digits \(1, 8, 8\).*--data\.image_size 28",
        ),
    ],
    ids=["classes", "channels", "size"],
)
def test_what_does_not_fit_is_refused(evaluator, found, shape, message):
    with pytest.raises(ModelError, match=message):
        evaluator.require_fitting(found, shape)


def test_a_normalisation_of_other_channels_is_refused():
    with pytest.raises(ModelError, match=r"mean \(0.1, 0.2, 0.3\) .* those of digits have 1 channels"):
        Evaluator(DIGITS, torch.device("cpu"), ((0.1, 0.2, 0.3), (1.0, 1.0, 1.0)))
