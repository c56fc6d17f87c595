"""Networks composed at random of parts of the zoo: the engine computes what plain PyTorch computes."""

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dfad.config import EngineConfig
from dfad.copies import copy_network
from dfad.engine import Engine
from dfad.engine.calls import replaced_call
from dfad.engine.placement import Placement
from dfad.models.outputs import as_outputs
from dfad.modes import set_mode
from tests.compat.zoo import CHANNELS, SIZE, ZOO, Small, seed_everything

SHAPE = (CHANNELS, SIZE, SIZE)
UNFIT = {"a forward method on the instance"}
"""A copy of it calls the original, with which it cannot be compared."""


def has_parts(trait: str) -> bool:
    """Whether its networks have a stem, a middle and a head."""
    torch.manual_seed(0)
    return trait not in UNFIT and isinstance(ZOO[trait](), Small)


PARTS = sorted(filter(has_parts, ZOO))


class Body(nn.Module):
    """The middle of a network, as a module that is called."""

    def __init__(self, network: Small) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network.body(x)


class Composition(nn.Module):
    """The stem of one network, the middles of several, the head of the last."""

    def __init__(self, networks: list[Small]) -> None:
        super().__init__()
        self.first, self.last = networks[0], networks[-1]
        self.bodies = nn.Sequential(*map(Body, networks))

    def forward(self, x: Tensor) -> object:
        return self.last.head(self.bodies(self.first.stem(x)))


def a_step(network: nn.Module, *, training: bool, channels_last: bool) -> dict[str, Tensor]:
    """What a pass returns, its gradients, and the buffers afterwards."""
    images = torch.randn(8, *SHAPE, generator=torch.Generator().manual_seed(7))
    x = images.contiguous(memory_format=torch.channels_last) if channels_last else images
    x.requires_grad_()
    set_mode(network, training=training)
    seed_everything(8)
    logits = as_outputs(network(x)).logits
    values = {"logits": logits.detach()}
    if logits.requires_grad:
        logits.square().sum().backward()
    tensors = {"gradient of the images": x.grad}
    tensors |= {f"gradient of {name}": parameter.grad for name, parameter in network.named_parameters()}
    tensors |= {name: buffer.clone() for name, buffer in network.named_buffers()}
    for parameter in network.parameters():
        parameter.grad = None
    return values | {name: tensor for name, tensor in tensors.items() if tensor is not None}


@settings(max_examples=200, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.sampled_from(PARTS), min_size=1, max_size=2), st.integers(0, 9))
def test_any_composition(traits, seed):
    torch.manual_seed(seed)
    network = Composition([ZOO[trait]() for trait in (*traits, "plain")])
    plain = copy_network(network)
    engine = Engine(EngineConfig(precision="float32"), fused=True, device=torch.device("cpu"))
    placement = Placement(engine, network, input_shape=SHAPE, batch_size=8, read=as_outputs)
    placed = placement.take()
    for training in (True, False, True):
        expected = a_step(plain, training=training, channels_last=False)
        found = a_step(placed, training=training, channels_last=True)
        assert found.keys() == expected.keys()
        largest = max(value.norm().item() for name, value in expected.items() if name.startswith("gradient"))
        for name, value in expected.items():
            if value.is_floating_point():
                scale = max(value[value.isfinite()].norm().item(), 1e-3 * largest, 1e-3)
                difference = torch.where(value.isfinite(), found[name] - value, 0).norm().item()
                allowed = 0.03 if name.startswith("gradient") else 1e-3  # a ReLU may flip
                assert difference <= allowed * scale, (name, training, placement.parts)
            assert torch.equal(value.isfinite(), found[name].isfinite()), name
    placement.give_back()
    assert all(replaced_call(module) is None for module in network.modules())
