"""Every preset describes networks that fit together."""

from dataclasses import replace

import pytest
import torch

from dfad import models
from dfad.assembly import build_student
from dfad.distillation.distiller import Distiller
from dfad.presets import PRESETS
from tests.conftest import with_method

TEACHERS = {
    "mnist": (models.lenet5, {}, (1, 28, 28)),
    "cifar10": (models.resnet34, {}, (3, 32, 32)),
    "cifar100": (models.resnet34, {"num_classes": 100}, (3, 32, 32)),
}


@pytest.mark.parametrize("name", TEACHERS)
def test_a_preset_runs_on_its_teacher(name):
    factory, kwargs, image_shape = TEACHERS[name]
    preset = PRESETS[name]
    config = with_method(replace(preset, device="cpu"), batch_size=2, student_steps=1)
    config = replace(config, generator=replace(config.generator, width=4))
    terms = Distiller(factory(**kwargs), build_student(config), config, image_shape=image_shape).round()
    assert all(torch.isfinite(term) for term in terms.values())
    assert preset.data.name == name


def test_the_digits_student_has_at_most_a_third_of_its_teachers_parameters():
    student = build_student(PRESETS["digits"])
    teacher = models.convnet(channels=(32, 64, 128), in_channels=1)
    assert 3 * sum(p.numel() for p in student.parameters()) <= sum(p.numel() for p in teacher.parameters())
