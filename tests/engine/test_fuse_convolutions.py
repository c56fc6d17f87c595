"""Networks whose convolutions are computed as chains."""

import copy
import logging
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from dfad import models
from dfad.config import EngineConfig
from dfad.distillation.distiller import Distiller
from dfad.distillation.frozen_teacher import FrozenTeacher
from dfad.engine import Engine
from dfad.engine.fold_batchnorm import fold_batchnorm
from dfad.engine.fuse_convolutions import chained_flops, fuse_convolutions
from dfad.errors import ConfigurationError
from dfad.models.taps import with_taps
from dfad.modes import statistics_kept
from dfad_kernels.cpu.convolution_chain import ConvolutionChain, Link
from tests.engine.steps import results_of_a_step
from tests.engine.test_fuse_batchnorm import Residual as ThreeChannels

CPU = torch.device("cpu")


@pytest.fixture
def computed(monkeypatch) -> list[list[Link]]:
    """The links of each chain that was computed as one."""
    found = []
    original = ConvolutionChain.__call__

    def spy(chain, *args, **options):
        results = original(chain, *args, **options)
        found.append(list(chain.links))
        return results

    monkeypatch.setattr(ConvolutionChain, "__call__", spy)
    return found


def channels_last(network: nn.Module) -> nn.Module:
    return network.to(memory_format=torch.channels_last)


def images(channels: int = 3, size: int = 16, batch: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, channels, size, size, generator=generator).contiguous(memory_format=torch.channels_last)


def after_a_step(network: nn.Module, x: Tensor, *, autocast: bool) -> dict[str, Tensor]:
    """What the network returns, its gradients and its buffers."""
    # what is added to a convolution's result is of its dtype, or the sum were none of bfloat16
    x = (x.bfloat16() if autocast else x.bfloat16().float()).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        return results_of_a_step(network, x)


def assert_as_near_as_autocast(network: nn.Module, plain: nn.Module, x: Tensor) -> None:
    """To what float32 gives, or twice as far at most."""
    exact = after_a_step(copy.deepcopy(plain), x, autocast=False)
    rounded = after_a_step(copy.deepcopy(plain), x, autocast=True)
    found = after_a_step(network, x, autocast=True)
    assert found.keys() == exact.keys()
    for name, value in exact.items():
        if not value.is_floating_point():
            assert torch.equal(found[name], value), name
            continue
        size = value.norm().clamp_min(1e-3)
        errors = [((other[name].float() - value.float()).norm() / size).item() for other in (found, rounded)]
        assert errors[0] <= 2 * errors[1] + 0.02, (name, errors)


NETWORKS = [
    # network, size of an image, chains, links
    (models.resnet20, 32, 3, 19),
    (models.resnet18, 16, 4, 17),
    (models.vgg11, 32, 5, 8),
    (lambda: models.convnet(channels=(16, 32, 64)), 16, 3, 3),
    (lambda: models.convnet(channels=(4, 8, 24)), 16, 0, 0),
    (models.lenet5, 28, 0, 0),
]
each_network = pytest.mark.parametrize(("make", "size", "chains", "links"), NETWORKS)


def make_network(make, size: int) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    network = channels_last(make())
    x = images(1 if size == 28 else 3, size)
    with torch.no_grad():
        for _ in range(3):
            network(x)  # statistics that eval mode can use
    return network, x


@each_network
def test_networks_that_learn(make, size, chains, links, computed):
    network, x = make_network(make, size)
    plain = copy.deepcopy(network)
    fuse_convolutions(network)
    assert list(network.state_dict()) == list(plain.state_dict())
    assert_as_near_as_autocast(network, plain, x)
    assert (len(computed), sum(map(len, computed))) == (chains, links)
    assert all(link.normalises for chain in computed for link in chain)


@each_network
def test_frozen_networks(make, size, chains, links, computed):
    network, x = make_network(make, size)
    plain = network.eval().requires_grad_(False)
    folded = fold_batchnorm(plain).requires_grad_(False)
    for module in folded.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.bfloat16()
    fuse_convolutions(folded)
    exact, found = (after_a_step(n, x, autocast=n is folded) for n in (plain, folded))
    for name, value in exact.items():
        if name.startswith(("output", "gradient")):
            error = (found[name].float() - value).norm() / value.norm()
            assert error <= (0.05 if name.startswith("output") else 0.3), (name, error)
    assert (len(computed), sum(map(len, computed))) == (chains, links)
    assert not any(link.normalises for chain in computed for link in chain)


class Calls(TorchFunctionMode):
    """Names of the functions that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.names.add(function.__name__)
        return function(*args, **(kwargs or {}))


def test_between_stages_there_is_one_operation():
    network = channels_last(models.resnet20())
    called = []
    for _ in range(2):
        with Calls() as calls:
            network(images())
        called.append(calls.names & {"pad", "avg_pool2d"})
        fuse_convolutions(network)
    assert called == [{"pad", "avg_pool2d"}, set()]


class Residual(ThreeChannels):
    """The same forms, with convolutions that a chain takes."""

    def __init__(self, form: str) -> None:
        super().__init__(form)
        self.conv1, self.conv2 = (nn.Conv2d(16, 16, 3, padding=1, bias=False) for _ in range(2))
        self.bn1, self.bn2 = nn.BatchNorm2d(16), nn.BatchNorm2d(16)


FORMS = {
    # links of each chain: the residual, whether pre and post are kept
    "modules": [[(None, False, True), (0, False, True)]],
    "in place": [[(None, False, True), (0, False, True)]],
    "functions": [[(None, False, True), (0, False, True)]],
    "read twice": [[(None, True, True), (1, True, False)]],
    "scaled addition": [[(None, True, False), (None, True, False)]],
    "broadcast addition": [[(None, True, False)]],  # the other one falls back
    "constant": [[(None, True, False), (None, True, False)]],
    "itself": [[(None, True, False), (None, True, False)]],
    "in the shortcut": [[(None, True, False)], [(1, False, True)]],
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_addition_and_activation(form, computed):
    torch.manual_seed(0)
    network = channels_last(Residual(form))
    plain = copy.deepcopy(network)
    fuse_convolutions(network)
    assert_as_near_as_autocast(network, plain, images(16))
    found = [[(link.residual, link.keeps_pre, link.keeps_post) for link in chain] for chain in computed]
    assert found == FORMS[form]


class Overwriting(nn.Module):
    """What a value is depends on when it is read."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        features = F.relu(x)
        y = self.conv(features)
        features.add_(1)
        return F.relu(y + features)


def test_a_sum_in_float32_stays_one(computed):
    network = channels_last(Residual("modules"))
    fuse_convolutions(network)
    with torch.autocast("cpu", torch.bfloat16):
        assert network(images(16)).dtype == torch.float32
        assert not computed
        assert network(images(16).bfloat16()).dtype == torch.bfloat16
    assert computed


@pytest.mark.parametrize("frozen", [False, True])
def test_operations_can_be_counted(frozen, computed):
    network = channels_last(models.resnet20())
    if frozen:
        network = fold_batchnorm(network.eval()).requires_grad_(False)
    flops, chained = [], []
    for _ in range(2):
        before = chained_flops()
        x = images().requires_grad_(frozen)
        with torch.autocast("cpu", torch.bfloat16), FlopCounterMode(display=False) as counter:
            network(x).logits.sum().backward()
        chained.append(chained_flops() - before)
        flops.append(counter.get_total_flops() + chained[-1])
        fuse_convolutions(network)
    assert flops[0] == flops[1]
    assert computed
    assert chained[0] == 0
    assert chained[1] > 0.9 * flops[1]


def test_what_is_overwritten_is_read_before(computed):
    network = channels_last(Overwriting()).eval().requires_grad_(False)
    plain = copy.deepcopy(network)
    fuse_convolutions(network)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(network(images(16)), plain(images(16)), rtol=0, atol=0)
    assert not computed


@pytest.mark.parametrize(
    "change",
    [
        {"bias": True},
        {"kernel_size": 1},
        {"padding": 0},
        {"dilation": 2},
        {"groups": 2},
        {"stride": (1, 2)},
        {"padding_mode": "circular"},
        {"out_channels": 24},
    ],
    ids=str,
)
def test_other_convolutions_are_left_alone(change, computed):
    settings = {"in_channels": 16, "out_channels": 16, "kernel_size": 3, "padding": 1, "bias": False, **change}
    network = channels_last(nn.Sequential(nn.Conv2d(**settings), nn.BatchNorm2d(settings["out_channels"])))
    plain = copy.deepcopy(network)
    fuse_convolutions(network)
    assert_as_near_as_autocast(network, plain, images(16))
    assert not computed


def test_another_precision_or_mode_is_left_alone(computed):
    network = channels_last(models.resnet20())
    plain = copy.deepcopy(network)
    fuse_convolutions(network)
    torch.testing.assert_close(network(images()).logits, plain(images()).logits, rtol=1e-4, atol=1e-4)
    network.eval(), plain.eval()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(network(images()), plain(images()), rtol=0, atol=0)
    network.train(), plain.train()
    network.layer2.eval(), plain.layer2.eval()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(network(images()).logits, plain(images()).logits, rtol=0.05, atol=0.05)
    assert len(computed) == 1  # the first stage


def test_kept_statistics_are_kept(computed):
    network = channels_last(models.resnet20())
    fuse_convolutions(network)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with statistics_kept(network), torch.autocast("cpu", torch.bfloat16):
        network(images())
    assert computed
    torch.testing.assert_close(dict(network.state_dict()), before, rtol=0, atol=0)


def test_a_batch_without_variance_is_pytorchs_own_error():
    network = channels_last(nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)))
    fuse_convolutions(network)
    with pytest.raises(ValueError, match="more than 1 value per channel"), torch.autocast("cpu", torch.bfloat16):
        network(torch.ones(1, 3, 1, 1))


def test_taps_that_are_named(computed):
    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = models.resnet20()

        def forward(self, x: Tensor) -> Tensor:
            return self.network(x).logits

    torch.manual_seed(0)
    network = channels_last(with_taps(Logits(), ["network.layer1", "network.layer3.2.bn2"]))
    plain = copy.deepcopy(network)
    fuse_convolutions(network)
    assert_as_near_as_autocast(network, plain, images())
    assert sum(map(len, computed)) == 19


def test_copies_go_without(computed):
    network = channels_last(models.resnet20())
    fuse_convolutions(network)
    with torch.autocast("cpu", torch.bfloat16):
        copy.deepcopy(network)(images())
    assert not computed


class TestEngine:
    @pytest.fixture
    def tiles(self, monkeypatch):
        """Every processor has them, computed by loops if it must be."""
        monkeypatch.setattr("dfad.engine.fuse_convolutions.unavailable", lambda: None)

    def test_without_tiles_it_is_left_out_or_refused(self, monkeypatch, caplog):
        monkeypatch.setattr("dfad.engine.fuse_convolutions.unavailable", lambda: "the processor has no tiles")
        with caplog.at_level(logging.INFO, logger="dfad"):
            assert not Engine(EngineConfig(precision="bfloat16"), fused=True, device=CPU).fuse_convolutions
        assert "Without engine.fuse_convolutions: the processor has no tiles." in caplog.messages
        with pytest.raises(ConfigurationError, match="fuse_convolutions is on, but cannot run here: the processor has"):
            Engine(EngineConfig(precision="bfloat16", fuse_convolutions="on"), fused=True, device=CPU)

    @pytest.mark.parametrize(
        ("settings", "words"),
        [
            ({"precision": "float32"}, "its tiles are of bfloat16, and the precision is float32"),
            ({"precision": "bfloat16", "fuse_batchnorm": "off"}, "engine.fuse_batchnorm is off"),
            ({"precision": "bfloat16", "compile": "on"}, "engine.fuse_batchnorm is off, or cannot run here"),
        ],
    )
    def test_what_it_needs(self, settings, words, tiles):
        with pytest.raises(ConfigurationError, match=words):
            Engine(EngineConfig(fuse_convolutions="on", **settings), fused=True, device=CPU)

    def rounds(self, config, switch: str, count: int) -> tuple[list[dict[str, Tensor]], Distiller]:
        torch.manual_seed(2)
        teacher, student = (models.convnet(channels=(16, 32), num_classes=4) for _ in range(2))
        engine = EngineConfig(precision="bfloat16", fuse_convolutions=switch)
        distiller = Distiller(teacher, student, replace(config, engine=engine), image_shape=(3, 8, 8))
        return [dict(distiller.engine.run(distiller.round)) for _ in range(count)], distiller

    def test_a_round_computes_the_same(self, config, tiles, computed):
        (on,), distiller = self.rounds(config, "on", 1)
        assert {link.normalises for chain in computed for link in chain} == {True, False}
        computed.clear()
        (off,), _ = self.rounds(config, "off", 1)
        assert not computed
        for name, value in off.items():
            torch.testing.assert_close(on[name], value, rtol=0.05, atol=0.02, msg=name)
        assert not any(p.requires_grad for p in distiller.teacher.network.parameters())

    def test_rounds_repeat_to_the_bit(self, config, tiles):
        first, second = (self.rounds(config, "on", 3)[1].student.state_dict() for _ in range(2))
        torch.testing.assert_close(first, second, rtol=0, atol=0)

    def test_statistics_are_of_what_reaches_each_batchnorm(self, tiles, computed):
        network, x = make_network(lambda: models.convnet(channels=(16, 32)), 16)
        found = []
        for switch in ("on", "off"):
            engine = Engine(EngineConfig(precision="bfloat16", fuse_convolutions=switch), fused=True, device=CPU)
            with engine.autocast(), torch.no_grad():
                outputs, features = FrozenTeacher(network, engine).with_statistics(x)
            found.append([outputs.logits, *features])
            assert bool(computed) == (switch == "on")
            computed.clear()
        for on, off in zip(*found, strict=True):
            torch.testing.assert_close(on.float(), off.float(), rtol=0.1, atol=0.1)

    def test_a_teacher_keeps_no_graph_of_its_own(self, tiles, computed):
        torch.manual_seed(0)
        engine = Engine(EngineConfig(precision="bfloat16"), fused=True, device=CPU)
        frozen = FrozenTeacher(channels_last(models.resnet20()), engine)
        x = images()
        with engine.autocast():
            assert not frozen(x).logits.requires_grad
            assert frozen(x.requires_grad_()).logits.requires_grad
        assert len(computed) == 6
