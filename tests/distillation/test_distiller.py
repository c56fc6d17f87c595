"""The round, its order and freezing; the run around it."""

import random
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dfad import functional, models
from dfad.config import (
    ActivationConfig,
    AugmentationConfig,
    DistillConfig,
    GeneratorConfig,
    ImageBankConfig,
    InterpolationConfig,
    OptimizerConfig,
    OptimizersConfig,
    RegularizerConfig,
    SelectionConfig,
    StudentConfig,
    TeacherConfig,
)
from dfad.distillation.distiller import Distiller, distill
from dfad.errors import ConfigurationError, DivergenceError, ModelError, RunFolderError
from dfad.models.convnet import ConvNet
from dfad.models.taps import Outputs
from tests.conftest import IMAGE_SHAPE, RUN_FILES, with_method

WITHOUT_EXTRAS = {
    "activation": ActivationConfig(),
    "interpolation": InterpolationConfig(),
    "regularizers": RegularizerConfig(),
}


@pytest.fixture
def distiller(teacher, student, config) -> Distiller:
    return Distiller(teacher, student, config, image_shape=IMAGE_SHAPE)


def snapshot(network: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


def moved(network: nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, value in network.state_dict().items() if not torch.equal(value, before[name])}


def parameters(network: nn.Module) -> set[str]:
    return {name for name, _ in network.named_parameters()}


def buffers(network: nn.Module) -> set[str]:
    return {name for name, _ in network.named_buffers()}


class TestWhatMoves:
    def test_the_student_step_moves_the_student_and_its_connectors(self, distiller):
        parts = {name: getattr(distiller.round, name) for name in ("student", "connectors", "generator")}
        before = {name: snapshot(part) for name, part in parts.items()}
        teacher = snapshot(distiller.teacher.network)
        distiller.round.student_step()
        assert moved(distiller.student, before["student"]) == parameters(distiller.student) | buffers(distiller.student)
        assert parameters(distiller.round.connectors) <= moved(distiller.round.connectors, before["connectors"])
        assert moved(distiller.generator, before["generator"]) == buffers(distiller.generator)
        assert not moved(distiller.teacher.network, teacher)

    @pytest.mark.parametrize("mode", ["train", "eval"])
    def test_the_generator_step_moves_the_generator(self, mode, teacher, student, config):
        distiller = Distiller(teacher, student, with_method(config, student_batchnorm=mode), image_shape=IMAGE_SHAPE)
        before, generator = snapshot(distiller.student), snapshot(distiller.generator)
        connectors, teacher_before = snapshot(distiller.round.connectors), snapshot(distiller.teacher.network)
        distiller.round.generator_step()
        assert parameters(distiller.generator) <= moved(distiller.generator, generator)
        assert moved(distiller.student, before) == (buffers(distiller.student) if mode == "train" else set())
        assert not moved(distiller.round.connectors, connectors) & parameters(distiller.round.connectors)
        assert not moved(distiller.teacher.network, teacher_before)

    def test_no_gradient_is_left_where_none_belongs(self, distiller):
        distiller.round.student_step()
        assert all(parameter.grad is None for parameter in distiller.generator.parameters())
        of_student = [parameter.grad.clone() for parameter in distiller.student.parameters()]
        distiller.round.generator_step()
        assert all(parameter.grad is None for parameter in distiller.teacher.network.parameters())
        assert all(
            torch.equal(parameter.grad, gradient)
            for parameter, gradient in zip(distiller.student.parameters(), of_student, strict=True)
        )
        assert all(parameter.requires_grad for parameter in distiller.student.parameters())

    def test_the_callers_teacher_is_left_as_it_was(self, teacher, student, config):
        before = snapshot(teacher)
        distill(teacher, student, config)
        assert not moved(teacher, before)
        assert teacher.training
        assert all(parameter.requires_grad for parameter in teacher.parameters())

    def test_mixed_images_move_batchnorm_statistics_only_where_they_may(self, teacher, student, config):
        moves = {}
        for batchnorm in ("update", "keep"):
            interpolation = replace(config.method.interpolation, batchnorm=batchnorm)
            distiller = Distiller(
                teacher, student, with_method(config, interpolation=interpolation), image_shape=IMAGE_SHAPE
            )
            distiller.student.train()
            before = snapshot(distiller.student)
            distiller.round.interpolation.joint_terms(torch.randn(16, *IMAGE_SHAPE), torch.randn(16, 4))
            moves[batchnorm] = moved(distiller.student, before)
        assert moves == {"update": buffers(student), "keep": set()}

    def test_a_round_is_student_steps_and_then_a_generator_step(self, distiller, monkeypatch):
        order = []
        for name in ("student_step", "generator_step"):
            original = getattr(distiller.round, name)
            monkeypatch.setattr(distiller.round, name, lambda n=name, f=original: order.append(n) or f())
        distiller.round()
        assert order == ["student_step"] * 2 + ["generator_step"]


class TestLosses:
    """Each term against its equation, written out."""

    def test_student_terms(self, teacher, student, config, monkeypatch):
        distiller = Distiller(teacher, student, config, image_shape=IMAGE_SHAPE)
        images, coefficient = torch.randn(16, *IMAGE_SHAPE), torch.rand(16)
        monkeypatch.setattr(distiller.round, "generator", lambda noise: images)
        monkeypatch.setattr(distiller.round.interpolation, "sample_coefficient", lambda: coefficient)
        with torch.no_grad():
            t = teacher.eval()(images)
            s = student.train()(images)
            connected = distiller.round.connectors(s.taps)
            activation = sum(
                torch.clamp(1 - torch.where(b > 0, 1.0, -1.0) * a, min=0).square().mean()
                for a, b in zip(connected, t.taps, strict=True)
            )
            weight = coefficient.view(-1, 1)
            soft = t.logits.softmax(1)
            label = weight * soft + (1 - weight) * soft.flip(0)
            pixels = coefficient.view(-1, 1, 1, 1)
            mixed = student(pixels * images + (1 - pixels) * images.flip(0)).logits
            expected = {
                "discrepancy": (s.logits - t.logits).abs().mean(),
                "activation": activation,
                "interpolation": F.kl_div(mixed.log_softmax(1), label, reduction="batchmean"),
            }
        terms = distiller.round.student_step()
        for name, value in expected.items():
            torch.testing.assert_close(terms[f"student/{name}"], value, rtol=1e-4, atol=1e-5)
        total = expected["discrepancy"] + 0.1 * expected["activation"] + 0.5 * expected["interpolation"]
        torch.testing.assert_close(terms["student_loss"], total, rtol=1e-4, atol=1e-5)

    def test_generator_terms(self, teacher, student, config, monkeypatch):
        distiller = Distiller(teacher, student, with_method(config, student_batchnorm="eval"), image_shape=IMAGE_SHAPE)
        images = torch.randn(16, *IMAGE_SHAPE, requires_grad=True)
        monkeypatch.setattr(distiller.round, "generator", lambda noise: images)
        distiller.round.connectors.eval()
        with torch.no_grad():
            t, s = teacher.eval()(images), student.eval()(images)
            prediction = t.logits.softmax(1)
            first = next(m for m in teacher.modules() if isinstance(m, nn.Conv2d))(images)
            norm = next(m for m in teacher.modules() if isinstance(m, nn.BatchNorm2d))
            first_distance = (first.mean((0, 2, 3)) - norm.running_mean).norm() + (
                first.var((0, 2, 3), correction=0) - norm.running_var
            ).norm()
            expected = {
                "adversarial": -(s.logits - t.logits).abs().mean(),
                "activation": -distiller.round.activation(distiller.round.connectors(s.taps), t.taps),
                "one_hot": -prediction.max(1).values.log().mean(),
                "diversity": (prediction.mean(0) * prediction.mean(0).log()).sum(),
            }
        terms = distiller.round.generator_step()
        for name, value in expected.items():
            torch.testing.assert_close(terms[f"generator/{name}"], value, rtol=1e-4, atol=1e-5)
        assert terms["generator/batchnorm"] > first_distance
        weights = {"adversarial": 1, "activation": 0.05, "batchnorm": 0.1, "one_hot": 0.2, "diversity": 0.3}
        total = sum(weight * terms[f"generator/{name}"] for name, weight in weights.items())
        torch.testing.assert_close(terms["generator_loss"], total)

    def test_labels_may_be_asked_of_the_teacher(self, teacher, student, config):
        interpolation = replace(config.method.interpolation, labels="teacher")
        distiller = Distiller(
            teacher, student, with_method(config, interpolation=interpolation), image_shape=IMAGE_SHAPE
        )
        images, coefficient = torch.randn(16, *IMAGE_SHAPE), torch.rand(16)
        distiller.round.interpolation.sample_coefficient = lambda: coefficient
        distiller.student.eval()
        mixed = functional.mix(images, coefficient)
        with torch.no_grad():
            expected = F.kl_div(
                student(mixed).logits.log_softmax(1), teacher.eval()(mixed).logits.softmax(1), reduction="batchmean"
            )
        torch.testing.assert_close(
            distiller.round.interpolation.joint_terms(images, torch.full((16, 4), torch.nan))["interpolation"].detach(),
            expected,
        )

    def test_mixed_images_may_have_a_step_of_their_own(self, teacher, student, config, monkeypatch):
        interpolation = InterpolationConfig(weight=0.5, labels="teacher", step="own")
        distiller = Distiller(
            teacher, student, with_method(config, interpolation=interpolation), image_shape=IMAGE_SHAPE
        )
        coefficient, steps = torch.rand(16), []
        monkeypatch.setattr(distiller.round.interpolation, "sample_coefficient", lambda: coefficient)
        descend = distiller.engine.descend
        monkeypatch.setattr(
            distiller.engine, "descend", lambda loss, optimizer: steps.append(loss.item()) or descend(loss, optimizer)
        )
        terms = distiller.round.student_step()
        assert len(steps) == 2
        assert steps[0] == pytest.approx(terms["student/discrepancy"].item() + 0.1 * terms["student/activation"].item())
        assert steps[1] == pytest.approx(0.5 * terms["student/interpolation"].item())

        images = torch.randn(16, *IMAGE_SHAPE)
        mixed = functional.mix(images, coefficient)
        with torch.no_grad():
            loss = distiller.round.interpolation.own_loss(
                images, torch.full((16, 4), torch.nan), distiller.round.imitation
            )
            s, t = student(mixed), teacher.eval()(mixed)
            expected = (s.logits - t.logits).abs().mean() + 0.1 * distiller.round.activation(
                distiller.round.connectors(s.taps), t.taps
            )
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)

    def test_the_student_nears_and_the_generator_widens_the_discrepancy(self, teacher, student, config):
        plain = with_method(config, **WITHOUT_EXTRAS, student_batchnorm="eval")
        distiller = Distiller(teacher, student, plain, image_shape=IMAGE_SHAPE)
        noise = torch.randn(16, 8)
        distiller.round.sample_noise = lambda count, stream="noise": noise

        def discrepancy() -> float:
            with torch.no_grad():
                images = distiller.generator(noise)
                return F.l1_loss(student.eval()(images).logits, teacher.eval()(images).logits).item()

        before = discrepancy()
        for _ in range(20):
            distiller.round.generator_step()
        widened = discrepancy()
        for _ in range(20):
            distiller.round.student_step()
        assert discrepancy() < widened
        assert widened > before

    def test_parts_of_weight_0_are_not_computed(self, teacher, student, config):
        distiller = Distiller(teacher, student, with_method(config, **WITHOUT_EXTRAS), image_shape=IMAGE_SHAPE)
        terms = distiller.round()
        assert {name for name in terms if "/" in name} == {"student/discrepancy", "generator/adversarial"}
        assert not list(distiller.round.connectors.parameters())

    @pytest.mark.parametrize(
        "changes",
        [
            {"discrepancy": "kl", "temperature": 3.0},
            {"interpolation": InterpolationConfig(weight=1.0, coefficient="batch", concentration=0.2)},
            {"activation": ActivationConfig(weight=1.0, scaling="batchmean", stage_weights="halving", margin=0.5)},
        ],
        ids=str,
    )
    def test_one_fused_round_equals_one_reference_round(self, changes, teacher, config):
        states = []
        for fused in (True, False):
            torch.manual_seed(2)
            student = models.convnet(channels=(4, 8), num_classes=4, in_channels=1)
            engine = replace(config.engine, precision="float32")
            # Adam would turn rounding of gradients near zero into whole steps
            optimizer = OptimizersConfig(student=OptimizerConfig(lr=0.01), generator=OptimizerConfig(lr=0.01))
            settings = with_method(replace(config, fused=fused, engine=engine, optimizer=optimizer), **changes)
            distiller = Distiller(teacher, student, settings, image_shape=IMAGE_SHAPE)
            terms = distiller.round()
            states.append({**terms, **student.state_dict(), **distiller.generator.state_dict()})
        for name, value in states[0].items():
            torch.testing.assert_close(value, states[1][name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_the_streams_of_a_run_are_independent(teacher, student, config):
    drawn = []
    for seed in (0, 1):
        distiller = Distiller(teacher, student, replace(config, seed=seed), image_shape=IMAGE_SHAPE)
        drawn += [distiller.round.sample_noise(1000, stream).flatten() for stream in distiller.round.rng]
    correlations = torch.corrcoef(torch.stack(drawn)) - torch.eye(len(drawn))
    assert correlations.abs().max() < 0.06  # 8,000 numbers each: five standard errors


def test_mixing_coefficients_follow_the_beta_distribution(teacher, student, config):
    interpolation = replace(config.method.interpolation, concentration=0.3)
    settings = with_method(config, interpolation=interpolation, batch_size=20000)
    distiller = Distiller(teacher, student, settings, image_shape=IMAGE_SHAPE)
    drawn = distiller.round.interpolation.sample_coefficient()
    assert drawn.shape == (20000,)
    assert drawn.mean() == pytest.approx(0.5, abs=0.01)
    assert drawn.var() == pytest.approx(1 / (4 * (2 * 0.3 + 1)), rel=0.03)


class TestRun:
    def test_a_run_fills_its_folder(self, teacher, student, config, tmp_path):
        result = distill(
            teacher, student, replace(config, teacher=replace(config.teacher, image_size=8)), run_dir=tmp_path / "run"
        )
        assert {path.name for path in (tmp_path / "run").iterdir()} == RUN_FILES
        assert result.rounds == 6
        assert result.images == 6 * 3 * 16
        assert result.best_round in (4, 6)

    def test_reruns_are_bit_identical_and_seeds_differ(self, teacher, config):
        def weights(seed):
            torch.manual_seed(2)
            student = models.convnet(channels=(4, 8), num_classes=4, in_channels=1)
            Distiller(teacher, student, replace(config, seed=seed), image_shape=IMAGE_SHAPE).fit()
            return student.state_dict()

        first, again, other = weights(0), weights(0), weights(1)
        assert all(torch.equal(first[name], again[name]) for name in first)
        assert not torch.equal(first["stages.0.0.weight"], other["stages.0.0.weight"])

    def test_the_global_random_stream_of_the_caller_is_left_alone(self, distiller):
        torch.manual_seed(5)
        before = torch.get_rng_state()
        distiller.fit()
        assert torch.equal(torch.get_rng_state(), before)

    def test_the_evaluation_reports_but_never_selects(self, teacher, config):
        chosen = []
        for accuracies in ([0.9, 0.1, 0.2], [0.1, 0.2, 0.9]):
            torch.manual_seed(2)
            student = models.convnet(channels=(4, 8), num_classes=4, in_channels=1)
            answers = iter([*accuracies, accuracies[-1]])
            result = Distiller(
                teacher, student, config, image_shape=IMAGE_SHAPE, evaluate=lambda network, a=answers: next(a)
            ).fit()
            assert result.accuracy == accuracies[-1]
            chosen.append((result.best_round, result.best_agreement))
        assert chosen[0] == chosen[1]

    def test_losses_that_become_infinite_stop_the_run_and_keep_the_last_good_checkpoint(
        self, teacher, student, config, tmp_path
    ):
        settings = replace(config, optimizer=OptimizersConfig(student=OptimizerConfig(lr=1e30)))
        with pytest.raises(DivergenceError, match="became NaN or infinite by round 2"):
            Distiller(teacher, student, settings, image_shape=IMAGE_SHAPE).fit(tmp_path / "run")
        assert not (tmp_path / "run" / "checkpoint.pt").exists()
        assert not (tmp_path / "run" / "student.safetensors").exists()


class Drawing(nn.Module):
    """A network that draws from the generators of Python, NumPy and PyTorch."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x):
        if self.training:
            x = x + random.random() * np.random.rand() * torch.rand(1, device=x.device)  # noqa: NPY002
        return self.network(x)


class TestResume:
    def run(self, teacher, config, folder, rounds_before_stop=None, resume=False, draws=False):
        torch.manual_seed(2)
        student = models.convnet(channels=(4, 8), num_classes=4, in_channels=1)
        student = Drawing(student) if draws else student
        distiller = Distiller(teacher, student, config, image_shape=IMAGE_SHAPE)
        if rounds_before_stop is not None:
            run_round = distiller.run_round

            def stopping():
                if distiller.round_index == rounds_before_stop:
                    raise KeyboardInterrupt
                return run_round()

            distiller.run_round = stopping
        try:
            distiller.fit(folder, resume=resume)
        except KeyboardInterrupt:
            return None
        return distiller

    @pytest.mark.parametrize("draws", [False, True])
    def test_a_resumed_run_ends_with_the_bits_of_an_uninterrupted_one(self, draws, teacher, config, tmp_path):
        state = random.getstate()
        whole = self.run(teacher, config, tmp_path / "whole", draws=draws)
        assert random.getstate() == state
        random.seed(1)  # another process has other states
        np.random.seed(1)  # noqa: NPY002
        self.run(teacher, config, tmp_path / "cut", rounds_before_stop=1, draws=draws)
        self.run(teacher, config, tmp_path / "cut", rounds_before_stop=5, resume=True, draws=draws)
        resumed = self.run(teacher, config, tmp_path / "cut", resume=True, draws=draws)
        for name in ("student", "generator", "connectors"):
            expected, found = (getattr(run.round, name).state_dict() for run in (whole, resumed))
            assert all(torch.equal(expected[key], found[key]) for key in expected), name
        assert whole.best["round"] == resumed.best["round"]
        assert whole.best["agreement"] == resumed.best["agreement"]
        rounds = [line.split(",")[0] for line in (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()]
        assert rounds == ['{"round": 2', '{"round": 4', '{"round": 6']

    def test_a_folder_that_holds_a_run_is_refused(self, teacher, config, tmp_path):
        self.run(teacher, config, tmp_path / "run")
        before = (tmp_path / "run" / "student.safetensors").read_bytes()
        with pytest.raises(RunFolderError, match="already holds a run"):
            self.run(teacher, config, tmp_path / "run")
        assert (tmp_path / "run" / "student.safetensors").read_bytes() == before

    def test_overwriting_removes_the_run_and_nothing_else(self, teacher, student, config, tmp_path):
        folder = tmp_path / "run"
        self.run(teacher, config, folder)
        (folder / "notes.txt").write_text("mine")
        Distiller(teacher, student, config, image_shape=IMAGE_SHAPE).fit(folder, overwrite=True)
        assert (folder / "notes.txt").read_text() == "mine"

    def test_a_folder_of_other_things_is_refused(self, distiller, tmp_path):
        (tmp_path / "thesis.tex").write_text("years of work")
        with pytest.raises(RunFolderError, match="not a run's"):
            distiller.fit(tmp_path, overwrite=True)


def test_missing_kernels_are_an_error_and_never_a_silent_fallback(teacher, student, config, monkeypatch):
    from dfad_kernels import registration

    monkeypatch.setitem(sys.modules, "dfad_kernels._cpu", None)
    registration.load_kernels.cache_clear()
    with pytest.raises(ConfigurationError, match=r"C\+\+ kernels cannot be loaded.*--no-fused"):
        Distiller(teacher, student, config, image_shape=IMAGE_SHAPE)
    Distiller(teacher, student, replace(config, fused=False), image_shape=IMAGE_SHAPE)


class TestNetworksThatDoNotFit:
    def refused(self, teacher, student, config, **shape):
        with pytest.raises(ModelError) as refused:
            Distiller(teacher, student, config, **({"image_shape": IMAGE_SHAPE} | shape))
        return str(refused.value)

    def test_class_counts(self, teacher, config):
        student = models.convnet(channels=(4, 8), num_classes=5, in_channels=1)
        assert "5 classes and the teacher 4" in self.refused(teacher, student, config)
        assert self.refused(teacher, student, config).endswith("Build it with 4 classes.")
        named = replace(config, student=StudentConfig("convnet", {"channels": [4, 8], "in_channels": 1}))
        assert self.refused(teacher, student, named).endswith("Set --student.kwargs '{\"num_classes\": 4}'.")

    def test_channels(self, teacher, config):
        student = models.convnet(channels=(4, 8), num_classes=4, in_channels=3)
        assert "does not take the teacher's images (1, 8, 8)" in self.refused(teacher, student, config)

    def test_logits_of_another_shape_are_those_of_the_network_that_is_named(self, teacher, student, config):
        maps = nn.Sequential(nn.Conv2d(1, 4, 3))
        wanted = "returned logits of shape (2, 4, 6, 6) for 2 images"
        assert f"The student Sequential {wanted}" in self.refused(teacher, maps, config)
        assert f"The teacher Sequential {wanted}" in self.refused(maps, student, config)

    def test_number_of_taps(self, teacher, config):
        student = models.convnet(channels=(4, 8, 8), num_classes=4, in_channels=1)
        assert "same number" in self.refused(teacher, student, config)

    def test_no_batchnorm_whose_statistics_could_be_matched(self, student, config):
        plain = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        settings = with_method(config, activation=ActivationConfig())
        assert "has no BatchNorm" in self.refused(plain, student, settings)

    def test_a_network_of_logits_alone_distils_without_the_activation_regularizer(self, student, config):
        plain = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        settings = with_method(config, activation=ActivationConfig(), regularizers=RegularizerConfig())
        assert distill(plain, student, replace(settings, teacher=replace(config.teacher, image_size=8))).rounds == 6


def test_real_trained_networks_teach(shared_data, config):
    from dfad.models.weights import load_weights

    teacher = models.resnet32()
    load_weights(teacher, shared_data / "nets" / "cifar10-resnet32.safetensors")
    student = models.resnet20()
    settings = with_method(config, rounds=1, student_steps=1, batch_size=4)
    distiller = Distiller(teacher, student, settings)
    assert distiller.image_shape == (3, 32, 32)
    assert isinstance(distiller.teacher(torch.zeros(2, 3, 32, 32)), Outputs)
    assert distiller.fit().rounds == 1


def test_the_default_configuration_needs_nothing_but_networks(teacher, student):
    settings = DistillConfig(method=replace(DistillConfig().method, rounds=1, batch_size=4))
    assert distill(teacher, student, replace(settings, teacher=replace(settings.teacher, image_size=8))).rounds == 1


@pytest.mark.parametrize("size", [(28, 28), (30, 30), (48, 64), (96, 96), (224, 224)], ids=str)
@pytest.mark.parametrize("fused", [True, False])
def test_a_few_rounds_at_any_size(size, fused, config):
    teacher, student = (models.convnet(channels=channels, num_classes=4) for channels in ((4, 4), (2, 2)))
    method = {"rounds": 2, "student_steps": 1, "batch_size": 2}
    settings = with_method(replace(config, fused=fused, teacher=TeacherConfig(image_size=size)), **method)
    settings = replace(
        settings, generator=GeneratorConfig(noise_dim=4, width=2), selection=SelectionConfig(bank_size=4)
    )
    distiller = Distiller(teacher, student, settings)
    assert distiller.image_shape == (3, *size)
    assert distiller.fit().rounds == 2
    assert distiller.samples(2).images.shape == (2, 3, *size)


class Flat(nn.Module):
    """Flattens its images by view, which refuses those that are channels-last."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3 * 64, 4)

    def forward(self, images):
        return self.fc(images.view(len(images), -1))


class TestImagesOfTheBank:
    @pytest.fixture
    def settings(self, config):
        engine = replace(config.engine, precision="float32")
        optimizer = OptimizersConfig(student=OptimizerConfig(lr=0.1), generator=OptimizerConfig(lr=0.01))
        settings = replace(config, engine=engine, optimizer=optimizer, teacher=TeacherConfig(image_size=8, channels=3))
        views = AugmentationConfig(flip=True, crop=0.2)
        return with_method(
            settings, **WITHOUT_EXTRAS | {"regularizers": RegularizerConfig(one_hot=1.0), "augmentation": views},
            image_bank=ImageBankConfig(size=32), warm_up=1,
        )  # fmt: skip

    @pytest.mark.parametrize("fused", [True, False])
    def test_a_network_may_flatten_them_by_view(self, fused, settings):
        assert distill(Flat(), Flat(), replace(settings, fused=fused)).rounds == settings.method.rounds

    def test_dropout_of_features_is_drawn_alike_with_and_without_the_engine(self, settings):
        students = []
        for fused in (True, False):
            torch.manual_seed(5)
            teacher, student = (
                nn.Sequential(
                    *(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Dropout(), nn.Conv2d(8, 4, 1)),
                    *(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
                )
                for _ in range(2)
            )
            distill(teacher, student, replace(settings, fused=fused))
            students.append(student.state_dict())
        for name, value in students[0].items():
            torch.testing.assert_close(value, students[1][name], rtol=1e-3, atol=1e-4)


class TestTeachersWithoutBatchNorm:
    @pytest.fixture
    def plain(self):
        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())

    def test_their_images_are_shaped_by_what_is_left_where_that_is_asked_for(self, plain, student, config, caplog):
        regularizers = RegularizerConfig(batchnorm=1.0, one_hot=0.1, without_statistics="skip")
        settings = with_method(config, activation=ActivationConfig(), regularizers=regularizers, rounds=1)
        distiller = Distiller(plain, student, replace(settings, teacher=TeacherConfig(image_size=8)))
        assert "no BatchNorm whose statistics could be matched" in caplog.text
        assert set(distiller.run_round()) >= {"generator/one_hot"}
        assert "generator/batchnorm" not in distiller.run_round()

    def test_a_warm_up_needs_something_that_is_left(self, plain, student, config):
        regularizers = RegularizerConfig(batchnorm=1.0, without_statistics="skip")
        settings = with_method(config, activation=ActivationConfig(), regularizers=regularizers, warm_up=1)
        with pytest.raises(ModelError, match="Its images need a shape"):
            Distiller(plain, student, replace(settings, teacher=TeacherConfig(image_size=8)))


class Smooth(ConvNet):
    """Its taps enter SiLUs."""

    def forward(self, images):
        features, taps = images, []
        for stage in self.stages:
            taps.append(stage(features))
            features = F.silu(taps[-1])
        return Outputs(self.linear(features.mean((2, 3))), tuple(taps))


def test_activations_without_a_boundary_are_told_where_it_is_asked_for(student, config, caplog):
    smooth = Smooth((8, 16), 4, 1)
    settings = with_method(replace(config, teacher=TeacherConfig(image_size=8)), activation=ActivationConfig())
    Distiller(smooth, student, settings)
    assert "no boundary at zero" not in caplog.text
    with pytest.raises(ModelError, match="must match"):  # of its taps, no one is pooled
        Distiller(smooth, student, replace(settings, method=config.method))
    assert "its activations (SiLU) have no boundary at zero" in caplog.text
