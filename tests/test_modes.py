"""Modes for the length of a block, restored also after an exception."""

import pytest
import torch
from torch import nn

from dfad.modes import evaluating, frozen, set_mode, statistics_kept, training


@pytest.fixture
def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout().eval(), nn.Conv2d(2, 2, 3))


@pytest.mark.parametrize("mode", [frozen, evaluating, statistics_kept, training])
def test_an_error_inside_ends_the_mode_too(mode, network):
    def state():
        modules = [(module.training, getattr(module, "track_running_stats", None)) for module in network.modules()]
        return modules, [parameter.requires_grad for parameter in network.parameters()]

    before = state()
    try:
        with mode(network):
            inside = state()
            raise ZeroDivisionError
    except ZeroDivisionError:
        pass
    assert inside != before
    assert state() == before


def test_frozen_lets_gradients_through_but_not_in(network):
    images = torch.randn(2, 1, 8, 8, requires_grad=True)
    with frozen(network):
        network(images).sum().backward()
    assert images.grad is not None
    assert all(parameter.grad is None for parameter in network.parameters())


def test_frozen_leaves_what_was_frozen_before_frozen(network):
    network[0].requires_grad_(False)
    with frozen(network):
        assert not any(parameter.requires_grad for parameter in network.parameters())
    assert not any(parameter.requires_grad for parameter in network[0].parameters())
    assert all(parameter.requires_grad for parameter in network[3].parameters())


def test_evaluating_restores_the_mode_of_each_module(network):
    network.train()
    network[1].eval()
    with evaluating(network):
        assert not any(module.training for module in network.modules())
    assert [module.training for module in network] == [True, False, True, True]
    assert network.training


def test_kept_statistics_normalise_with_the_batch_and_do_not_move(network):
    norm = network[1].train()
    features = 3 * torch.randn(8, 2, 4, 4) + 5
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    with statistics_kept(network):
        normalised = norm(features)
    torch.testing.assert_close(normalised.mean((0, 2, 3)), torch.zeros(2), atol=1e-5, rtol=0)
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())
    norm(features)
    assert not torch.equal(norm.running_mean, before["running_mean"])


@pytest.mark.parametrize("learns", [False, True])
def test_what_stands_beside_an_exported_program_gets_its_mode(learns):
    layers = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU()).eval()
    program = torch.export.export(layers, (torch.zeros(2, 1, 6, 6),)).module()
    norms = nn.BatchNorm2d(2).train(not learns), nn.BatchNorm2d(2).train(not learns)
    network = nn.Sequential(norms[0], nn.Sequential(program), norms[1])
    set_mode(network, training=learns)
    assert [network.training, *(norm.training for norm in norms)] == [learns] * 3
