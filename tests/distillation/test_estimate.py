"""The estimated cost of a run."""

import gc

import pytest
import torch
from torch import nn

from dfad.config import ActivationConfig, MethodConfig
from dfad.distillation.distiller import Distiller
from dfad.distillation.estimate import estimate
from dfad.distillation.tensor_memory import CHECKED_WITH, TensorMemory
from dfad.models.probing import parameter_count
from tests.conftest import IMAGE_SHAPE, with_method


def test_private_interfaces_are_those_that_were_checked():
    """Read the source of TorchDispatchMode in a newer version, then name it."""
    assert torch.__version__.rpartition(".")[0] in CHECKED_WITH


def test_memory_counts_what_lives_at_once():
    gc.collect()
    with TensorMemory() as memory:
        first = torch.zeros(1000)
        view = first.view(10, 100)
        torch.zeros(500) + 1  # two of 2,000 bytes, freed at once
        second = torch.zeros(250)
    assert memory.live == 4000 + 1000
    assert memory.peak == 4000 + 2000 + 2000
    del first, second
    assert memory.live == 4000
    del view
    assert memory.live == 0


def test_the_estimate_of_a_run(teacher, student, config):
    distiller = Distiller(teacher, student, config, image_shape=IMAGE_SHAPE)
    cost = estimate(distiller)
    assert cost.student_parameters == parameter_count(student)
    assert cost.teacher_parameters == parameter_count(teacher)
    assert cost.total_seconds == pytest.approx(cost.seconds_per_round * config.method.rounds)
    images = config.method.batch_size * IMAGE_SHAPE[1] * IMAGE_SHAPE[2] * 4
    assert cost.peak_memory > 4 * (cost.student_parameters + cost.teacher_parameters) + images


def test_flops_are_those_of_the_round(config):
    class Linear(nn.Module):
        """One product of 64 × 4 per image, whatever the direction."""

        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(64, 4)

        def forward(self, images):
            return self.linear(images.flatten(1))

    plain = with_method(
        config, activation=ActivationConfig(), interpolation=MethodConfig().interpolation,
        regularizers=MethodConfig().regularizers,
    )  # fmt: skip
    counts = [estimate(Distiller(Linear(), Linear(), with_method(plain, student_steps=k), image_shape=IMAGE_SHAPE))
              for k in (1, 2)]  # fmt: skip
    # noise to 2×2×8; twice a 4×4 kernel scattered from each pixel; 3×3 at 8×8 pixels
    batch, product, generator = 16, 2 * 64 * 4, 2 * (8 * 32 + (8 * 8 * 16) * 4 + (8 * 4 * 16) * 16 + (4 * 9) * 64)
    # a student step: generator, teacher and student forward, and the student's weight gradient
    assert counts[1].flops_per_round - counts[0].flops_per_round == batch * (generator + 3 * product)
