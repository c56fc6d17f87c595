"""Weights that are cast at once."""

import copy
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dfad import models
from dfad.config import EngineConfig
from dfad.distillation.tensor_memory import TorchDispatchMode
from dfad.engine import Engine
from dfad.engine.calls import replaced_call
from dfad.engine.cast_weights import cast_in, cast_weights
from dfad.engine.fuse_batchnorm import fuse_batchnorm
from dfad.engine.placement import Placement
from dfad.errors import ConfigurationError
from dfad.models.generator import Generator
from dfad.models.outputs import as_outputs
from tests.engine.steps import results_of_a_step
from tests.kernels.implementations import interpreted

CPU = torch.device("cpu")


class Casts(TorchDispatchMode):
    """How often something is cast: alone, or together with others."""

    def __init__(self) -> None:
        super().__init__()
        self.of: Counter[object] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.of[function.overloadpacket] += 1
        return function(*args, **(kwargs or {}))

    @property
    def alone(self) -> int:
        return self.of[torch.ops.aten._to_copy]

    @property
    def together(self) -> int:
        return self.of[torch.ops.aten._foreach_copy_]


def a_step(network: nn.Module, x: Tensor, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """What the network returns, its gradients and its buffers."""
    with torch.autocast("cpu", dtype):
        return results_of_a_step(network, x.clone().requires_grad_())


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
        assert found[name].dtype == value.dtype
        assert found[name].stride() == value.stride(), name


def images(channels: int = 3, size: int = 32) -> Tensor:
    return torch.randn(4, channels, size, size, generator=torch.Generator().manual_seed(1))


NETWORKS = [
    (models.resnet20, images(), 20),
    (models.vgg11, images(), 9),
    (models.lenet5, images(1, 28), 5),
    (lambda: Generator((3, 16, 16), noise_dim=8, width=4), torch.randn(6, 8), 4),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize(("make", "x", "layers"), NETWORKS)
def test_every_bit_is_that_of_autocast(
    make: Callable[[], nn.Module], x: Tensor, layers: int, channels_last: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    network = make()
    if channels_last:
        network = network.to(memory_format=torch.channels_last)
    plain = copy.deepcopy(network)
    cast_weights(network)
    assert list(network.state_dict()) == list(plain.state_dict())
    for _ in range(2):
        assert_equal(a_step(network, x, dtype), a_step(plain, x, dtype))


def test_one_launch_forward_and_one_backward() -> None:
    network = models.resnet20()
    counted = []
    for _ in range(2):
        with Casts() as casts:
            a_step(network, images())
        counted.append((casts.alone, casts.together))
        cast_weights(network)
    layers, parameters = 20, 21  # the last one has a bias
    assert counted[0][1] == 0
    assert counted[1][1] == 2
    assert counted[0][0] - counted[1][0] == 2 * parameters
    assert sum(type(module) in (nn.Conv2d, nn.Linear) for module in network.modules()) == layers


def test_frozen_weights_are_cast_too() -> None:
    network = models.resnet20()
    plain = copy.deepcopy(network).requires_grad_(False)
    cast_weights(network)
    network.requires_grad_(False)
    with Casts() as casts:
        found = a_step(network, images())
    assert casts.together == 1
    assert_equal(found, a_step(plain, images()))


def test_without_autocast_nothing_is_cast() -> None:
    network = models.resnet20()
    plain = copy.deepcopy(network)
    cast_weights(network)
    with Casts() as casts:
        found = network(images()).logits
    assert (casts.alone, casts.together) == (0, 0)
    assert torch.equal(found, plain(images()).logits)
    with torch.autocast("cpu", torch.bfloat16), Casts() as casts:
        network.bfloat16()(images().bfloat16())  # weights that are of no other dtype already
    assert casts.together == 0


def test_weights_are_those_of_the_moment() -> None:
    network = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    cast_weights(network)
    network[0].weight = nn.Parameter(torch.zeros(4, 3))
    network[0].bias.data.zero_()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(network(torch.ones(1, 3)), network[1].bias.bfloat16()[None])


def test_a_gradient_of_a_gradient() -> None:
    found = []
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            y = network(torch.ones(1, 3)).sum()
        (gradient,) = torch.autograd.grad(y, network[0].weight, create_graph=True)
        found.append(torch.autograd.grad(gradient.square().sum(), network[2].weight)[0])
        cast_weights(network)
    assert torch.equal(*found)
    assert found[0].abs().sum() > 0


class Shared(nn.Module):
    """A layer that is called twice, beside two that are not, and one whose weight is used elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.first, self.last, self.used = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.twice(self.twice(self.first(x)))) + self.used(x) @ self.used.weight


def test_layers_that_are_shared_are_left_alone() -> None:
    network = Shared()
    plain = copy.deepcopy(network)
    cast_weights(network)
    x = torch.randn(5, 4)
    with Casts() as casts:
        assert_equal(a_step(network, x), a_step(plain, x))
    assert casts.together == 2


def test_a_single_layer_is_left_to_autocast() -> None:
    network = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    cast_weights(network)
    assert replaced_call(network) is None


def test_eval_mode_is_left_alone() -> None:
    network = models.resnet20()
    cast_weights(network)
    with torch.autocast("cpu", torch.bfloat16), Casts() as casts:
        network.eval()(images())
    assert casts.together == 0


def test_together_with_fused_batchnorms(monkeypatch) -> None:
    monkeypatch.setattr("dfad.engine.fuse_batchnorm.SMALLEST", 0)
    torch.manual_seed(0)
    network = models.resnet20().to(memory_format=torch.channels_last)
    fused = copy.deepcopy(network)
    fuse_batchnorm(fused)
    fuse_batchnorm(network, refine=cast_in)
    with Casts() as casts:
        found = a_step(network, images())
    assert casts.together == 2
    assert casts.of[torch.ops.dfad_kernels.batch_norm] == 19
    assert_equal(found, a_step(fused, images()))


@interpreted
def test_it_is_for_gpus_and_narrow_precisions() -> None:
    def engine(device: str = "cuda", **parts: str) -> Engine:
        parts = {"cuda_graph": "off", "two_streams": "off", **parts}
        return Engine(EngineConfig(**parts), fused=True, device=torch.device(device))

    assert engine(precision="bfloat16").cast_weights
    assert not engine(precision="bfloat16", cast_weights="off").cast_weights
    assert not engine(precision="bfloat16", compile="on").cast_weights
    with pytest.raises(ConfigurationError, match="the precision is float32, in which weights are used as they are"):
        engine(precision="float32", cast_weights="on")
    with pytest.raises(ConfigurationError, match="a CPU launches no kernels"):
        engine("cpu", precision="bfloat16", cast_weights="on")


@pytest.mark.parametrize("fuses", [True, False])
def test_the_engine_places_and_compares_it(fuses, monkeypatch) -> None:
    monkeypatch.setattr("dfad.engine.fuse_batchnorm.SMALLEST", 0)
    switch = "on" if fuses else "off"
    parts = EngineConfig(precision="bfloat16", fuse_batchnorm=switch, fuse_convolutions="off")
    engine = Engine(parts, fused=True, device=CPU)
    engine.cast_weights = True  # as on a GPU
    placement = Placement(engine, models.resnet20(), input_shape=(3, 32, 32), read=as_outputs)
    assert "cast_weights" in placement.parts
    assert ("fuse_batchnorm" in placement.parts) == fuses
    network = placement.take().train()
    with engine.autocast(), Casts() as casts:
        network(images().contiguous(memory_format=torch.channels_last))
    assert casts.together == 1
    placement.give_back()
    assert replaced_call(network) is None
    frozen = Placement(engine, models.resnet20().requires_grad_(False), own=["weights"])
    assert "cast_weights" not in frozen.parts
