"""Taps as outputs: the values inside the network, also if they are overwritten afterwards."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dfad import models
from dfad.errors import ModelError
from dfad.models.anatomy import names_of_own_taps
from dfad.models.taps import BatchNormTaps, has_batchnorm, with_taps
from dfad.models.wrappers import CHECKED_WITH


class Residual(nn.Module):
    """A block whose addition is no module, and whose ReLU overwrites the tap."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.bn = nn.BatchNorm2d(3)
        self.relu = nn.ReLU(inplace=True)
        self.stage = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4))
        self.linear = nn.Linear(4, 5)

    def forward(self, images):
        features = self.relu(self.bn(self.conv(images)) + images)
        features = F.relu(self.stage(features))
        return self.linear(features.mean((2, 3)))


class Branching(nn.Module):
    """What depends on the values of its input cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3)

    def forward(self, images):
        return self.conv(images) if images.sum() > 0 else images


@pytest.fixture
def network() -> Residual:
    torch.manual_seed(0)
    network = Residual()
    network(torch.randn(64, 3, 8, 8))  # statistics that are not those of a fresh network
    return network.eval()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(4, 3, 8, 8)


def test_names_replace_the_taps_that_a_network_returns_itself(images):
    network = models.convnet(channels=(4, 6, 8), num_classes=5).eval()
    outputs, own = with_taps(network, names_of_own_taps(network)[1:])(images), network(images)
    assert torch.equal(outputs.logits, own.logits)
    assert len(outputs.taps) == 2
    assert all(torch.equal(tap, other) for tap, other in zip(outputs.taps, own.taps[1:], strict=True))


def test_modules_containers_and_functional_nodes_are_tapped(network, images):
    outputs = with_taps(network, ["bn", "add", "stage"])(images)
    norm = network.bn(network.conv(images))
    addition = norm + images
    assert torch.equal(outputs.logits, network(images))
    torch.testing.assert_close(outputs.taps, (norm, addition, network.stage(addition.relu())))


def test_weights_are_shared(network):
    tapped = with_taps(network, ["bn"])
    assert tapped.state_dict().keys() == network.state_dict().keys()
    with torch.no_grad():
        tapped.linear.bias.fill_(7)
    assert torch.equal(network.linear.bias, torch.full((5,), 7.0))


def test_an_unknown_name_is_answered_with_the_nearest(network):
    with pytest.raises(ModelError, match=r"'stag' to tap\. Did you mean 'stage'\? dfad inspect lists its taps\."):
        with_taps(network, ["stag"])


def test_a_network_that_cannot_be_traced_is_refused_with_the_way_out():
    message = r"no module 'add' to tap.*Branching is not rewritten: it cannot be traced .* Name modules, or let"
    with pytest.raises(ModelError, match=message):
        with_taps(Branching(), ["add"])


def test_batchnorm_taps_are_what_reached_each_batchnorm(network, images):
    expected_first = network.conv(images)
    expected_second = network.stage[0]((network.bn(expected_first) + images).relu())
    logits = network(images)
    norms = [network.bn, network.stage[1]]
    measured = BatchNormTaps(network)
    result, features = measured(images)
    assert torch.equal(result, logits)
    assert measured.norms == norms
    torch.testing.assert_close(features, (expected_first, expected_second))


def test_gradients_flow_through_batchnorm_taps(network, images):
    _, features = BatchNormTaps(network)(images.requires_grad_())
    sum(feature.square().sum() for feature in features).backward()
    assert images.grad.abs().sum() > 0


@pytest.mark.parametrize("tapped", [lambda network: with_taps(network, ["add"]), BatchNormTaps], ids=["taps", "norms"])
def test_copies_are_independent(tapped, network, images):
    original = tapped(network)
    duplicate = copy.deepcopy(original)
    before = original(images)
    with torch.no_grad():
        for parameter in duplicate.parameters():
            parameter.zero_()
    changed, same = duplicate(images), original(images)
    torch.testing.assert_close(same, before)
    assert not torch.equal(changed[1][0], same[1][0])


def test_networks_with_statistics_are_told_from_those_without(network):
    assert has_batchnorm(network)
    assert not has_batchnorm(nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3, track_running_stats=False)))


def test_private_attributes_are_those_that_were_checked():
    """Read in a newer version where nn.Module keeps parameters, buffers and modules, and what `to` calls; then name
    it."""
    assert torch.__version__.rpartition(".")[0] in CHECKED_WITH
    kept = {name for name in vars(nn.Module()) if name in ("_parameters", "_buffers", "_modules")}
    assert len(kept) == 3
    assert nn.Module._apply
