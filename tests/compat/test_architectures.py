"""Architectures of torchvision, timm and transformers, with random weights: the engine keeps their results."""

import importlib
from collections.abc import Callable

import pytest
import torch
from torch import nn

from dfad.config import EngineConfig
from dfad.copies import copy_network
from dfad.distillation.frozen_teacher import FrozenTeacher
from dfad.engine import Engine
from dfad.engine.placement import Placement
from dfad.models.outputs import as_outputs
from dfad.modes import set_mode
from tests.compat.proof import SMALL_VIT

SIZE = 64


def of_torchvision(name: str, **options) -> Callable[[], nn.Module]:
    return lambda: importlib.import_module("torchvision.models").get_model(
        name, weights=None, num_classes=10, **options
    )


def of_timm(name: str) -> Callable[[], nn.Module]:
    return lambda: importlib.import_module("timm").create_model(name, num_classes=10)


def of_transformers(config: str, model: str, **options) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        package = importlib.import_module("transformers")
        return getattr(package, model)(getattr(package, config)(num_labels=10, image_size=SIZE, **options))

    return make


ARCHITECTURES = {
    **{
        f"torchvision {name}": ("torchvision", of_torchvision(name))
        for name in (
            "resnet18",
            "mobilenet_v3_small",
            "shufflenet_v2_x0_5",
            "squeezenet1_1",
            "efficientnet_b0",
            "mnasnet0_5",
        )
    },
    "torchvision googlenet": ("torchvision", of_torchvision("googlenet", init_weights=False)),
    **{f"timm {name}": ("timm", of_timm(name)) for name in ("resnet18", "mobilenetv4_conv_small", "convnext_atto")},
    "transformers resnet": (
        "transformers",
        of_transformers(
            "ResNetConfig", "ResNetForImageClassification", hidden_sizes=[16, 32], depths=[1, 1], embedding_size=16
        ),
    ),
    "transformers vit": (
        "transformers",
        of_transformers("ViTConfig", "ViTForImageClassification", patch_size=16, **SMALL_VIT),
    ),
    "transformers mobilenet": (
        "transformers",
        of_transformers("MobileNetV2Config", "MobileNetV2ForImageClassification", depth_multiplier=0.35),
    ),
}
each_architecture = pytest.mark.parametrize("name", ARCHITECTURES)


def make(name: str) -> nn.Module:
    package, factory = ARCHITECTURES[name]
    pytest.importorskip(package, exc_type=(ImportError, RuntimeError))
    torch.manual_seed(0)
    network = factory()
    with torch.no_grad():
        for _ in range(2):
            network(torch.randn(4, 3, SIZE, SIZE))
    return network


def engine() -> Engine:
    return Engine(EngineConfig(precision="float32"), fused=True, device=torch.device("cpu"))


@each_architecture
def test_as_teacher(name):
    network = make(name)
    frozen = FrozenTeacher(network, engine(), (3, SIZE, SIZE), 8)
    network.eval()
    images = torch.randn(4, 3, SIZE, SIZE)
    with torch.no_grad():
        expected = as_outputs(network(images)).logits
        for found in (frozen(images), frozen.with_statistics(images)[0]):
            torch.testing.assert_close(found.logits, expected, rtol=1e-3, atol=1e-4)


@each_architecture
def test_as_student(name):
    network = make(name)
    plain = copy_network(network)
    placed = Placement(
        engine(), network, role="student", input_shape=(3, SIZE, SIZE), batch_size=20, read=as_outputs
    ).take()
    for training in (True, False):
        results = []
        for candidate in (plain, placed):
            torch.manual_seed(1)
            set_mode(candidate, training=training)
            images = torch.randn(4, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(2))
            results.append(as_outputs(candidate(images)).logits)
            results[-1].square().mean().backward()
        torch.testing.assert_close(results[1], results[0], rtol=1e-2, atol=1e-3)
    for (key, value), (_, other) in zip(plain.named_parameters(), placed.named_parameters(), strict=True):
        assert (value.grad is None) == (other.grad is None), key
        if value.grad is not None and other.grad is not None:
            assert (value.grad - other.grad).norm() <= 0.1 * value.grad.norm() + 1e-3, key
