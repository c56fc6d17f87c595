"""Copies of networks: what they hold is theirs."""

import pytest
import torch
from torch import nn

from dfad.copies import copy_network


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)


def called(network: nn.Module, module: nn.Module) -> bool:
    calls = []
    handle = module.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        network(torch.randn(2, 3))
    finally:
        handle.remove()
    return bool(calls)


def closure(net):
    net.forward = lambda x: net.linear(x)


def default(net):
    net.forward = lambda x, layer=net.linear: layer(x)


def method(net):
    apply = net.linear.forward
    linear = net.linear
    net.forward = lambda x: linear(x) + apply(x)


def nested(net):
    def inner(x):
        return layers[0](x)

    layers = [net.linear]
    net.forward = lambda x: inner(x)


@pytest.mark.parametrize("patch", [closure, default, method, nested])
def test_a_function_s_network_is_the_copy(patch):
    network = Net()
    patch(network)
    copied = copy_network(network)
    assert called(copied, copied.linear)
    assert not called(copied, network.linear)
    assert called(network, network.linear)


def test_a_function_of_nothing_else_stays_itself():
    network = Net()
    network.scale = lambda x: 2 * x
    assert copy_network(network).scale is network.scale


GLOBAL = Net()


def test_a_global_name_cannot_be_copied():
    GLOBAL.forward = lambda x: GLOBAL.linear(x)
    with pytest.raises(TypeError, match="by the global name 'GLOBAL'"):
        copy_network(GLOBAL)
