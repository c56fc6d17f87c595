"""Networks whose BatchNorms are computed with what follows them."""

import copy
import importlib
import logging
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfad import models
from dfad.config import EngineConfig
from dfad.engine import Engine
from dfad.engine.fuse_batchnorm import FusedBatchNorm, fuse_batchnorm
from dfad.engine.rewriting import say_once
from dfad.models.generator import Generator
from dfad.models.outputs import as_outputs
from dfad.modes import statistics_kept
from tests.kernels.implementations import interpreted


def channels_last(network: nn.Module) -> nn.Module:
    return network.to(memory_format=torch.channels_last)


def images(channels: int = 3, size: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(6, channels, size, size, generator=generator).contiguous(memory_format=torch.channels_last)


@pytest.fixture(autouse=True)
def worth_it_for_any_size(monkeypatch):
    monkeypatch.setattr("dfad.engine.fuse_batchnorm.SMALLEST", 0)


@pytest.fixture
def calls(monkeypatch) -> list[tuple[bool, float]]:
    """What each call to the kernels adds, and its activation's slope."""

    found = []

    def spy(*args, **options):
        found.append((options["residual"] is not None, options["negative_slope"]))
        return original(*args, **options)

    from dfad.engine import fuse_batchnorm as module

    original = module.batch_norm
    monkeypatch.setattr(module, "batch_norm", spy)
    return found


class Residual(nn.Module):
    """Additions and activations in the forms that people write."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.conv1, self.conv2 = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(2))
        self.bn1, self.bn2 = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.relu = nn.ReLU(inplace=True)
        self.leaky = nn.LeakyReLU(0.3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x))
        match self.form:
            case "modules":
                return self.leaky(x + self.bn2(self.conv2(self.relu(y))))
            case "in place":
                z = self.bn2(self.conv2(y.relu_()))
                z += x
                return F.relu_(z)
            case "functions":
                return F.leaky_relu(torch.add(self.bn2(self.conv2(torch.relu(y))), x), 0.2)
            case "read twice":
                return self.bn2(self.conv2(F.relu(y))) + y
            case "scaled addition":
                return F.relu(torch.add(self.bn2(self.conv2(y)), x, alpha=2))
            case "broadcast addition":
                return F.relu(self.bn2(self.conv2(y)) + x.mean((2, 3), keepdim=True))
            case "constant":
                return F.relu(self.bn2(self.conv2(y)) + 1)
            case "itself":
                z = self.bn2(self.conv2(y))
                return F.relu(z + z)
            case "in the shortcut":
                shortcut = x * 1
                shortcut += self.bn2(self.conv2(y))
                return F.relu(shortcut)
        raise AssertionError(self.form)


EXPECTED = {
    "modules": [(False, 0.0), (True, 0.3)],
    "in place": [(False, 0.0), (True, 0.0)],
    "functions": [(False, 0.0), (True, 0.2)],
    "read twice": [(False, 1.0), (True, 1.0)],
    "scaled addition": [(False, 1.0), (False, 1.0)],
    "broadcast addition": [(False, 1.0)],  # the other one falls back to PyTorch's own operations
    "constant": [(False, 1.0), (False, 1.0)],
    "itself": [(False, 1.0), (False, 1.0)],
    "in the shortcut": [(False, 1.0), (True, 0.0)],
}


def state_after_a_step(network: nn.Module, x: Tensor) -> tuple[list[Tensor], dict[str, Tensor]]:
    x = x.clone().requires_grad_()
    outputs = as_outputs(network(x))
    upstream = torch.Generator().manual_seed(2)
    values = [outputs.logits, *outputs.taps]
    torch.autograd.backward(values, [torch.randn(value.shape, generator=upstream).double() for value in values])
    gradients = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
    return [*(value.detach() for value in values), x.grad, *gradients], network.state_dict()


def assert_computes_the_same(network: nn.Module, x: Tensor) -> None:
    channels_last(network.double())  # deep networks magnify rounding
    x = x.double()
    plain = copy.deepcopy(network)
    fuse_batchnorm(network)
    assert list(network.state_dict()) == list(plain.state_dict())
    for _ in range(2):
        torch.testing.assert_close(state_after_a_step(network, x), state_after_a_step(plain, x))


@pytest.mark.parametrize("form", EXPECTED)
def test_every_form_of_addition_and_activation(form, calls):
    torch.manual_seed(0)
    network = Residual(form)
    assert_computes_the_same(network, images())
    assert calls[: len(EXPECTED[form])] == EXPECTED[form]
    assert len(calls) == 2 * len(EXPECTED[form])


@pytest.mark.parametrize(
    ("activation", "slope"),
    [(nn.LeakyReLU(-0.1), 1.0), (partial(F.leaky_relu, negative_slope=-0.1), 1.0), (nn.LeakyReLU(0), 0.0)],
    ids=["negative module", "negative function", "integer"],
)
def test_an_activation_is_left_alone_where_its_sign_does_not_show(activation, slope, calls):
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(3)
            self.activation = activation

        def forward(self, x: Tensor) -> Tensor:
            return self.activation(self.norm(x))

    assert_computes_the_same(Network(), images())
    assert {found for _, found in calls} == {slope}


@pytest.mark.parametrize(
    ("make", "count", "additions"),
    [(models.resnet20, 19, 9), (models.resnet18, 20, 8), (models.vgg11, 8, 0), (models.wrn_16_1, None, None)],
)
def test_the_projects_networks(make, count, additions, calls):
    torch.manual_seed(0)
    network = make()
    assert_computes_the_same(network, images(size=32))
    if count is not None:
        assert len(calls) == 2 * count
        assert sum(adds for adds, _ in calls) == 2 * additions
    assert {slope for _, slope in calls} >= {0.0}


@interpreted
def test_on_a_gpus_kernels(monkeypatch):
    """Interpreted, of a network with all that its kernels do."""
    module = importlib.import_module("dfad.engine.fuse_batchnorm")
    monkeypatch.setattr(module, "batch_norm", partial(module.batch_norm, kernels="triton"))
    torch.manual_seed(0)
    assert_computes_the_same(Residual("functions"), images())


@interpreted
def test_a_gpu_has_it_too_but_no_convolutions():
    engine = Engine(EngineConfig(precision="float32"), fused=True, device=torch.device("cuda"))
    assert engine.fuse_batchnorm
    assert not engine.fuse_convolutions


@interpreted
def test_a_gpu_has_it_only_with_a_graph_unless_it_is_asked_for(caplog):
    caplog.set_level(logging.INFO)
    for switch in ("auto", "on"):
        engine = Engine(
            EngineConfig(cuda_graph="off", fuse_batchnorm=switch, precision="float32"),
            fused=True,
            device=torch.device("cuda"),
        )
        assert engine.fuse_batchnorm == (switch == "on")
    assert [message for message in caplog.messages if "fuse_batchnorm" in message] == [
        "Without engine.fuse_batchnorm: without engine.cuda_graph its kernels take longer to launch than they save."
    ]


def test_the_generator(calls):
    torch.manual_seed(0)
    generator = channels_last(Generator((3, 16, 16), noise_dim=8, width=4))
    plain = copy.deepcopy(generator)
    fuse_batchnorm(generator)
    noise = torch.randn(6, 8)
    torch.testing.assert_close(generator(noise), plain(noise), rtol=1e-4, atol=1e-4)
    assert [slope for _, slope in calls] == [1.0, 0.2, 0.2, 1.0]


def test_small_features_go_to_pytorch(calls, monkeypatch):
    monkeypatch.setattr("dfad.engine.fuse_batchnorm.SMALLEST", 6 * 16 * 16 * 16)
    assert_computes_the_same(models.resnet20(), images())
    assert len(calls) == 2 * 7  # the first stage alone is large enough


def test_what_goes_to_pytorch_is_said_once(monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    say_once.cache_clear()
    monkeypatch.setattr("dfad.engine.fuse_batchnorm.SMALLEST", 1 << 20)
    network = channels_last(models.resnet20())
    fuse_batchnorm(network)
    for _ in range(2):
        network(images())
    assert caplog.messages == [
        "A BatchNorm is computed by PyTorch's own operations: of fewer than 1048576 elements on a CPU it is as fast."
    ]


def test_eval_mode_is_left_alone(calls):
    network = channels_last(models.resnet20())
    fuse_batchnorm(network)
    plain = copy.deepcopy(network)
    network.eval()
    torch.testing.assert_close(network(images()), plain.eval()(images()), rtol=0, atol=0)
    assert not calls


def test_kept_statistics_are_kept(calls):
    network = channels_last(models.resnet20())
    fuse_batchnorm(network)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with statistics_kept(network):
        network(images())
    assert calls
    torch.testing.assert_close(dict(network.state_dict()), before, rtol=0, atol=0)


def test_all_batches_are_counted_at_once(monkeypatch):
    counted = []
    monkeypatch.setattr(torch, "_foreach_add_", lambda counters, number: counted.append(len(counters)))
    network = channels_last(models.resnet20())
    fuse_batchnorm(network)
    for _ in range(2):
        network(images())
    assert counted == [19, 19]


def test_what_was_normalised_before_an_error_is_counted():
    network = channels_last(nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    fuse_batchnorm(network)
    with pytest.raises(RuntimeError, match="Kernel size can't be greater"):
        network(images(size=2))
    network(images())
    assert [network[0].num_batches_tracked, network[2].num_batches_tracked] == [2, 1]


def test_modes_are_as_before():
    network = models.resnet20()
    network.bn1.eval()
    before = [module.training for module in network.modules()]
    fuse_batchnorm(network)
    assert [module.training for module in network.modules()] == before


def test_a_batch_without_variance_is_pytorchs_own_error():
    network = channels_last(nn.Sequential(nn.BatchNorm2d(3)))
    fuse_batchnorm(network)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        network(torch.ones(1, 3, 1, 1))


def test_what_cannot_be_traced_is_fused_below(calls):
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x) if x.mean() < 1e9 else x

    network = Branching()
    assert_computes_the_same(network, images())
    assert calls == [(False, 0.0)] * 2


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_are_called_as_ever(register, calls):
    network = channels_last(models.resnet20())
    seen = []
    getattr(network.layer1[0], register)(lambda module, inputs, *output: seen.append(type(inputs[0])))
    fuse_batchnorm(network)
    for _ in range(2):
        network(images())
    assert seen == [Tensor, Tensor]
    assert len(calls) == 2 * 16  # of the other blocks, and of the first stage's last two


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_under_autocast_as_well(precision, calls):
    engine = Engine(EngineConfig(precision=precision, fuse_convolutions="off"), fused=True, device=torch.device("cpu"))
    torch.manual_seed(0)
    network = engine.place(models.resnet20())
    with engine.autocast():
        network(images())
    assert len(calls) == 19


def test_frozen_networks_are_not_touched(calls):
    engine = Engine(EngineConfig(), fused=True, device=torch.device("cpu"))
    network = engine.place(models.resnet20().requires_grad_(False))
    network(images())
    assert not calls


def test_compilation_comes_first(caplog):
    caplog.set_level(logging.INFO)
    engine = Engine(EngineConfig(compile="on"), fused=True, device=torch.device("cpu"))
    assert not engine.fuse_batchnorm
    assert "Without engine.fuse_batchnorm: engine.compile is on" in caplog.text


def test_other_than_2d_norms_are_left_alone():
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU())
    fuse_batchnorm(network)
    assert not any(isinstance(module, FusedBatchNorm) for module in network.modules())
    assert network(torch.randn(5, 3)).shape == (5, 4)
