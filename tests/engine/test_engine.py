"""Every part of the engine computes what plain PyTorch computes, and none waits for the device."""

import logging
import sys
import types
from collections import Counter
from dataclasses import fields, replace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dfad import models
from dfad.config import EngineConfig, OptimizerConfig, OptimizersConfig
from dfad.distillation.distiller import Distiller
from dfad.distillation.frozen_teacher import FrozenTeacher
from dfad.distillation.round import STREAMS_OF_A_ROUND
from dfad.engine import Engine, choose_device
from dfad.engine.compile import compile_call
from dfad.engine.fold_batchnorm import fold_batchnorm
from dfad.errors import ConfigurationError, ModelError
from dfad.models.probing import dry_forward
from dfad.presets import PRESETS
from tests.conftest import IMAGE_SHAPE
from tests.waiting import NoWaiting

CPU = torch.device("cpu")
ALL_OFF = EngineConfig(
    precision="float32",
    channels_last="off",
    fused_optimizers="off",
    fold_batchnorm="off",
    fuse_batchnorm="off",
    fuse_convolutions="off",
    cast_weights="off",
    merge_upsampling="off",
    keep_memory="off",
    cuda_graph="off",
    two_streams="off",
    compile="off",
)
PARTS = ("channels_last", "fused_optimizers", "fold_batchnorm", "fuse_batchnorm", "merge_upsampling")
# Adam would turn rounding of gradients near zero into whole steps
CALM = OptimizersConfig(student=OptimizerConfig(lr=0.01), generator=OptimizerConfig(lr=0.01))


def make(teacher, config) -> Distiller:
    torch.manual_seed(2)
    student = models.convnet(channels=(4, 8), num_classes=4, in_channels=1)
    return Distiller(teacher, student, config, image_shape=IMAGE_SHAPE)


class TestPartsComputeTheSame:
    @pytest.fixture
    def plain(self, teacher, config):
        return self.weights_after_ten_rounds(teacher, replace(config, fused=False, engine=ALL_OFF))

    def weights_after_ten_rounds(self, teacher, config):
        distiller = make(teacher, replace(config, optimizer=CALM))
        for _ in range(10):
            distiller.engine.run(distiller.round)
        return {**distiller.student.state_dict(), **distiller.generator.state_dict()}

    @pytest.mark.parametrize(
        "parts",
        [("losses",), *[(part,) for part in PARTS], ("channels_last", "fuse_batchnorm"), ("losses", *PARTS)],
        ids="+".join,
    )
    def test_on_equals_off(self, parts, plain, teacher, config, monkeypatch):
        monkeypatch.setattr("dfad.engine.fuse_batchnorm.SMALLEST", 0)
        engine = replace(ALL_OFF, **{part: "on" for part in parts if part != "losses"})
        weights = self.weights_after_ten_rounds(teacher, replace(config, fused="losses" in parts, engine=engine))
        for name, value in weights.items():
            torch.testing.assert_close(
                value, plain[name], rtol=2e-3, atol=2e-4, msg=lambda message, n=name: f"{n}: {message}"
            )

    def test_compiled_equals_eager(self, plain, teacher, config):
        engine = replace(ALL_OFF, compile="on")
        weights = self.weights_after_ten_rounds(teacher, replace(config, fused=False, engine=engine))
        for name, value in weights.items():
            torch.testing.assert_close(value, plain[name], rtol=2e-3, atol=2e-4)

    def test_bfloat16_rounds_networks_but_not_losses(self, teacher, config):
        losses = []
        for precision in ("float32", "bfloat16"):
            distiller = make(teacher, replace(config, engine=EngineConfig(precision=precision)))
            terms = distiller.round()
            assert {term.dtype for term in terms.values()} == {torch.float32}
            losses.append(terms)
        for name, value in losses[0].items():
            torch.testing.assert_close(losses[1][name], value, rtol=0.1, atol=0.05, msg=name)
        assert {parameter.dtype for parameter in distiller.student.parameters()} == {torch.float32}
        convolutions = [m for m in distiller.teacher.network.modules() if isinstance(m, nn.Conv2d)]
        assert {m.weight.dtype for m in convolutions} == {torch.bfloat16}


class TestWhatACaptureNeeds:
    """A captured round is replayed on the same memory, without the host."""

    @pytest.mark.parametrize("step", ["joint", "own"])
    def test_the_host_never_waits_inside_a_round(self, step, teacher, config):
        interpolation = replace(config.method.interpolation, step=step, labels="teacher")
        distiller = make(teacher, replace(config, method=replace(config.method, interpolation=interpolation)))
        with NoWaiting():
            distiller.engine.run(distiller.round)

    @pytest.mark.parametrize("preset", PRESETS)
    def test_no_preset_waits_or_draws_where_no_graph_knows(self, preset, teacher, config):
        """A replay draws new numbers from the streams alone that are registered with its graph."""
        method = PRESETS[preset].method
        bank = replace(method.image_bank, size=min(method.image_bank.size, 64))
        method = replace(method, batch_size=16, student_steps=2, warm_up=1, image_bank=bank)
        distiller = make(teacher, replace(config, method=method))
        distiller.round.warm_up()
        before = {name: stream.get_state() for name, stream in distiller.round.rng.items()}
        default = torch.get_rng_state()
        with NoWaiting():
            distiller.engine.run(distiller.round)
        drawn = {
            name for name, stream in distiller.round.rng.items() if not torch.equal(stream.get_state(), before[name])
        }
        assert drawn <= set(STREAMS_OF_A_ROUND)
        assert ("random_fields" in drawn) == bool(method.random_fields.share)
        assert torch.equal(torch.get_rng_state(), default)

    @pytest.mark.parametrize(
        "wait",
        [
            lambda x: x.sum().item(),
            lambda x: x[x > 0],
            lambda x: bool((x > 0).all()),
            lambda x: x.unique(),
            lambda x: x * torch.tensor([2.0]),
        ],
    )
    def test_that_test_would_notice(self, wait):
        with pytest.raises(AssertionError, match="waits for the device"), NoWaiting():
            wait(torch.randn(4))

    def test_nothing_moves_in_memory_between_rounds(self, teacher, config):
        distiller = make(teacher, config)

        def addresses() -> dict[str, int]:
            networks = (distiller.student, distiller.generator, distiller.round.connectors, distiller.teacher.network)
            found = {
                f"{i}.{name}": value.data_ptr()
                for i, network in enumerate(networks)
                for name, value in network.state_dict(keep_vars=True).items()
            }
            for i, optimizer in enumerate((distiller.round.student_optimizer, distiller.round.generator_optimizer)):
                for j, state in enumerate(optimizer.state.values()):
                    found |= {f"{i}.{j}.{k}": v.data_ptr() for k, v in state.items() if isinstance(v, torch.Tensor)}
                found |= {f"{i}.lr.{j}": group["lr"].data_ptr() for j, group in enumerate(optimizer.param_groups)}
            return found

        distiller.round.set_learning_rates(0.5)
        distiller.round()
        before = addresses()
        for progress in (0.6, 0.7, 0.8):
            distiller.round.set_learning_rates(progress)
            distiller.round()
        assert addresses() == before
        assert distiller.round.student_optimizer.param_groups[0]["lr"] < 0.1

    def test_resuming_keeps_the_learning_rate_on_its_tensor(self, teacher, config):
        distiller = make(teacher, config)
        distiller.round()
        rate = distiller.round.student_optimizer.param_groups[0]["lr"]
        distiller.load_state_dict(make(teacher, config).state_dict())
        assert distiller.round.student_optimizer.param_groups[0]["lr"] is rate

    @pytest.mark.parametrize("precision", ["float32", "bfloat16"])
    def test_a_round_compiles_each_of_its_networks_without_graph_breaks(self, precision, config):
        config = replace(config, engine=EngineConfig(precision=precision, fuse_batchnorm="off"))
        terms = []
        for compiled in (False, True):
            torch.manual_seed(2)
            distiller = Distiller(models.resnet20(), models.resnet20(), config, image_shape=(3, 16, 16))
            if compiled:
                for network in (
                    distiller.teacher.network,
                    distiller.teacher.measured,
                    distiller.student,
                    distiller.generator,
                ):
                    compile_call(network, fullgraph=True, backend="eager")
            terms.append(distiller.round())
        torch.testing.assert_close(terms[1], terms[0])


class _Copies(TorchDispatchMode):
    """Counts copies of feature maps and images into another memory format."""

    def __init__(self, batch_size: int) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types_, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        copies = function.overloadpacket.__name__ in ("clone", "_to_copy", "copy_", "contiguous")
        if copies and result.ndim == 4 and result.shape[0] == self.batch_size:
            source = args[1] if function.overloadpacket.__name__ == "copy_" else args[0]
            if source.stride() != result.stride():
                self.counts[f"{function} {tuple(result.shape)}"] += 1
        return result


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_channels_last_goes_from_end_to_end_without_copies(precision, teacher, config):
    distiller = make(teacher, replace(config, engine=EngineConfig(precision=precision)))
    distiller.round()
    with _Copies(config.method.batch_size) as copies:
        terms = distiller.round()
    assert not copies.counts
    assert torch.isfinite(terms["student_loss"])
    with distiller.engine.autocast():
        images = distiller.generator(distiller.round.sample_noise(4))
        features = distiller.teacher(images).taps[0]
    assert features.is_contiguous(memory_format=torch.channels_last)


def test_that_test_would_notice_a_copy():
    with _Copies(4) as copies:
        torch.randn(4, 3, 2, 2).contiguous(memory_format=torch.channels_last)
    assert copies.counts.total() == 1


def test_all_off_is_everything_off():
    switches = {field.name: getattr(ALL_OFF, field.name) for field in fields(ALL_OFF)}
    of_no_part = {"precision", "batchnorm", "sent_gradients"}  # what they say has no off
    assert {value for name, value in switches.items() if name not in of_no_part} == {"off"}


class TestWhatTheMachineAdmits:
    def test_a_cuda_graph_that_is_asked_for_needs_a_gpu(self):
        with pytest.raises(
            ConfigurationError, match=r"engine\.cuda_graph is on, but cannot run here: .* device is cpu"
        ):
            Engine(EngineConfig(cuda_graph="on"), fused=True, device=CPU)

    def test_under_auto_it_is_left_out_with_one_line(self, caplog):
        with caplog.at_level(logging.INFO, logger="dfad"):
            engine = Engine(EngineConfig(precision="float32"), fused=True, device=CPU)
        assert not engine.cuda_graph
        assert [m for m in caplog.messages if "cuda_graph" in m] == [
            "Without engine.cuda_graph: CUDA graphs need an NVIDIA GPU, and the device is cpu."
        ]

    def test_without_fused_every_part_is_off(self, caplog):
        with caplog.at_level(logging.INFO, logger="dfad"):
            engine = Engine(EngineConfig(), fused=False, device=CPU)
        assert not any(
            getattr(engine, part) for part in (*PARTS, "fuse_convolutions", "keep_memory", "cuda_graph", "compile")
        )
        assert engine.precision == "float32"
        assert not caplog.messages

    @pytest.mark.parametrize("precision", ["float16", "tf32"])
    def test_precisions_that_a_cpu_has_not(self, precision):
        with pytest.raises(ConfigurationError, match=f"engine.precision is {precision}"):
            Engine(EngineConfig(precision=precision), fused=True, device=CPU)

    @pytest.mark.parametrize(
        ("mallopt", "device", "words"),
        [(True, "cuda", "PyTorch keeps the memory of cuda itself"), (False, "cpu", "the C library has no mallopt")],
    )
    def test_memory_that_cannot_be_kept(self, mallopt, device, words, monkeypatch):
        monkeypatch.setattr("dfad.engine.engine.has_mallopt", lambda: mallopt)
        with pytest.raises(ConfigurationError, match=words):
            Engine(EngineConfig(precision="float32", keep_memory="on"), fused=False, device=torch.device(device))

    def test_apex_needs_a_gpu(self):
        with pytest.raises(ConfigurationError, match="runs on CUDA alone"):
            Engine(EngineConfig(), fused=True, device=CPU, optimizer_backend="apex")

    def test_apex_that_is_absent(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "apex", None)
        with pytest.raises(ConfigurationError, match="which is not installed.*optimizer.backend torch"):
            Engine(EngineConfig(), fused=True, device=torch.device("cuda"), optimizer_backend="apex")

    def test_another_package_named_apex(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))
        with pytest.raises(ConfigurationError, match="is not NVIDIA's"):
            Engine(EngineConfig(), fused=True, device=torch.device("cuda"), optimizer_backend="apex")

    def test_devices(self):
        assert choose_device("auto").type in ("cpu", "cuda")
        for name, message in (("gpu", "no device 'gpu'"), ("meta", "not supported"), ("cuda:99", "not available")):
            with pytest.raises(ConfigurationError, match=message):
                choose_device(name)


class TestFrozenTeacher:
    def engine(self, **switches) -> Engine:
        return Engine(replace(ALL_OFF, **switches), fused=True, device=CPU)

    @pytest.mark.parametrize(
        ("name", "shape", "left"),
        [
            ("resnet20", (3, 32, 32), 0),
            ("wrn_16_1", (3, 32, 32), 7),
            ("vgg11", (3, 32, 32), 0),
            ("lenet5", (1, 28, 28), 0),
        ],
    )
    def test_folding_changes_nothing_but_rounding(self, name, shape, left):
        torch.manual_seed(0)
        network = getattr(models, name)()
        with torch.no_grad():
            network.train()(torch.randn(16, *shape))
        folded = fold_batchnorm(network.eval())
        images = torch.randn(4, *shape, requires_grad=True)
        for found, expected in zip(flat(folded(images)), flat(network(images)), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
            (gradient,) = torch.autograd.grad(found.square().sum(), images, retain_graph=True)
            (reference,) = torch.autograd.grad(expected.square().sum(), images, retain_graph=True)
            torch.testing.assert_close(gradient, reference, rtol=1e-3, atol=1e-3 * reference.abs().max().item())
        assert sum(isinstance(module, nn.BatchNorm2d) for module in folded.modules()) == left

    def test_a_convolution_that_others_read_too_is_not_folded(self):
        class Shared(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv, self.norm = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)

            def forward(self, images):
                features = self.conv(images)
                return (self.norm(features) + features).mean((2, 3))

        network = Shared().eval()
        network.norm.running_mean.fill_(3.0)
        images = torch.randn(2, *IMAGE_SHAPE)
        torch.testing.assert_close(fold_batchnorm(network)(images), network(images))

    def test_a_network_that_cannot_be_traced_runs_as_it_is(self, caplog):
        class Branching(nn.Module):
            def __init__(self):
                super().__init__()
                self.norm = nn.BatchNorm2d(1)
                self.linear = nn.Linear(64, 4)

            def forward(self, images):
                return self.linear(self.norm(images).flatten(1)) * (2 if images.sum() > 0 else 1)

        with caplog.at_level(logging.INFO, logger="dfad"):
            teacher = FrozenTeacher(Branching(), self.engine(fold_batchnorm="auto"))
        assert teacher(torch.ones(2, *IMAGE_SHAPE)).logits.shape == (2, 4)
        assert sum("Branching is not rewritten: it cannot be traced" in m for m in caplog.messages) == 1
        with pytest.raises(ModelError, match="cannot be traced"):
            FrozenTeacher(Branching(), self.engine(fold_batchnorm="on"))

    def test_statistics_are_what_reaches_each_batchnorm(self, teacher):
        frozen = FrozenTeacher(teacher, self.engine(fold_batchnorm="on"))
        images = torch.randn(4, *IMAGE_SHAPE)
        outputs, features = frozen.with_statistics(images)
        torch.testing.assert_close(outputs.logits, frozen(images).logits, rtol=1e-4, atol=1e-5)
        first = next(module for module in teacher.modules() if isinstance(module, nn.Conv2d))
        torch.testing.assert_close(features[0], first(images))
        assert len(features) == len(frozen.norms) == 2

    def test_it_keeps_no_graph_of_its_own(self, teacher):
        frozen = FrozenTeacher(teacher, self.engine(fold_batchnorm="on"))
        images = torch.randn(4, *IMAGE_SHAPE)
        assert not frozen(images).logits.requires_grad
        assert frozen(images.requires_grad_()).logits.requires_grad
        assert not any(p.requires_grad for n in (frozen.network, frozen.measured) for p in n.parameters())


def flat(outputs):
    return [outputs.logits, *outputs.taps]


def test_an_overflow_skips_the_step_and_lowers_the_scale_for_both_networks():
    engine = Engine(ALL_OFF, fused=True, device=CPU)
    engine.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    engine.fused_optimizers = True
    student, generator = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizers = [engine.optimizer(OptimizerConfig(lr=0.1, momentum=0), [p]) for p in (student, generator)]
    engine.descend((student * torch.inf).sum(), optimizers[0])
    assert torch.equal(student.data, torch.ones(3))
    assert engine.scaler.get_scale() == 512
    engine.descend(generator.sum(), optimizers[1])
    torch.testing.assert_close(generator.data, torch.full((3,), 0.9))


def test_dry_forwards_do_not_touch_the_global_random_stream(teacher):
    before = torch.get_rng_state()
    dry_forward(teacher, IMAGE_SHAPE)
    assert torch.equal(torch.get_rng_state(), before)


def test_every_part_switched_off_alone_still_runs(teacher, config):
    for part in (*PARTS, "fuse_convolutions"):
        distiller = make(teacher, replace(config, engine=EngineConfig(**{part: "off"})))
        assert torch.isfinite(distiller.round()["generator_loss"])
