"""The results of a finished run."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from dfad.config import StudentConfig, TeacherConfig
from dfad.distillation.distiller import Distiller
from dfad.models.generator import Generator
from dfad.models.model_file import load_model
from dfad.runs import report
from tests.conftest import IMAGE_SHAPE


@pytest.fixture
def finished(teacher, student, config, tmp_path):
    """A distiller after its run, its result and its folder."""
    config = replace(
        config,
        teacher=TeacherConfig(mean=(0.3,), std=(0.4,)),
        student=StudentConfig("convnet", {"channels": [4, 8], "num_classes": 4, "in_channels": 1}),
    )
    distiller = Distiller(teacher, student, config, image_shape=IMAGE_SHAPE)
    return distiller, distiller.fit(tmp_path / "run"), tmp_path / "run"


def test_the_files_explain_themselves(finished):
    distiller, result, folder = finished
    assert json.loads((folder / "result.json").read_text()) == asdict(result)
    student, manifest = load_model(folder / "student.safetensors")
    images = torch.randn(3, *IMAGE_SHAPE)
    torch.testing.assert_close(student(images).logits, distiller.student.eval()(images).logits)
    assert manifest["image_shape"] == list(IMAGE_SHAPE)
    assert (manifest["mean"], manifest["std"]) == ([0.3], [0.4])
    _, best = load_model(folder / "student_best.safetensors")
    assert (best["round"], best["agreement"]) == (result.best_round, result.best_agreement)
    generator, _ = load_model(folder / "generator.safetensors")
    assert isinstance(generator, Generator)
    assert generator(torch.randn(2, 8)).shape == (2, *IMAGE_SHAPE)


def test_samples_are_titled_with_what_the_teacher_sees(finished):
    distiller, _, _ = finished
    before = {name: value.clone() for name, value in distiller.generator.state_dict().items()}
    samples = distiller.samples(report.SAMPLES)
    titles = [axes.get_title().split() for axes in report.samples_figure(samples, distiller.normalisation).axes]
    confidences, labels = distiller.teacher(samples.images).logits.softmax(1).max(1)
    assert len(titles) == report.SAMPLES
    assert torch.equal(samples.images, distiller.samples(report.SAMPLES).images)
    assert [int(label) for label, _ in titles] == labels.tolist()
    assert [confidence for _, confidence in titles] == [f"{value:.0%}" for value in confidences.tolist()]
    assert all(torch.equal(value, before[name]) for name, value in distiller.generator.state_dict().items())


def test_any_number_of_samples_is_drawn():
    samples = report.Samples(torch.rand(5, 1, 4, 4), torch.arange(5), torch.rand(5))
    drawn = [axes for axes in report.samples_figure(samples, ((), ())).axes if axes.images]
    assert len(drawn) == 5


def test_curves_show_every_metric_at_its_round():
    history = [
        {"round": 10, "student_loss": 2.0, "generator_loss": -1.0},
        {"round": 20, "student_loss": 1.0, "generator_loss": -2.0, "agreement": 0.5},
    ]
    losses, student, images = report.curves_figure(history).axes
    drawn = {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in [*losses.lines, *student.lines]}
    assert drawn == {
        "student loss": [(10, 2.0), (20, 1.0)],
        "generator loss": [(10, -1.0), (20, -2.0)],
        "agreement": [(20, 0.5)],
    }
    assert not images.lines


def test_pixels_undo_the_normalisation():
    pixels = torch.rand(2, 3, 4, 4)
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.1, 0.2, 0.3])
    normalised = (pixels - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)
    shown = report.to_pixels(normalised, mean.tolist(), std.tolist())
    np.testing.assert_allclose(shown, pixels.permute(0, 2, 3, 1), atol=1e-6)


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_without_a_normalisation_each_image_takes_its_own_range(channels):
    images = torch.randn(2, channels, 4, 4) * torch.tensor([1.0, 50.0]).view(2, 1, 1, 1)
    shown = report.to_pixels(images, (), ())
    assert shown.shape == ((2, 4, 4, 3) if channels == 3 else (2, 4, 4))
    assert shown.min() >= 0
    assert shown.max() <= 1
    if channels != 2:
        np.testing.assert_allclose(shown.reshape(2, -1).min(1), 0, atol=1e-6)
        np.testing.assert_allclose(shown.reshape(2, -1).max(1), 1, atol=1e-6)
    for alike in (1.0, torch.nan, torch.inf):
        assert np.isfinite(report.to_pixels(torch.full((1, channels, 4, 4), alike), (), ())).all()
