"""The generator's warm-up, the image bank, views and mixing within the batch, through the steps of a run."""

import copy
import itertools
import os
import signal
from dataclasses import replace

import pytest
import torch
from torch import nn

from dfad import models
from dfad.config import (
    ActivationConfig,
    AugmentationConfig,
    DistillConfig,
    FeatureMatchingConfig,
    ImageBankConfig,
    InterpolationConfig,
    MethodConfig,
    OptimizerConfig,
    RandomFieldsConfig,
    RegularizerConfig,
)
from dfad.distillation.distiller import Distiller
from dfad.distillation.estimate import estimate
from dfad.errors import Interrupted
from dfad.models.taps import Outputs
from tests.conftest import IMAGE_SHAPE, with_method
from tests.waiting import NoWaiting

WARM_UP, BANK, BATCH = 3, 40, 16


@pytest.fixture
def recipe(config) -> DistillConfig:
    """Every part of the recipe at once."""
    return with_method(
        config,
        warm_up=WARM_UP,
        generator_steps=2,
        discrepancy="kl",
        temperature=4.0,
        adversary="agreeing",
        interpolation=InterpolationConfig(weight=0.5, labels="teacher", step="within"),
        feature_matching=FeatureMatchingConfig(weight=2.0),
        image_bank=ImageBankConfig(size=BANK),
        random_fields=RandomFieldsConfig(share=0.25),
        augmentation=AugmentationConfig(flip=True, crop=0.25, cutout=0.25, colour=0.1),
    )


def make(teacher, config) -> Distiller:
    torch.manual_seed(2)
    student = models.convnet(channels=(4, 8), num_classes=4, in_channels=1)
    return Distiller(teacher, student, config, image_shape=IMAGE_SHAPE)


@pytest.fixture
def distiller(teacher, recipe) -> Distiller:
    return make(teacher, recipe)


def snapshot(*networks: nn.Module) -> list[torch.Tensor]:
    return [value.clone() for network in networks for value in network.state_dict().values()]


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_students_loss_is_its_weighted_terms(distiller):
    distiller.round.warm_up()
    terms = distiller.round.student_step()
    weighted = terms["student/discrepancy"] + 0.1 * terms["student/activation"] + 2 * terms["student/feature_matching"]
    torch.testing.assert_close(terms["student_loss"], weighted)
    assert terms["student/feature_matching"] > 0


def test_matching_features_needs_connectors_alone(teacher, recipe):
    alone = make(teacher, with_method(recipe, activation=ActivationConfig()))
    assert list(alone.round.connectors.parameters())
    without = with_method(recipe, activation=ActivationConfig(), feature_matching=FeatureMatchingConfig())
    assert not list(make(teacher, without).round.connectors.parameters())


class TestWarmUp:
    def test_it_moves_the_generator_alone(self, distiller):
        still = snapshot(distiller.student, distiller.round.connectors, distiller.teacher.network)
        before = snapshot(distiller.generator)
        terms = distiller.run_round()
        assert same(still, snapshot(distiller.student, distiller.round.connectors, distiller.teacher.network))
        assert not same(before, snapshot(distiller.generator))
        assert set(terms) == {"generator_loss", "generator/batchnorm", "generator/one_hot", "generator/diversity"}

    def test_rounds_come_after_it(self, distiller):
        for _ in range(WARM_UP):
            assert "student_loss" not in distiller.run_round()
        assert distiller.round_index == 0
        assert "student_loss" in distiller.run_round()
        assert distiller.round_index == 1

    def test_it_runs_at_the_generators_whole_learning_rate(self, teacher, recipe):
        generator = OptimizerConfig(name="adam", lr=3e-3, warm_up=0.5)
        distiller = make(teacher, replace(recipe, optimizer=replace(recipe.optimizer, generator=generator)))
        rates = []
        for _ in range(WARM_UP + 1):
            distiller.run_round()
            rates.append(float(distiller.round.generator_optimizer.param_groups[0]["lr"]))
        assert rates == pytest.approx([3e-3] * WARM_UP + [3e-5])

    def test_it_needs_something_that_shapes_the_images(self):
        with pytest.raises(ValueError, match="warm_up is 5; it must be 0 if every weight of regularizers is 0"):
            MethodConfig(warm_up=5)


class TestImageBank:
    def test_it_holds_what_the_generators_steps_made(self, distiller, monkeypatch):
        made = []
        monkeypatch.setattr(
            distiller.round, "generator", lambda noise, f=distiller.generator: made.append(f(noise)) or made[-1]
        )
        for _ in range(WARM_UP):
            distiller.run_round()
        assert len(made) == WARM_UP
        expected = torch.cat(made).detach()[-BANK:].permute(0, 2, 3, 1).clamp(-4, 4)
        bank = distiller.round.image_bank
        found = (bank.images * bank.scale).roll(-(WARM_UP * BATCH) % BANK, dims=0)
        assert (found - expected).abs().max() <= bank.scale[0] / 2 + 1e-6

    def test_a_student_step_makes_no_images(self, distiller, monkeypatch):
        distiller.run_round()
        monkeypatch.setattr(distiller.round, "generator", lambda noise: pytest.fail("an image was generated"))
        distiller.round.student_step()

    def test_its_memory_is_counted(self, teacher, recipe):
        plain = with_method(recipe, image_bank=ImageBankConfig(), random_fields=RandomFieldsConfig())
        large = with_method(recipe, image_bank=ImageBankConfig(size=100_000))
        costs = [estimate(make(teacher, config)) for config in (plain, large)]
        assert costs[1].peak_memory - costs[0].peak_memory == pytest.approx(100_000 * 64, rel=0.01)

    def test_a_batch_is_drawn_in_the_engines_precision(self, teacher, recipe):
        engine = replace(recipe.engine, precision="bfloat16")
        distiller = make(teacher, replace(recipe, engine=engine))
        distiller.run_round()
        assert distiller.round.student_images().dtype == torch.bfloat16


class TestViews:
    def test_student_and_teacher_see_the_same(self, distiller, monkeypatch):
        distiller.run_round()
        seen: dict[str, torch.Tensor] = {}
        round_ = distiller.round
        ask = round_.teacher.without_gradient
        monkeypatch.setattr(round_.teacher, "without_gradient", lambda x: seen.update(teacher=x.clone()) or ask(x))
        student = round_.student
        showing = type("Showing", (nn.Module,), {"forward": lambda _, x: seen.update(student=x.clone()) or student(x)})
        monkeypatch.setattr(round_, "student", showing())
        drawn = []
        images = round_.student_images
        monkeypatch.setattr(round_, "student_images", lambda: drawn.append(images()) or drawn[-1])
        round_.student_step()
        assert torch.equal(seen["student"], seen["teacher"])
        assert not torch.equal(seen["student"], drawn[0])  # half of them are mixed

    def test_fresh_images_are_augmented_too(self, teacher, config, monkeypatch):
        distiller = make(teacher, with_method(config, augmentation=AugmentationConfig(flip=True)))
        made = []
        monkeypatch.setattr(
            distiller.round,
            "generator",
            lambda noise, f=distiller.generator: made.append(f(noise).detach()) or made[-1],
        )
        view = distiller.round.student_images()
        assert not torch.equal(view, made[0])
        assert torch.equal(view.flatten(1).sort().values, made[0].flatten(1).sort().values)


class TestMixingWithin:
    def test_a_share_of_the_batch_is_mixed_with_its_reverse(self, distiller, monkeypatch):
        form = distiller.round.interpolation
        coefficient = torch.linspace(0.1, 0.9, BATCH)
        monkeypatch.setattr(form, "sample_coefficient", lambda: coefficient)
        images = torch.randn(BATCH, *IMAGE_SHAPE)
        mixed = form.within(images)
        assert torch.equal(mixed[:8], images[:8])
        weight = coefficient[8:].view(-1, 1, 1, 1)
        torch.testing.assert_close(mixed[8:], weight * images[8:] + (1 - weight) * images.flip(0)[8:])

    @pytest.mark.parametrize("coefficient", ["sample", "batch"])
    def test_either_kind_of_coefficient(self, coefficient, teacher, recipe):
        interpolation = replace(recipe.method.interpolation, coefficient=coefficient)
        form = make(teacher, with_method(recipe, interpolation=interpolation)).round.interpolation
        images = torch.randn(BATCH, *IMAGE_SHAPE)
        mixed = form.within(images)
        assert torch.equal(mixed[:8], images[:8])
        assert not any(torch.equal(a, b) for a, b in zip(mixed[8:], images[8:], strict=True))

    @pytest.mark.parametrize("step", ["joint", "own"])
    def test_other_forms_leave_the_batch_alone(self, step, teacher, config):
        interpolation = InterpolationConfig(weight=0.5, step=step)
        form = make(teacher, with_method(config, interpolation=interpolation)).round.interpolation
        images = torch.randn(BATCH, *IMAGE_SHAPE)
        assert form.within(images) is images

    def test_the_form_is_a_share_and_asks_the_teacher(self):
        with pytest.raises(ValueError, match=r"weight is 1\.5; it must be at most 1 where step is within"):
            InterpolationConfig(weight=1.5, labels="teacher", step="within")
        with pytest.raises(ValueError, match="labels is interpolated; it must be teacher where step is within"):
            InterpolationConfig(weight=0.5, step="within")


def test_the_adversary_may_look_at_agreeing_images_alone(teacher, recipe):
    extras = {"activation": ActivationConfig(), "regularizers": RegularizerConfig(diversity=1.0)}
    losses, gradients = {}, {}
    student = torch.tensor([[3.0, 0, 0, 0], [0, 3.0, 0, 0], [0, 0, 3.0, 1]])
    for which in ("all", "agreeing"):
        round_ = make(teacher, with_method(recipe, adversary=which, **extras)).round
        s = student.clone().requires_grad_()
        t = torch.tensor([[1.0, 0, 0, 0], [1.0, 0, 0, 0], [0, 0, 2.0, 0]], requires_grad=True)
        loss = round_.adversarial_terms(Outputs(s, ()), Outputs(t, ()))["adversarial"]
        loss.backward()
        losses[which], gradients[which] = loss, (s.grad, t.grad)
    torch.testing.assert_close(losses["all"], losses["agreeing"])
    for every, agreeing in zip(gradients["all"], gradients["agreeing"], strict=True):
        torch.testing.assert_close(agreeing[[0, 2]], every[[0, 2]])
        assert every[1].any()
        assert not agreeing[1].any()


def test_a_round_has_as_many_generator_steps_as_asked_for(distiller, monkeypatch):
    order = []
    for name in ("student_step", "generator_step"):
        original = getattr(distiller.round, name)
        monkeypatch.setattr(distiller.round, name, lambda n=name, f=original: order.append(n) or f())
    distiller.round()
    assert order == ["student_step"] * 2 + ["generator_step"] * 2


class TestRun:
    def stopped_after(self, distiller: Distiller, folder, steps: int) -> None:
        """A run that is requested to stop after this number of steps, as by a signal."""
        count = itertools.count(1)
        run_round = distiller.run_round

        def counting():
            if next(count) == steps:
                os.kill(os.getpid(), signal.SIGTERM)
            return run_round()

        distiller.run_round = counting
        with pytest.raises(Interrupted) as stopped:
            distiller.fit(folder, resume=(folder / "config.yaml").exists())
        self.message = str(stopped.value)

    def test_a_run_stopped_in_its_warm_up_and_after_it_ends_with_the_same_bits(self, teacher, recipe, tmp_path):
        whole = make(teacher, recipe)
        expected = whole.fit(tmp_path / "whole")
        self.stopped_after(make(teacher, recipe), tmp_path / "cut", 2)
        assert "Stopped after round 2 of 3 of the warm-up." in self.message
        self.stopped_after(make(teacher, recipe), tmp_path / "cut", 3)
        assert "Stopped after round 2 of 6." in self.message
        resumed = make(teacher, recipe)
        found = resumed.fit(tmp_path / "cut", resume=True)
        parts = [d.round._stateful() for d in (whole, resumed)]
        assert parts[0].keys() == {"student", "generator", "connectors", "scaler", "image_bank"}
        for name in parts[0]:
            first, second = (part[name].state_dict() for part in parts)
            assert all(torch.equal(first[key], second[key]) for key in first), name
        assert (found.agreement, found.images, found.best_round) == (
            expected.agreement, expected.images, expected.best_round,
        )  # fmt: skip
        rounds = [
            [line.split(",")[0] for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
            for run in ("whole", "cut")
        ]
        assert rounds[0] == ['{"round": -2', '{"round": 0', '{"round": 2', '{"round": 4', '{"round": 6']
        assert rounds[1] == ['{"round": -1', *rounds[0][1:]] or rounds[1] == [
            '{"round": -2', '{"round": -1', *rounds[0][1:]
        ]  # fmt: skip

    def test_what_it_counts(self, distiller):
        result = distiller.fit()
        assert result.rounds == 6
        assert result.images == (WARM_UP + 6 * 2) * BATCH
        assert result.student_images == 6 * 2 * BATCH
        assert result.teacher_queries == (WARM_UP + 6 * (2 + 2)) * BATCH

    def test_the_log_counts_the_steps_of_the_warm_up(self, distiller, caplog):
        with caplog.at_level("INFO", logger="dfad"):
            distiller.fit()
        assert next(m for m in caplog.messages if m.startswith("Warm-up")).startswith("Warm-up 1/3  generator")
        assert any(m.startswith("Round 6/6") for m in caplog.messages)

    def test_a_checkpoint_of_before_the_recipe_is_resumed(self, teacher, config):
        first = make(teacher, config)
        first.run_round()
        state = copy.deepcopy(first.state_dict())
        for name in ("augmentation", "image_bank", "random_fields"):
            del state["rng"][name]
        second = make(teacher, config)
        second.load_state_dict(state)
        assert torch.equal(first.run_round()["student_loss"], second.run_round()["student_loss"])

    def test_the_estimate_adds_the_warm_up(self, teacher, recipe):
        short, long = (estimate(make(teacher, with_method(recipe, warm_up=n))) for n in (1, 1000))
        assert short.flops_per_round == long.flops_per_round
        per_step = (long.total_flops - short.total_flops) / 999
        assert 0 < per_step < long.flops_per_round
        assert short.total_flops == per_step + 6 * short.flops_per_round


class TestWhatACaptureNeeds:
    def test_the_host_never_waits(self, distiller):
        with NoWaiting():
            distiller.round.warm_up()
            distiller.round()

    def test_the_bank_stays_where_it_is(self, distiller):
        bank = distiller.round.image_bank
        before = [tensor.data_ptr() for tensor in bank.state_dict().values()]
        for _ in range(WARM_UP + 2):
            distiller.run_round()
        assert [tensor.data_ptr() for tensor in bank.state_dict().values()] == before
        assert bank.written == (WARM_UP + 2 * 2) * BATCH

    def test_a_capture_knows_every_stream_that_a_round_draws_from(self, distiller, monkeypatch):
        registered = {}
        monkeypatch.setattr(
            distiller.engine, "run", lambda round_, generators: registered.update(them=generators) or round_()
        )
        for _ in range(WARM_UP):
            distiller.run_round()
        before = {name: rng.get_state() for name, rng in distiller.round.rng.items()}
        distiller.run_round()
        drawn = {name for name, rng in distiller.round.rng.items() if not torch.equal(rng.get_state(), before[name])}
        assert drawn == {"noise", "mixing", "augmentation", "image_bank", "random_fields"}
        assert all(any(distiller.round.rng[name] is g for g in registered["them"]) for name in drawn)


class TestSchedule:
    def test_the_learning_rate_rises_and_then_falls(self):
        optimizer = OptimizerConfig(warm_up=0.2)
        assert optimizer.factor(0.0) == pytest.approx(0.01)
        assert optimizer.factor(0.1) == pytest.approx(0.505)
        assert optimizer.factor(0.2) == pytest.approx(1.0)
        assert optimizer.factor(0.6) == pytest.approx(0.5)
        assert optimizer.factor(1.0) == pytest.approx(0.0)

    def test_without_warm_up_it_is_the_schedule_of_before(self):
        optimizer = OptimizerConfig()
        assert [optimizer.factor(x) for x in (0.0, 0.5)] == pytest.approx([1.0, 0.5])

    def test_it_must_leave_rounds(self):
        with pytest.raises(ValueError, match=r"warm_up is 1\.0; it must be in \[0, 1\)"):
            OptimizerConfig(warm_up=1.0)
