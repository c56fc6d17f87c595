"""The round as one CUDA graph."""

import logging
from dataclasses import replace

import pytest
import torch

from dfad import models
from dfad.config import EngineConfig, MethodConfig
from dfad.distillation.distiller import Distiller
from dfad.engine.cuda_graph import WARM_UP_ROUNDS, CapturedRound
from tests.conftest import IMAGE_SHAPE, with_method

pytestmark = pytest.mark.gpu

ROUNDS = WARM_UP_ROUNDS + 5


@pytest.fixture(autouse=True)
def fresh_memory_as_it_is():
    """Deterministic algorithms fill fresh memory, which is no part of the work to be captured."""
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def on_gpu(config):
    return with_method(replace(config, device="cuda"), rounds=ROUNDS)


def make(teacher, config) -> Distiller:
    torch.manual_seed(2)
    student = models.convnet(channels=(4, 8), num_classes=4, in_channels=1)
    return Distiller(teacher, student, config, image_shape=IMAGE_SHAPE)


def losses(distiller: Distiller, rounds: int) -> list[tuple[float, float]]:
    found = []
    for _ in range(rounds):
        terms = distiller.run_round()
        found.append((terms["student_loss"].item(), terms["generator_loss"].item()))
    return found


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_the_same_seeds_give_the_same_losses_captured_and_not(precision, teacher, on_gpu):
    runs = {}
    for graph in ("on", "off"):
        distiller = make(teacher, replace(on_gpu, engine=EngineConfig(precision=precision, cuda_graph=graph)))
        runs[graph] = losses(distiller, ROUNDS)
        captured = distiller.engine._captured
        assert (captured is not None and captured.graph is not None) == (graph == "on")
    assert runs["on"] == pytest.approx(runs["off"], rel=1e-3)


def test_a_replay_draws_new_noise_and_follows_the_schedule(teacher, on_gpu):
    distiller = make(teacher, on_gpu)
    found = losses(distiller, ROUNDS)
    assert len(set(found)) == ROUNDS
    progress = (ROUNDS - 1) / ROUNDS
    optimizer = distiller.config.optimizer.student
    rate = distiller.round.student_optimizer.param_groups[0]["lr"]
    assert rate.item() == pytest.approx(optimizer.lr * optimizer.factor(progress))


def test_a_resumed_run_equals_an_uninterrupted_one(teacher, on_gpu):
    whole = losses(make(teacher, on_gpu), 2 * ROUNDS)
    first = make(teacher, on_gpu)
    losses(first, ROUNDS)
    state = first.state_dict()
    second = make(teacher, on_gpu)
    second.load_state_dict(state)
    assert losses(second, ROUNDS) == pytest.approx(whole[ROUNDS:], rel=1e-3)


def test_a_round_that_waits_for_the_device_is_named_and_runs_uncaptured(caplog):
    generator = torch.Generator("cuda").manual_seed(0)
    values = []

    def round_():
        drawn = torch.randn((), generator=generator, device="cuda")
        values.append(drawn.item())
        return {"value": drawn}

    captured = CapturedRound(round_, [generator], torch.device("cuda"))
    with caplog.at_level(logging.WARNING, logger="dfad"):
        for _ in range(ROUNDS):
            captured()
    assert captured.graph is None
    assert any("_local_scalar_dense" in message and "cannot be captured" in message for message in caplog.messages)
    expected = torch.Generator("cuda").manual_seed(0)
    assert values == [torch.randn((), generator=expected, device="cuda").item() for _ in range(ROUNDS)]


def test_the_fused_kernels_run_in_the_graph(teacher, on_gpu):
    distiller = make(teacher, on_gpu)
    losses(distiller, ROUNDS)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        distiller.run_round()
        torch.cuda.synchronize()
    names = " ".join(event.key for event in profile.key_averages())
    for kernel in ("activation_boundary", "interpolated_kl"):
        assert kernel in names, kernel


def test_whole_rounds_with_other_networks(on_gpu):
    settings = replace(on_gpu, method=replace(MethodConfig(), rounds=ROUNDS, batch_size=32, student_steps=2))
    distiller = Distiller(models.resnet20(), models.resnet20(), settings, image_shape=(3, 32, 32))
    assert all(torch.isfinite(torch.tensor(pair)).all() for pair in losses(distiller, ROUNDS))
