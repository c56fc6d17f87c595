"""Contenders for whole rounds."""

import logging

import pytest
import torch

from bench.rounds import CASES, Case, contenders, left_out
from dfad import models
from dfad.config import EngineConfig
from dfad.distillation.distiller import Distiller
from tests.engine.test_engine import CPU

DIGITS = CASES[0]


class TestPartsLeftOut:
    def test_are_listed_with_the_reason_and_without_what_the_machine_lacks(self):
        class Doubling(torch.nn.Module):
            """Its results differ from call to call."""

            def __init__(self) -> None:
                super().__init__()
                self.network = models.convnet(channels=(4, 8), in_channels=1)
                self.factor = 1.0

            def forward(self, images):
                self.factor *= 2
                return self.network(images * self.factor)

        config = DIGITS.config(CPU, engine=EngineConfig(cuda_graph="off"))
        with left_out() as reasons:
            Distiller(models.convnet(channels=(4, 8), in_channels=1), Doubling(), config, image_shape=(1, 8, 8))
        assert any("engine.fuse_batchnorm" in reason and "Doubling" in reason for reason in reasons)
        assert not any("NVIDIA" in reason for reason in reasons)

    def test_of_a_plain_pair_are_none(self):
        with left_out() as reasons:
            Distiller(*DIGITS.networks(), DIGITS.config(CPU), image_shape=DIGITS.image_shape)
        assert reasons == []

    def test_leave_the_log_as_it_was(self):
        log = logging.getLogger("dfad.engine")
        before = log.level, log.handlers[:]
        with pytest.raises(KeyError), left_out():
            raise KeyError
        assert (log.level, log.handlers) == before


@pytest.mark.parametrize("name", ["ours", "published", "repaired", "floor"])
def test_a_contender_runs(name):
    case: Case = DIGITS
    contender = contenders(CPU)[name](case)
    with contender.running():
        contender.run()
    assert ("left_out" in contender.details()) is False
