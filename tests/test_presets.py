"""Every preset describes networks that fit together."""

from dataclasses import replace

import pytest
import torch

from dfad import models
from dfad.assembly import build_student
from dfad.config import FeatureMatchingConfig, ImageBankConfig, StudentConfig
from dfad.distillation.distiller import Distiller
from dfad.distillation.estimate import count_flops
from dfad.errors import ModelError
from dfad.models.probing import parameter_count
from dfad.presets import PRESETS, TrainConfig
from tests.conftest import with_method

TEACHERS = {
    "mnist": (models.lenet5, {}, (1, 28, 28)),
    "cifar10": (models.resnet34, {}, (3, 32, 32)),
    "cifar100": (models.resnet34, {"num_classes": 100}, (3, 32, 32)),
}


def tiny(preset: TrainConfig) -> TrainConfig:
    """A preset whose rounds cost little."""
    bank = ImageBankConfig(size=4 if preset.method.image_bank.size else 0)
    changes = {"batch_size": 2, "student_steps": 1, "warm_up": min(2, preset.method.warm_up), "image_bank": bank}
    config = with_method(replace(preset, device="cpu"), **changes)
    return replace(config, generator=replace(config.generator, width=4))


@pytest.mark.parametrize("name", TEACHERS)
def test_a_preset_runs_on_its_teacher(name):
    factory, kwargs, image_shape = TEACHERS[name]
    preset = PRESETS[name]
    config = tiny(preset)
    torch.manual_seed(0)  # of the teacher: whether rounds of two images stay finite must not depend on other tests
    distiller = Distiller(factory(**kwargs), build_student(config), config, image_shape=image_shape)
    for _ in range(config.method.warm_up + 2):
        terms = distiller.run_round()
        assert all(torch.isfinite(term) for term in terms.values())
    assert distiller.round_index == 2
    assert preset.data.name == name


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_a_run_on_a_gpu_costs_at_most_100_petaflop(name):
    factory, kwargs, image_shape = TEACHERS[name]
    preset = PRESETS[name]
    config = replace(tiny(preset), generator=preset.generator)
    config = with_method(config, warm_up=preset.method.warm_up, rounds=preset.method.rounds)
    config = with_method(config, student_steps=preset.method.student_steps)
    flops, _ = count_flops(Distiller(factory(**kwargs), build_student(config), config, image_shape=image_shape))
    images = preset.method.batch_size / config.method.batch_size
    assert 90e15 < flops * images < 100e15


@pytest.mark.parametrize("size", [8, 12, 28, 32])
@pytest.mark.parametrize("channels", [1, 3])
def test_own_runs_on_images_of_any_size(size, channels):
    config = replace(
        tiny(PRESETS["own"]), student=StudentConfig("convnet", {"channels": [4, 8], "in_channels": channels})
    )
    teacher = models.convnet(channels=(8, 16), in_channels=channels)
    distiller = Distiller(teacher, build_student(config), config, image_shape=(channels, size, size))
    for _ in range(config.method.warm_up + 1):
        assert all(torch.isfinite(term) for term in distiller.run_round().values())


def test_own_matches_features_where_taps_pair_and_says_where_not(caplog):
    settings = tiny(PRESETS["own"])
    for depth, matched in ((2, True), (3, False)):
        channels = [4, 8, 8][:depth]
        config = replace(settings, student=StudentConfig("convnet", {"channels": channels, "in_channels": 1}))
        teacher = models.convnet(channels=(8, 16), in_channels=1)
        distiller = Distiller(teacher, build_student(config), config, image_shape=(1, 8, 8))
        for _ in range(config.method.warm_up + 1):
            terms = distiller.run_round()
        assert ("student/feature_matching" in terms) == matched
        assert ("Features are not matched" in caplog.text) == (not matched)
    refused = with_method(config, feature_matching=FeatureMatchingConfig(weight=1.0))
    with pytest.raises(ModelError, match=r"--student.taps.*--method.feature_matching.weight"):
        Distiller(teacher, build_student(refused), refused, image_shape=(1, 8, 8))


def test_the_digits_student_has_at_most_a_third_of_its_teachers_parameters():
    student = build_student(PRESETS["digits"])
    teacher = models.convnet(channels=(32, 64, 128), in_channels=1)
    assert 3 * parameter_count(student) <= parameter_count(teacher)
