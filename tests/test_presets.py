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


def tiny(preset: TrainConfig) -> TrainConfig:
    """A preset whose rounds cost little."""
    bank = ImageBankConfig(size=4 if preset.method.image_bank.size else 0)
    changes = {"batch_size": 2, "student_steps": 1, "warm_up": min(2, preset.method.warm_up), "image_bank": bank}
    config = with_method(replace(preset, device="cpu"), **changes)
    return replace(config, generator=replace(config.generator, width=4))


def run_rounds(distiller: Distiller) -> None:
    for _ in range(distiller.config.method.warm_up + 2):
        terms = distiller.run_round()
        assert all(torch.isfinite(term) for term in terms.values())
    assert distiller.round_index == 2


def test_mnist_runs_on_its_teacher():
    config = tiny(PRESETS["mnist"])
    torch.manual_seed(0)  # of the teacher: whether rounds of two images stay finite must not depend on other tests
    run_rounds(Distiller(models.lenet5(), build_student(config), config, image_shape=(1, 28, 28)))


def test_cifar10_runs_on_its_teacher_for_at_most_100_petaflop():
    preset = PRESETS["cifar10"]
    counted = {name: getattr(preset.method, name) for name in ("warm_up", "rounds", "student_steps")}
    config = replace(with_method(tiny(preset), **counted), generator=preset.generator)
    torch.manual_seed(0)
    distiller = Distiller(models.resnet34(), build_student(config), config, image_shape=(3, 32, 32))
    warm_up, round_ = distiller.round.warm_up(), distiller.round()
    assert all(torch.isfinite(term) for term in (*warm_up.values(), *round_.values()))
    images = preset.method.batch_size / config.method.batch_size
    flops, _ = count_flops(distiller)
    assert 90e15 < flops * images < 100e15


def test_cifar100_is_cifar10_of_other_classes():
    preset = PRESETS["cifar100"]
    assert preset.student.kwargs == {"num_classes": 100}
    assert replace(preset, student=PRESETS["cifar10"].student, data=PRESETS["cifar10"].data) == PRESETS["cifar10"]
    assert all(settings.data.name == name for name, settings in PRESETS.items() if name != "own")


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
