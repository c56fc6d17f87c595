"""Norms, activations and candidate taps of networks as others bring them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dfad import models
from dfad.models.anatomy import activations_of, boundary_of, candidate_taps, has_boundary, norms_of, paired
from dfad.models.taps import with_taps

SHAPE = (3, 16, 12)


class Block(nn.Module):
    def __init__(self, channels, width, stride, activation):
        super().__init__()
        self.conv = nn.Conv2d(channels, width, 3, stride, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.shortcut = nn.Conv2d(channels, width, 1, stride)
        self.activation = activation()
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(width, width, 1), nn.ReLU())

    def forward(self, features):
        features = self.norm(self.conv(features)) + self.shortcut(features)
        features = self.activation(features)
        return features * self.gate(features)


class Residual(nn.Module):
    """Plain: an addition enters each activation."""

    def __init__(self, activation=nn.ReLU):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), activation())
        self.one, self.two = Block(4, 6, 2, activation), Block(6, 8, 2, activation)
        self.head = nn.Linear(8, 5)

    def forward(self, images):
        return self.head(self.two(self.one(self.stem(images))).mean((2, 3)))


class Branching(Residual):
    """Not plain: it asks for a value."""

    def forward(self, images):
        if float(images.detach().abs().sum()) >= 0:
            images = images * 1
        return super().forward(images)


class Tokens(nn.Module):
    """A pre-norm transformer of one block."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, 4)
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)
        self.activation, self.head = nn.GELU(), nn.Linear(8, 5)

    def forward(self, images):
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        tokens = tokens + self.down(self.activation(self.up(self.norm(tokens))))
        return self.head(tokens.mean(1))


def test_the_last_pre_activation_of_each_resolution():
    network = Residual()
    taps = candidate_taps(network, SHAPE)
    assert [tap.shape for tap in taps] == [(4, 16, 12), (6, 8, 6), (8, 4, 3)]
    assert taps[0].name == "stem.1"
    assert "addition" in taps[1].found
    tapped = with_taps(network, [tap.name for tap in taps]).eval()(torch.randn(2, *SHAPE))
    assert [tuple(tap.shape[1:]) for tap in tapped.taps] == [tap.shape for tap in taps]
    assert all((tap < 0).any() for tap in tapped.taps)  # before the activation


def test_of_a_network_that_is_not_plain_by_what_modules_hand_on():
    network = Branching()
    taps = candidate_taps(network, SHAPE)
    assert [(tap.name, tap.shape) for tap in taps] == [("stem.1", (4, 16, 12))]  # additions are no modules
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


class NormAndActivation(nn.BatchNorm2d):
    """As timm's: with an activation of its own, counting its calls in training mode."""

    def __init__(self, channels):
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.ReLU()

    def forward(self, features):
        if self.training:
            self.num_batches_tracked.add_(1)
        bn_training = self.training
        features = F.batch_norm(
            features, self.running_mean, self.running_var, self.weight, self.bias, bn_training, self.momentum, self.eps
        )
        return self.act(self.drop(features))


def test_of_a_network_that_is_plain_in_eval_mode_alone():
    network = nn.Sequential(
        *(nn.Conv2d(3, 4, 3, padding=1), NormAndActivation(4), nn.Conv2d(4, 6, 3, 2, 1), NormAndActivation(6)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5)),
    )
    taps = candidate_taps(network, SHAPE)
    assert [(tap.name, tap.shape) for tap in taps] == [("1.drop", (4, 16, 12)), ("3.drop", (6, 8, 6))]
    for training in (True, False):
        tapped = with_taps(network, [tap.name for tap in taps]).train(training)(torch.randn(2, *SHAPE))
        assert all((tap < 0).any() for tap in tapped.taps)


def test_of_a_network_that_returns_its_own():
    taps = candidate_taps(models.convnet(channels=(4, 8), num_classes=4, in_channels=1), (1, 8, 8))
    assert [(tap.name, tap.shape) for tap in taps] == [("0", (4, 8, 8)), ("1", (8, 4, 4))]


def test_transformers_have_none():
    assert candidate_taps(Tokens(), SHAPE) == []


@pytest.mark.parametrize(
    ("network", "names", "says"),
    [
        (Residual(), {"ReLU"}, "have a boundary at zero"),
        (Residual(nn.SiLU), {"SiLU", "ReLU"}, "some of its activations .* have no boundary"),
        (Tokens(), {"GELU"}, "^its activations .* have no boundary"),
        (nn.Flatten(), set(), "no activation was found"),
    ],
)
def test_boundaries(network, names, says):
    activations = activations_of(network)
    assert set(activations) == names
    assert has_boundary(activations) == (names == {"ReLU"})
    with pytest.raises(AssertionError, match=says):
        raise AssertionError(boundary_of(activations))


def test_norms_are_counted_by_kind():
    assert norms_of(Residual()) == {"BatchNorm2d": 3}
    assert norms_of(Tokens()) == {"LayerNorm": 1}


def test_taps_pair_by_resolution():
    teacher, student = candidate_taps(Residual(), SHAPE), candidate_taps(Residual(), SHAPE)[1:]
    assert [(one.shape, other.shape) for one, other in paired(teacher, student)] == [
        (tap.shape, tap.shape) for tap in teacher[1:]
    ]
