"""What would fail at the end of a run is an error before its first round."""

import json
import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from dfad import models, train
from dfad.config import ActivationConfig, StudentConfig, TeacherConfig
from dfad.distillation import preflight
from dfad.distillation.distiller import Distiller, distill
from dfad.errors import ConfigurationError, ModelError, RunFolderError
from dfad.models.convnet import ConvNet
from dfad.models.model_file import load_model
from dfad.models.outputs import Outputs, as_outputs
from dfad.models.weights import load_weights
from dfad.runs import checkpoint
from tests.conftest import IMAGE_SHAPE, with_method

FIXTURES = Path(__file__).parents[1] / "fixtures"


class Shared(nn.Module):
    """A network whose convolution has two names, with extra state."""

    def __init__(self, extra=None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        block = nn.Conv2d(4, 4, 3, padding=1)
        self.blocks = nn.ModuleList([block, block])
        self.linear = nn.Linear(4, 4)
        self.extra = extra if extra is not None else {"version": 2}

    def get_extra_state(self):
        return self.extra

    def set_extra_state(self, state):
        self.extra = state

    def forward(self, images):
        features = self.norm(self.conv(images)).relu()
        for block in self.blocks:
            features = block(features).relu()
        return self.linear(features.mean((2, 3)))


class Masking(ConvNet):
    """A buffer of -inf, as attention masks hold it."""

    def __init__(self) -> None:
        super().__init__(channels=(4, 8), num_classes=4, in_channels=1)
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf]))


@pytest.fixture
def plain(config):
    """Without taps, so that any student fits."""
    return with_method(config, activation=ActivationConfig())


class TestFiniteness:
    @pytest.mark.parametrize("name", ["linear.weight", "stages.0.1.running_var", "stages.1.1.bias"])
    @pytest.mark.parametrize("value", [torch.nan, torch.inf])
    def test_a_broken_teacher_is_refused_by_its_tensor(self, name, value, teacher, student, config):
        teacher.state_dict()[name].view(-1)[0] = value
        with pytest.raises(ModelError, match=rf"teacher cannot be used: its {name} holds NaN or infinity\.") as refused:
            Distiller(teacher, student, config, image_shape=IMAGE_SHAPE)
        assert refused.value.exit_code == 3

    def test_several_are_counted_and_the_student_is_looked_at_too(self, teacher, student, config):
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.fill_(torch.nan)
        with pytest.raises(
            ModelError, match=r"student cannot be used: its stages\.0\.0\.weight .* so do \d+ tensors more"
        ):
            Distiller(teacher, student, config, image_shape=IMAGE_SHAPE)

    def test_what_is_no_module_is_refused(self, student, config):
        with pytest.raises(ModelError, match=r"The teacher is a str, not an nn\.Module\. dfad\.load_network"):
            Distiller("resnet20", student, config, image_shape=IMAGE_SHAPE)

    def test_masks_may_hold_infinity(self):
        preflight.require_finite(Masking(), "teacher")
        broken = Masking()
        broken.mask[0] = torch.nan
        with pytest.raises(ModelError, match="its mask holds NaN"):
            preflight.require_finite(broken, "teacher")

    def test_finite_weights_may_give_infinite_answers(self, student, plain):
        class Masked(Shared):
            def forward(self, images):
                logits = super().forward(images)
                return logits if images.sum() == 0 else logits.masked_fill(torch.arange(4) == 0, -torch.inf)

        with pytest.raises(ModelError, match="Masked returns NaN or infinite logits for random images"):
            Distiller(Masked(), student, plain, image_shape=IMAGE_SHAPE)


class TestFiles:
    def test_shared_modules_and_extra_state_are_written_and_come_back(self, teacher, plain, tmp_path, caplog):
        student = Shared()
        distiller = Distiller(teacher, student, plain, image_shape=IMAGE_SHAPE)
        distiller.fit(tmp_path / "run")
        assert "Shared is given without a factory: its files will hold weights alone" in caplog.text
        for name in ("student", "student_best"):
            again = Shared("other")
            load_weights(again, tmp_path / "run" / f"{name}.safetensors")
            assert again.extra == {"version": 2}
            expected = student.state_dict() if name == "student" else distiller.best["state"]
            found = again.state_dict()
            assert all(torch.equal(found[key], value) for key, value in expected.items() if key != "_extra_state")
        with pytest.raises(ModelError, match=r"how its network is built; it is a tests.*:Shared, given in Python"):
            load_model(tmp_path / "run" / "student.safetensors")
        # and a checkpoint holds them, too
        state = checkpoint.load(tmp_path / "run")
        assert state["student"]["_extra_state"] == {"version": 2}

    def test_extra_state_that_cannot_be_stored_is_refused_before_anything_is_written(self, teacher, plain, tmp_path):
        distiller = Distiller(teacher, Shared(extra={"when": object()}), plain, image_shape=IMAGE_SHAPE)
        with pytest.raises(ModelError, match="holds _extra_state, a dict, which can be stored neither"):
            distiller.fit(tmp_path / "run")
        assert not list(tmp_path.iterdir())
        assert distiller.round_index == 0

    def test_keyword_arguments_that_are_no_json_are_refused(self, teacher, student, plain, tmp_path):
        config = replace(plain, student=StudentConfig("mine:net", {"norm_layer": nn.BatchNorm2d}))
        with pytest.raises(ConfigurationError, match=r"student\.kwargs .*norm_layer.* cannot be written down"):
            Distiller(teacher, student, config, image_shape=IMAGE_SHAPE).fit(tmp_path / "run")
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("name", ["mean", "std"])
    def test_a_normalisation_of_other_channels_is_refused(self, name, teacher, student, config):
        values = {"mean": (0.5,), "std": (0.5,)} | {name: (0.5, 0.5, 0.5)}
        with pytest.raises(ModelError, match=rf"The {name} .* has 3 values, and the images have 1 channels"):
            Distiller(teacher, student, config, image_shape=IMAGE_SHAPE, normalisation=(values["mean"], values["std"]))

    def test_an_accuracy_may_be_a_tensor(self, teacher, student, config, tmp_path):
        distiller = Distiller(
            teacher, student, config, image_shape=IMAGE_SHAPE, evaluate=lambda network: torch.tensor(0.25)
        )
        assert distiller.fit(tmp_path / "run").accuracy == 0.25
        assert json.loads((tmp_path / "run" / "result.json").read_text())["accuracy"] == 0.25


class TestRoom:
    def test_a_disk_without_room_is_refused_with_both_figures(self, teacher, student, config, tmp_path, monkeypatch):
        usage = namedtuple("usage", ["total", "used", "free"])
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 20_000))
        distiller = Distiller(teacher, student, config, image_shape=IMAGE_SHAPE)
        with pytest.raises(RunFolderError, match=r"no room for this run: it needs about \d+ MB.* 0 MB are free"):
            distiller.fit(tmp_path / "run")
        assert not list(tmp_path.iterdir())

    def test_what_a_run_leaves_counts_as_room_and_fits_the_estimate(
        self, teacher, student, config, tmp_path, monkeypatch
    ):
        distiller = Distiller(teacher, student, config, image_shape=IMAGE_SHAPE)
        distiller.fit(tmp_path / "run")
        needed = preflight.bytes_of_run(student, distiller.generator, IMAGE_SHAPE, config)
        heavy = sum(
            path.stat().st_size for pattern in ("*.pt", "*.safetensors") for path in (tmp_path / "run").glob(pattern)
        )
        overhead = 5 * 40_000  # names and headers, which count in networks as small as these
        assert needed / 2 < heavy < needed + overhead
        usage = namedtuple("usage", ["total", "used", "free"])
        taken = sum(path.stat().st_size for path in (tmp_path / "run").iterdir() if path.is_file())
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, max(0, needed - taken)))
        preflight.check_room(tmp_path / "run", needed)


class TestTeacherOfAResumedRun:
    def test_another_one_is_refused_with_both_hashes(self, teacher, config, tmp_path):
        def distiller(network):
            torch.manual_seed(2)
            return Distiller(network, models.convnet(channels=(4, 8), num_classes=4, in_channels=1), config,
                             image_shape=IMAGE_SHAPE)  # fmt: skip

        first = distiller(teacher)
        first.fit(tmp_path / "run")
        with torch.no_grad():
            teacher.linear.bias[0] += 1e-3
        other = distiller(teacher)
        with pytest.raises(ModelError, match="cannot be resumed with another teacher") as refused:
            other.fit(tmp_path / "run", resume=True)
        assert first.teacher_hash in str(refused.value)
        assert other.teacher_hash in str(refused.value)
        assert other.round_index == 0

    def test_a_run_of_before_goes_on_and_the_log_says_what_is_not_known(self, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        shutil.copytree(FIXTURES / "run-of-0.1.0", tmp_path / "run")
        shutil.copy(FIXTURES / "teacher-of-0.1.0.safetensors", tmp_path / "teacher.safetensors")
        train.main(["--resume", "run"])
        assert "does not say which teacher it is of" in capsys.readouterr().err
        assert checkpoint.load(tmp_path / "run")["round"] == 6
        found, manifest = load_model(tmp_path / "run" / "student.safetensors")
        expected, _ = load_model(FIXTURES / "student-of-0.1.0.safetensors")
        for name, value in expected.state_dict().items():
            torch.testing.assert_close(found.state_dict()[name], value, rtol=1e-4, atol=1e-4)
        assert manifest["round"] == 6


class Unusual(ConvNet):
    """Returns a dictionary."""

    def forward(self, images):
        return {"features": images, "logits": super().forward(images).logits}


def test_networks_of_other_outputs_and_precisions_distil(plain, caplog):
    caplog.set_level("INFO")
    torch.manual_seed(1)
    settings = {"num_classes": 4, "in_channels": 1}
    teacher = Unusual(channels=(8, 16), **settings).bfloat16()
    student = Unusual(channels=(4, 8), **settings)
    config = replace(plain, teacher=TeacherConfig(image_size=8))
    assert Distiller(teacher, student, config).fit().rounds == 6
    assert caplog.text.count("Unusual returns a dict; its entry 'logits' is taken as the logits.") == 2
    assert "Unusual has weights in bfloat16; distilling casts them to float32." in caplog.text
    assert teacher.linear.weight.dtype == torch.bfloat16


class TestTeachersThatCannotTeach:
    def test_quantised(self, student, plain):
        network = models.convnet(channels=(8, 16), num_classes=4, in_channels=1)
        quantised = torch.ao.quantization.quantize_dynamic(network, {nn.Linear}, dtype=torch.qint8)
        with pytest.raises(ModelError, match=r"No gradient of the teacher ConvNet reaches.*quantised"):
            distill(quantised, student, replace(plain, teacher=TeacherConfig(channels=1, image_size=8)))

    def test_without_gradients(self, student, plain):
        class Closed(ConvNet):
            @torch.no_grad()
            def forward(self, images):
                return super().forward(images)

        with pytest.raises(ModelError, match="its logits carry none.*no_grad"):
            distill(Closed((8, 16), 4, 1), student, replace(plain, teacher=TeacherConfig(image_size=8)))


class Activated(ConvNet):
    """Its taps are what the ReLUs return."""

    def forward(self, images):
        outputs = super().forward(images)
        return Outputs(outputs.logits, tuple(tap.relu() for tap in outputs.taps))


class LastActivated(ConvNet):
    """Only its last tap is what a ReLU returns."""

    def forward(self, images):
        outputs = super().forward(images)
        return Outputs(outputs.logits, (outputs.taps[0], outputs.taps[1].relu()))


class BeginningAtZero(ConvNet):
    """Its last tap adds to what is not negative."""

    def forward(self, images):
        outputs = super().forward(images)
        skipped = torch.linspace(-1, 1, outputs.taps[1].shape[3]).relu()
        return Outputs(outputs.logits, (outputs.taps[0], outputs.taps[1] + skipped))


class Positive(ConvNet):
    """No value of its last tap is negative, and none is zero."""

    def forward(self, images):
        outputs = super().forward(images)
        return Outputs(outputs.logits, (outputs.taps[0], outputs.taps[1].exp()))


def test_taps_after_a_relu_are_refused_where_they_are_used(student, config, plain):
    settings = replace(config, teacher=TeacherConfig(image_size=8))
    with pytest.raises(ModelError, match=r"Tap 0 of the teacher is never negative.*--teacher\.taps"):
        Distiller(Activated((8, 16), 4, 1), student, settings)
    Distiller(Activated((8, 16), 4, 1), student, replace(plain, teacher=settings.teacher))
    with pytest.raises(ModelError, match=r"Tap 1 of the student is never negative.*--student\.taps"):
        Distiller(
            models.convnet(channels=(8, 16), num_classes=4, in_channels=1), LastActivated((8, 16), 4, 1), settings
        )


def test_a_residual_branch_that_begins_at_zero_is_no_relu(config):
    student = BeginningAtZero((8, 16), 4, 1)
    nn.init.zeros_(student.stages[1][1].weight)
    images = torch.randn(2, *IMAGE_SHAPE)
    tap = student.eval()(images).taps[1]
    assert (tap >= 0).all()
    assert (tap == 0).any()
    teacher = models.convnet(channels=(8, 16), num_classes=4, in_channels=1)
    Distiller(teacher, student, replace(config, teacher=TeacherConfig(image_size=8)))
    assert not student.stages[1][1].weight.any()


def test_values_that_are_all_positive_by_chance_are_no_relu(config):
    teacher = models.convnet(channels=(8, 16), num_classes=4, in_channels=1)
    Distiller(teacher, Positive((8, 16), 4, 1), replace(config, teacher=TeacherConfig(image_size=8)))


def test_a_student_that_is_larger_than_its_teacher_is_warned_of(teacher, student, plain, caplog):
    Distiller(student, teacher, replace(plain, teacher=TeacherConfig(image_size=8)))
    assert "more than its teacher's" in caplog.text


class TestWhatCannotBeUsed:
    @pytest.mark.parametrize(
        ("spoil", "words"),
        [
            (lambda network: network.to("meta"), "on the meta device"),
            (lambda network: nn.Sequential(network.stages, nn.LazyLinear(4)), r"its 1\.weight is lazy"),
            (lambda network: network.requires_grad_(False), "none of its parameters has requires_grad"),
        ],
    )
    def test_a_student_is_refused(self, spoil, words, teacher, student, plain):
        with pytest.raises(ModelError, match=words):
            Distiller(teacher, spoil(student), plain)

    def test_a_student_of_inference_mode_is_refused(self, teacher, plain):
        with torch.inference_mode():
            student = ConvNet(channels=(4, 8), num_classes=4, in_channels=1)
        with pytest.raises(ModelError, match=r"made under torch\.inference_mode"):
            Distiller(teacher, student, plain)

    def test_another_default_dtype_is_refused(self, teacher, student, plain):
        torch.set_default_dtype(torch.float64)
        try:
            with pytest.raises(ConfigurationError, match=r"default dtype is torch\.float64"):
                Distiller(teacher, student, plain)
        finally:
            torch.set_default_dtype(torch.float32)

    def test_a_student_that_no_gradient_reaches_is_refused(self, teacher, plain):
        class Detached(ConvNet):
            def forward(self, images):
                return super().forward(images).logits.detach()

        student = Detached(channels=(4, 8), num_classes=4, in_channels=1)
        with pytest.raises(ModelError, match="no gradient reaches a parameter of the student Detached"):
            Distiller(teacher, student, plain)

    def test_a_student_that_its_factory_does_not_build_is_refused(self, teacher, student, plain):
        config = replace(plain, student=StudentConfig("convnet", {"channels": [4, 9], "num_classes": 4}))
        with pytest.raises(ModelError, match=r"is not the network that student\.factory, convnet with .*, builds"):
            Distiller(teacher, student, config)


def in_bfloat16() -> nn.Module:
    return models.convnet(channels=[4, 8], num_classes=4, in_channels=1).bfloat16()


def test_a_factory_may_build_a_student_in_bfloat16(teacher, plain):
    torch.manual_seed(3)
    config = replace(plain, student=StudentConfig(f"{__name__}:{in_bfloat16.__name__}"))
    Distiller(teacher, in_bfloat16(), config, image_shape=IMAGE_SHAPE)


class Several(ConvNet):
    """Features and logits, in an order."""

    def __init__(self, order, **settings) -> None:
        super().__init__(**settings)
        self.order = order

    def forward(self, images):
        logits = super().forward(images).logits
        features = logits[:, :3] * 2
        found = {"features": features, "scores": features @ torch.ones(3, 4)}
        return tuple(found[name] for name in self.order)


def test_features_are_not_taken_for_logits(teacher, plain):
    settings = {"channels": (4, 8), "num_classes": 4, "in_channels": 1}
    with pytest.raises(ModelError, match=r"its entry '0' \(2, 3\), .* is what entry '1' \(2, 4\) is computed from"):
        Distiller(teacher, Several(("features", "scores"), **settings), plain)
    Distiller(teacher, Several(("scores", "features"), **settings), plain)


@pytest.mark.parametrize("name", ["logits", "out", "output"])
def test_logits_are_taken_by_their_name(name, teacher, plain, caplog):
    class Named(ConvNet):
        def forward(self, images):
            features = super().forward(images).logits
            found = features @ torch.ones(4, 4)
            return {"features": features, name: found, "probabilities": found.softmax(dim=1)}

    network = Named(channels=(4, 8), num_classes=4, in_channels=1).eval()
    with caplog.at_level("INFO"):
        Distiller(teacher, network, plain, image_shape=IMAGE_SHAPE)
    assert f"its entry {name!r} is taken as the logits" in caplog.text
    images = torch.randn(2, *IMAGE_SHAPE)
    assert torch.equal(as_outputs(network(images)).logits, network(images)[name])


def test_probabilities_are_announced(teacher, student, plain, caplog):
    class Softmax(ConvNet):
        def forward(self, images):
            return super().forward(images).logits.softmax(dim=1)

    Distiller(Softmax(channels=(4, 8), num_classes=4, in_channels=1), student, plain, image_shape=IMAGE_SHAPE)
    assert "seems to return probabilities" in caplog.text
