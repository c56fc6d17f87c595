"""Frozen networks in which what follows a convolution is one pass."""

import copy
import importlib
import logging
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from dfad import models
from dfad.config import EngineConfig
from dfad.distillation.frozen_teacher import FrozenTeacher
from dfad.engine import Engine
from dfad.engine.fold_batchnorm import fold_batchnorm
from dfad.engine.fuse_epilogues import fuse_epilogues
from dfad.engine.rewriting import say_once
from dfad.models.outputs import as_outputs
from dfad.models.taps import BatchNormTaps
from tests.engine.test_fuse_batchnorm import Residual, channels_last, images
from tests.kernels.implementations import interpreted


@pytest.fixture
def calls(monkeypatch) -> list[tuple[bool, bool, float]]:
    """Of each call to the kernels whether it normalises, whether it adds, and its activation's slope."""
    found = []
    module = importlib.import_module("dfad.engine.fuse_epilogues")
    original = module.frozen_batch_norm

    def spy(*args, **options):
        found.append((len(args) > 1, options["residual"] is not None, options["negative_slope"]))
        return original(*args, **options)

    monkeypatch.setattr(module, "frozen_batch_norm", spy)
    return found


def frozen(network: nn.Module) -> nn.Module:
    """In eval mode, with statistics and parameters that are not those of a new network."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                for tensor in (module.running_mean, module.running_var, module.weight, module.bias):
                    tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
            elif isinstance(module, nn.Conv2d) and module.bias is not None:
                module.bias.copy_(torch.randn(module.bias.shape, generator=generator))
    return channels_last(network.eval().requires_grad_(False))


def values_and_gradient(network: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    outputs = as_outputs(network(x))
    values = [outputs.logits, *outputs.taps]
    generator = torch.Generator().manual_seed(2)
    torch.autograd.backward(values, [torch.randn(value.shape, generator=generator).to(value.dtype) for value in values])
    return [*(value.detach() for value in values), x.grad]


def assert_computes_the_same(network: nn.Module, x: Tensor, **options) -> None:
    channels_last(network.double())  # in float32 rounding may choose another side of zero
    plain = copy.deepcopy(network)
    fuse_epilogues(network, **options)
    torch.testing.assert_close(values_and_gradient(network, x.double()), values_and_gradient(plain, x.double()))


RELU, LEAKY = 0.0, 0.3
NORMS = {
    "modules": [(True, False, RELU), (True, True, LEAKY)],
    "in place": [(True, False, RELU), (True, True, RELU)],
    "functions": [(True, False, RELU), (True, True, 0.2)],
    "read twice": [(True, False, 1.0), (True, True, 1.0)],
    "scaled addition": [(True, False, 1.0), (True, False, 1.0)],
    "broadcast addition": [(True, False, 1.0)],  # the other one falls back to PyTorch's own operations
    "constant": [(True, False, 1.0), (True, False, 1.0)],
    "itself": [(True, False, 1.0), (True, False, 1.0)],
    "in the shortcut": [(True, False, 1.0), (True, True, RELU)],
}


@pytest.mark.parametrize("form", NORMS)
def test_every_form_of_addition_and_activation(form, calls):
    torch.manual_seed(0)
    assert_computes_the_same(frozen(Residual(form)), images())
    assert calls == NORMS[form]


FOLDED = {
    "modules": [(False, False, RELU), (False, True, LEAKY)],
    "in place": [(False, False, RELU), (False, True, RELU)],
    "read twice": [(False, True, 1.0)],
    "constant": [],
    "in the shortcut": [(False, True, RELU)],
}


@pytest.mark.parametrize("form", FOLDED)
def test_biases_are_added_with_what_follows_where_that_saves_a_pass(form, calls):
    torch.manual_seed(0)
    folded = channels_last(fold_batchnorm(frozen(Residual(form))).requires_grad_(False))
    assert_computes_the_same(folded, images(), takes_biases=True)
    assert calls == FOLDED[form]


def test_on_a_cpu_a_bias_stays_in_its_convolution(calls):
    assert_computes_the_same(channels_last(fold_batchnorm(frozen(models.resnet20()))).requires_grad_(False), images())
    assert not calls


@interpreted
@pytest.mark.parametrize("folds", [False, True])
def test_on_a_gpus_kernels(folds, monkeypatch):
    """Interpreted, of a network with all that its kernels do."""
    module = importlib.import_module("dfad.engine.fuse_epilogues")
    monkeypatch.setattr(module, "frozen_batch_norm", partial(module.frozen_batch_norm, kernels="triton"))
    torch.manual_seed(0)
    network = frozen(Residual("functions"))
    network = channels_last(fold_batchnorm(network).requires_grad_(False)) if folds else network
    assert_computes_the_same(network, images(), takes_biases=True)


@pytest.mark.parametrize(
    ("make", "count", "additions"), [(models.resnet20, 19, 9), (models.resnet18, 20, 8), (models.vgg11, 8, 0)]
)
def test_the_projects_networks(make, count, additions, calls):
    torch.manual_seed(0)
    assert_computes_the_same(frozen(make()), images(size=32))
    assert len(calls) == count
    assert sum(adds for _, adds, _ in calls) == additions


def test_what_reaches_each_batchnorm_is_what_it_was(calls):
    torch.manual_seed(0)
    network = channels_last(frozen(models.resnet20()).double())
    taps, plain = BatchNormTaps(copy.deepcopy(network)), BatchNormTaps(network)
    fuse_epilogues(taps)
    results = []
    for each in (taps, plain):
        x = images().double().requires_grad_()
        _, features = each(x)
        results.append((features, torch.autograd.grad(sum(value.square().mean() for value in features), x)[0]))
    torch.testing.assert_close(*results)
    assert len(calls) == 19


class Overwriting(nn.Module):
    """What a BatchNorm is given is overwritten before the activation that follows it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        z = self.norm(y)
        y = y.mul_(2)
        return torch.relu(z) + y


def test_what_is_overwritten_is_read_before(calls):
    with torch.no_grad():
        network = frozen(Overwriting())
        plain = copy.deepcopy(network)
        fuse_epilogues(network)
        torch.testing.assert_close(network(images()), plain(images()))
    assert calls == [(True, False, 1.0)]


def test_what_learns_or_is_in_training_mode_is_left_alone(calls, caplog):
    caplog.set_level(logging.INFO)
    say_once.cache_clear()
    network = frozen(Residual("modules"))
    network.bn1.weight.requires_grad_()
    plain = copy.deepcopy(network)
    fuse_epilogues(network)
    for _ in range(2):
        network(images()).sum().backward()
        plain(images()).sum().backward()
        torch.testing.assert_close(network.bn1.weight.grad, plain.bn1.weight.grad)
    assert calls == [(True, True, LEAKY)] * 2
    assert [record.message for record in caplog.records] == [
        "What follows a frozen convolution is computed by PyTorch's own operations: its BatchNorm learns."
    ]
    network.bn2.train()
    plain.bn2.train()
    torch.testing.assert_close(network(images()), plain(images()))
    torch.testing.assert_close(network.bn2.running_var, plain.bn2.running_var)


def test_a_bias_that_learns_stays_in_its_convolution(calls):
    network = channels_last(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())).eval()
    fuse_epilogues(network, takes_biases=True)
    network(images()).sum().backward()
    assert network[0].bias.grad is not None
    assert not calls


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_engine_computes_a_teachers_statistics_so(precision, calls):
    engine = Engine(EngineConfig(precision=precision, fuse_convolutions="off"), fused=True, device=torch.device("cpu"))
    torch.manual_seed(0)
    teacher = FrozenTeacher(frozen(models.resnet20()), engine)
    with engine.autocast():
        teacher.with_statistics(images(size=32))
    assert calls.count((True, False, RELU)) >= 9
    assert sum(adds for _, adds, _ in calls) >= 9
