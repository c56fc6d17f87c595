"""Provoked mode collapses: detection, response and budget."""

import logging
from dataclasses import replace

import pytest
import torch

from dfad import functional, models
from dfad.config import ActivationConfig, CollapseConfig, MethodConfig, RecordingConfig, RegularizerConfig
from dfad.distillation.distiller import OBSERVED_BATCHES, Distiller
from dfad.engine.optimizers import optimizer_tensors
from tests.conftest import IMAGE_SHAPE, with_method

ROUNDS = 8


@pytest.fixture
def make(teacher, config):
    """A distiller that checks its generator after every round."""

    def make(**collapse) -> Distiller:
        torch.manual_seed(2)
        student = models.convnet(channels=(4, 8), num_classes=4, in_channels=1)
        settings = replace(
            with_method(config, rounds=ROUNDS),
            collapse=CollapseConfig(**{"class_entropy": 0.0, "grace": 0.0, **collapse}),
            recording=RecordingConfig(log_every=1, checkpoint_every=1),
        )
        return Distiller(teacher, student, settings, image_shape=IMAGE_SHAPE)

    return make


def broken_before(distiller: Distiller, rounds: set[int]) -> None:
    """Makes the generator ignore its noise before these rounds, so that all its images are the same."""
    run_round = distiller.run_round

    def breaking():
        if distiller.round_index in rounds:
            with torch.no_grad():
                distiller.generator.projection.weight.zero_()
                distiller.round.generator_optimizer.param_groups[0]["lr"].fill_(0)
        return run_round()

    distiller.run_round = breaking
    # otherwise the broken generator would recover within its round
    distiller.round.set_learning_rates = lambda progress: None


def weights(distiller: Distiller) -> list[torch.Tensor]:
    return [value.clone() for value in distiller.generator.state_dict().values()]


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def responses(caplog) -> list[str]:
    return [message for message in caplog.messages if message.startswith("The generator ") and "recovery" in message]


def test_it_goes_back_to_the_last_healthy_weights(make, caplog):
    distiller = make()
    broken_before(distiller, {4})
    look, seen = distiller.collapse_guard.look, {}

    def looking(observed, round_index, rounds):
        result = look(observed, round_index, rounds)
        seen[round_index] = (
            result,
            weights(distiller),
            [x.clone() for x in optimizer_tensors(distiller.round.generator_optimizer)],
        )
        return result

    distiller.collapse_guard.look = looking
    with caplog.at_level(logging.WARNING, logger="dfad"):
        distiller.fit()
    assert [seen[i][0]["collapsed"] for i in range(1, ROUNDS + 1)] == [0, 0, 0, 0, 1, 0, 0, 0]
    assert equal(seen[5][1], seen[4][1])
    assert equal(seen[5][2], seen[4][2])
    assert [message.partition(" (")[2] for message in responses(caplog)] == ["recovery 1 of 3)."]
    assert "returns to its last healthy weights" in responses(caplog)[0]


def test_a_second_collapse_from_the_same_weights_gets_new_ones(make, caplog):
    distiller = make()
    broken_before(distiller, {4, 5})
    with caplog.at_level(logging.WARNING, logger="dfad"):
        distiller.fit()
    assert ["new weights" in message for message in responses(caplog)] == [False, True]


def test_a_reset_draws_new_weights_and_forgets_the_moments(make, caplog):
    distiller = make(response="reset")
    before = weights(distiller)
    distiller.run_round()
    addresses = [x.data_ptr() for x in distiller.generator.state_dict().values()]
    distiller.collapse_guard.look({"class_entropy": 1.0, "pairwise_diversity": 0.0}, 1, ROUNDS)
    assert not equal(weights(distiller), before)
    assert [x.data_ptr() for x in distiller.generator.state_dict().values()] == addresses  # a graph holds them
    moments = optimizer_tensors(distiller.round.generator_optimizer)
    assert moments
    assert not any(moment.any() for moment in moments)
    first = weights(distiller)
    distiller.collapse_guard.look({"class_entropy": 1.0, "pairwise_diversity": 0.0}, 2, ROUNDS)
    assert not equal(weights(distiller), first)


def test_it_responds_within_its_budget_and_says_so_once(make, caplog):
    distiller = make(budget=2)
    broken_before(distiller, set(range(ROUNDS)))
    with caplog.at_level(logging.WARNING, logger="dfad"):
        distiller.fit()
    assert len(responses(caplog)) == distiller.collapse_guard.recoveries == 2
    assert sum("All 2 recoveries" in message for message in caplog.messages) == 1


def test_it_may_only_warn(make, caplog, tmp_path):
    distiller = make(response="warn")
    broken_before(distiller, set(range(ROUNDS)))
    with caplog.at_level(logging.WARNING, logger="dfad"):
        distiller.fit(tmp_path / "run")
    assert sum("The generator collapsed" in message for message in caplog.messages) == 1
    assert not responses(caplog)
    assert (tmp_path / "run" / "metrics.jsonl").read_text().count('"collapsed": 1.0') == ROUNDS


def test_images_of_one_class_are_a_collapse_as_well(make, teacher, caplog):
    with torch.no_grad():
        teacher.linear.bias[2] = 30  # whatever the image, the teacher sees class 2
    with caplog.at_level(logging.WARNING, logger="dfad"):
        make(class_entropy=0.3, grace=0.5, budget=1).fit()
    assert len(responses(caplog)) == 1


def test_a_collapse_that_training_brings_about_is_recovered(make, caplog):
    """A generator that only maximises the teacher's certainty collapses to one class."""
    distiller = make(class_entropy=0.6, budget=1)
    method = MethodConfig(
        rounds=60, student_steps=1, batch_size=16, adversarial=0.0, regularizers=RegularizerConfig(one_hot=5.0)
    )
    distiller.config = replace(distiller.config, method=method)
    distiller.bank.due_rounds = [60]
    for group in distiller.round.generator_optimizer.param_groups:
        group["lr"].fill_(0.05)
    distiller.round.set_learning_rates = lambda progress: None
    with caplog.at_level(logging.WARNING, logger="dfad"):
        distiller.fit()
    assert len(responses(caplog)) == 1


def test_a_resumed_run_responds_as_an_uninterrupted_one(make, tmp_path):
    whole = make()
    broken_before(whole, {3, 4})
    whole.fit(tmp_path / "whole")

    stopped = make()
    broken_before(stopped, {3, 4})
    run_round = stopped.run_round

    def stopping():
        if stopped.round_index == 4:
            raise KeyboardInterrupt
        return run_round()

    stopped.run_round = stopping
    with pytest.raises(KeyboardInterrupt):
        stopped.fit(tmp_path / "stopped")
    resumed = make()
    broken_before(resumed, {3, 4})
    for group in resumed.round.generator_optimizer.param_groups:
        group["lr"].fill_(0)  # as the first breaking left it
    resumed.fit(tmp_path / "stopped", resume=True)
    assert resumed.collapse_guard.recoveries == whole.collapse_guard.recoveries == 2
    assert equal(weights(resumed), weights(whole))


@pytest.mark.parametrize(("images", "classes"), [(7, 1000), (1000, 7), (16, 16)])
def test_the_entropy_of_classes_is_of_its_maximum(images, classes):
    def entropy(labels: torch.Tensor) -> float:
        return functional.class_entropy(torch.nn.functional.one_hot(labels, classes).float()).item()

    assert entropy(torch.arange(images) % classes) == pytest.approx(1, abs=1e-4)
    assert entropy(torch.zeros(images, dtype=torch.int64)) == 0


@pytest.mark.parametrize(("classes", "images"), [(4, 16), (16, 16), (40, 48), (1000, 16 * OBSERVED_BATCHES)])
def test_where_classes_outnumber_a_batch_several_are_looked_at(classes, images, config, monkeypatch):
    settings = {"channels": (4,), "num_classes": classes, "in_channels": 1}
    plain = with_method(config, activation=ActivationConfig())
    distiller = Distiller(models.convnet(**settings), models.convnet(**settings), plain, image_shape=IMAGE_SHAPE)
    seen = []
    monkeypatch.setattr(functional, "class_entropy", lambda logits: seen.append(logits) or torch.tensor(0.5))
    observed = distiller.observe()
    assert seen[0].shape == (images, classes)
    assert len(seen[0].unique(dim=0)) == images
    assert observed["class_entropy"] == 0.5
