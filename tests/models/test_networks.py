"""The classifiers: published sizes, pre-activation taps, full-graph compilation, names of real trained networks."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from dfad import models
from dfad.models.probing import parameter_count
from dfad.models.resnet import SubsamplingShortcut
from dfad.models.taps import Outputs
from dfad.models.weights import load_weights

PARAMETERS = {
    "lenet5": 61_706,
    "lenet5_half": 15_738,
    "resnet8": 75_290,
    "resnet14": 172_506,
    "resnet18": 11_173_962,
    "resnet20": 269_722,
    "resnet32": 464_154,
    "resnet34": 21_282_122,
    "resnet44": 658_586,
    "resnet56": 853_018,
    "vgg11": 9_228_362,
    "vgg13": 9_413_066,
    "vgg16": 14_724_042,
    "vgg19": 20_035_018,
    "wrn_16_1": 175_066,
    "wrn_16_2": 691_674,
    "wrn_40_1": 563_930,
    "wrn_40_2": 2_243_546,
}
"""Parameter counts as published with the architectures; ResNet-8 and ResNet-14 are counted by hand."""

RESNET34_TAPS = [(64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4)]
THIN_TAPS = [(16, 32, 32), (32, 16, 16), (64, 8, 8)]

TAPS = {
    "convnet": [(32, 32, 32), (64, 16, 16), (128, 8, 8)],
    "lenet5": [(6, 28, 28), (16, 10, 10), (120, 1, 1)],
    "lenet5_half": [(3, 28, 28), (8, 10, 10), (60, 1, 1)],
    "resnet18": RESNET34_TAPS,
    "resnet20": THIN_TAPS,
    "resnet34": RESNET34_TAPS,
    "vgg11": [(64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4), (512, 2, 2)],
    "wrn_16_1": THIN_TAPS,
    "wrn_40_2": [(32, 32, 32), (64, 16, 16), (128, 8, 8)],
}

SEES_TAP = {
    "convnet": (["stages.1.0", "stages.2.0"], True),
    "lenet5": (["conv2", "conv3"], True),
    "resnet20": (["layer2.0.conv1", "layer3.0.conv1"], False),
    "resnet18": (["layer2.0.conv1", "layer3.0.conv1", "layer4.0.conv1"], False),
    "vgg11": (["stages.1.0", "stages.2.0", "stages.3.0", "stages.4.0"], True),
    "wrn_16_1": (["stage2.first.conv1", "stage3.first.conv1"], False),
}
"""Convolutions that see all taps but the last, and whether through max-pooling."""


def images_for(name: str, count: int = 2) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(count, 1, 28, 28) if name.startswith("lenet") else torch.randn(count, 3, 32, 32)


def test_every_network_is_tested():
    assert set(models.__all__) == {"convnet", *PARAMETERS}


@pytest.mark.parametrize("name", PARAMETERS)
def test_has_the_published_number_of_parameters(name):
    with torch.device("meta"):
        network = getattr(models, name)()
    assert parameter_count(network) == PARAMETERS[name]


@pytest.mark.parametrize("name", TAPS)
def test_returns_logits_and_one_tap_per_stage(name):
    network = getattr(models, name)(num_classes=7).eval()
    outputs = network(images_for(name))
    assert isinstance(outputs, Outputs)
    assert outputs.logits.shape == (2, 7)
    assert [tuple(tap.shape[1:]) for tap in outputs.taps] == TAPS[name]


@pytest.mark.parametrize("name", SEES_TAP)
def test_taps_are_what_the_next_stage_sees_before_relu(name):
    network = getattr(models, name)().eval()
    names, pooled = SEES_TAP[name]
    seen = []
    for module in names:
        network.get_submodule(module).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    taps = network(images_for(name)).taps
    assert len(seen) == len(taps) - 1
    for tap, expected in zip(taps, seen, strict=False):
        assert (tap < 0).any()
        activation = F.relu(tap)
        assert_close(F.max_pool2d(activation, 2) if pooled else activation, expected)


@pytest.mark.parametrize("name", ["convnet", "resnet20", "wrn_16_1", "vgg11"])
def test_last_tap_makes_the_logits(name):
    network = getattr(models, name)().eval()
    logits, taps = network(images_for(name))
    assert (taps[-1] < 0).any()
    features = F.relu(taps[-1])
    features = F.max_pool2d(features, 2) if name == "vgg11" else features
    assert_close(logits, network.linear(features.mean((2, 3))))


def test_relu_in_place_spares_the_taps():
    network = models.resnet20().train()
    outputs = network(images_for("resnet20"))
    sum(tap.sum() for tap in outputs.taps).backward()  # autograd would refuse a tap written over afterwards
    assert network.conv1.weight.grad.isfinite().all()


@pytest.mark.parametrize("name", ["convnet", "lenet5", "resnet20", "resnet18", "vgg11", "wrn_16_1"])
def test_compiles_as_one_graph(name):
    network = getattr(models, name)().eval()
    images = images_for(name)
    compiled = torch.compile(network, fullgraph=True, backend="eager")
    outputs, expected = compiled(images), network(images)
    assert_close(outputs.logits, expected.logits)
    assert_close(outputs.taps, expected.taps)


def test_a_subsampling_shortcut_takes_every_second_pixel_and_keeps_the_memory_format():
    shortcut = SubsamplingShortcut(2, 6)
    for size in (8, 7):
        features = torch.randn(3, 2, size, size).contiguous(memory_format=torch.channels_last).requires_grad_()
        result = shortcut(features)
        assert torch.equal(result[:, 2:4], features[:, :, ::2, ::2])
        assert not result[:, :2].any()
        assert not result[:, 4:].any()
        assert result.is_contiguous(memory_format=torch.channels_last)
        (gradient,) = torch.autograd.grad(result.square().sum(), features)
        assert gradient.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(gradient[:, :, ::2, ::2], 2 * features[:, :, ::2, ::2])
        assert gradient.count_nonzero() == features[:, :, ::2, ::2].numel()


def test_lenet_takes_images_of_one_size():
    images = torch.randn(2, 1, 32, 32)
    assert models.lenet5(padding=0)(images).logits.shape == (2, 10)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        models.lenet5()(images)


@pytest.mark.parametrize("depth", [20, 32])
def test_names_are_those_of_real_trained_networks(depth, shared_data):
    network = getattr(models, f"resnet{depth}")()
    load_weights(network, shared_data / "nets" / f"cifar10-resnet{depth}.safetensors")
    assert network.linear.weight.abs().max() > 0.1
