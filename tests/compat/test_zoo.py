"""The engine on networks as users write them: it computes what plain PyTorch computes, as teacher and as student."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from dfad.config import (
    CollapseConfig,
    DistillConfig,
    EngineConfig,
    GeneratorConfig,
    MethodConfig,
    OptimizerConfig,
    OptimizersConfig,
    RecordingConfig,
    RegularizerConfig,
    SelectionConfig,
)
from dfad.copies import copy_network
from dfad.distillation.distiller import Distiller
from dfad.distillation.frozen_teacher import FrozenTeacher
from dfad.engine import Engine
from dfad.engine.calls import replaced_call
from dfad.engine.compile import uncompiled
from dfad.engine.placement import Placement
from dfad.errors import ConfigurationError
from dfad.models.outputs import as_outputs
from dfad.models.taps import has_batchnorm
from dfad.modes import set_mode
from tests.compat.zoo import CHANNELS, SIZE, TEACHERS_ALONE, WITHOUT_STATISTICS, ZOO, Small, seed_everything

SHAPE = (CHANNELS, SIZE, SIZE)
each_trait = pytest.mark.parametrize("trait", ZOO)


@pytest.fixture(autouse=True)
def worth_it_for_any_size(monkeypatch):
    monkeypatch.setattr("dfad.engine.fuse_batchnorm.SMALLEST", 0)


def make(trait: str, seed: int = 0) -> nn.Module:
    """A network whose BatchNorms have seen data."""
    seed_everything(seed)
    network = ZOO[trait]()
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d) and module.affine:
                module.weight.uniform_(0.5, 2)
                module.bias.normal_()
        for _ in range(3):
            network(2 * torch.randn(8, *SHAPE) + 1)
    return network


def engine(precision: str, *, fused: bool = True) -> Engine:
    return Engine(EngineConfig(precision=precision), fused=fused, device=torch.device("cpu"))


FLOAT32_ALONE = {"a custom BatchNorm"}
"""They raise under autocast, because an in-place operation needs one dtype."""


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.float() - expected.float()).norm() / expected.float().norm().clamp_min(1e-3)).item()


@each_trait
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_as_teacher(trait, precision):
    network = make(trait)
    frozen = FrozenTeacher(network, engine(precision), SHAPE, 8)
    set_mode(network, training=False)
    images = torch.randn(8, *SHAPE).contiguous(memory_format=torch.channels_last)
    calls = [(network, False), (network, True), (frozen, True), (lambda x: frozen.with_statistics(x)[0], True)]
    results = []
    for call, autocasts in calls:
        x = images.clone(memory_format=torch.contiguous_format if call is network else torch.preserve_format)
        x.requires_grad_()
        seed_everything(5)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocasts and precision == "bfloat16"):
            logits = as_outputs(call(x.clone())).logits
        if logits.requires_grad:
            logits.float().square().sum().backward()
        results.append((logits.detach(), torch.zeros_like(x) if x.grad is None else x.grad))
    exact, rounded, *found = results
    for values in found:
        for value, expected, other in zip(values, exact, rounded, strict=True):
            explained = 3 * relative_error(other, expected)
            assert relative_error(value, expected) <= explained + (1e-3 if precision == "float32" else 0.1)


CONFIG = DistillConfig(
    device="cpu",
    engine=EngineConfig(precision="float32"),
    generator=GeneratorConfig(noise_dim=4, width=2),
    method=MethodConfig(
        rounds=2, student_steps=2, batch_size=8, regularizers=RegularizerConfig(batchnorm=0.1, one_hot=0, diversity=0)
    ),
    optimizer=OptimizersConfig(student=OptimizerConfig(lr=0.01), generator=OptimizerConfig(lr=0.01)),
    selection=SelectionConfig(bank_size=8, every=2),
    recording=RecordingConfig(log_every=2, checkpoint_every=2),
    collapse=CollapseConfig(budget=0),
)


def a_teacher_for(student: nn.Module) -> nn.Module:
    with torch.no_grad():
        set_mode(student, training=False)
        classes = as_outputs(student(torch.zeros(2, *SHAPE))).logits.shape[1]
        set_mode(student, training=True)
    torch.manual_seed(1)
    teacher = type("Teacher", (Small,), {"classes": classes})()
    with torch.no_grad():
        teacher(torch.randn(16, *SHAPE))
    return teacher


def layout(network: nn.Module) -> dict[str, object]:
    """What the owner of a network may notice, apart from its weights."""
    found: dict[str, object] = {}
    for name, module in network.named_modules():
        found[f"{name} call"] = replaced_call(module)
        found[f"{name} mode"] = module.training
        found[f"{name} hooks"] = len(module._forward_hooks), len(module._forward_pre_hooks), len(module._backward_hooks)
        found[f"{name} attributes"] = set(vars(module)) - {"features", "calls"}
    for name, tensor in (*network.named_parameters(), *network.named_buffers()):
        found[name] = tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad
    return found


each_student = pytest.mark.parametrize("trait", [trait for trait in ZOO if trait not in TEACHERS_ALONE])


@each_student
def test_as_student(trait):
    weights = []
    for fused in (True, False):
        student = make(trait, seed=2)
        teacher = a_teacher_for(student)
        before = layout(student)
        Distiller(teacher, student, replace(CONFIG, fused=fused), image_shape=SHAPE).fit()
        assert layout(student) == before
        weights.append({**dict(student.named_parameters()), **dict(student.named_buffers())})
    assert weights[0].keys() == weights[1].keys()
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], rtol=2e-3, atol=2e-4, msg=lambda m, n=name: f"{n}: {m}")


@each_student
def test_as_student_in_bfloat16(trait):
    network = make(trait, seed=2)
    plain = network if trait == "a forward method on the instance" else copy_network(network)
    arguments = {"input_shape": SHAPE, "batch_size": 8, "read": as_outputs}
    if trait in FLOAT32_ALONE:
        with pytest.raises(ConfigurationError, match="engine.precision is bfloat16, but not for the network"):
            Placement(engine("bfloat16"), network, **arguments)
        return
    results = []
    placement = Placement(engine("bfloat16"), network, **arguments)
    for candidate in (plain, placement.take()):
        images = torch.randn(8, *SHAPE, generator=torch.Generator().manual_seed(4)).bfloat16()
        images = images.contiguous(memory_format=torch.channels_last) if candidate is not plain else images
        set_mode(candidate, training=True)
        seed_everything(5)
        with torch.autocast("cpu", torch.bfloat16):
            logits = as_outputs(candidate(images)).logits.float()
        logits.square().mean().backward()
        gradients = {name: p.grad for name, p in candidate.named_parameters() if p.grad is not None}
        results.append({"logits": logits.detach()} | {f"gradient of {name}": g for name, g in gradients.items()})
    for name, value in results[0].items():
        scale = max(value.norm().item(), 0.01)
        found = results[1][name]
        assert (found.float() - value.float()).norm().item() <= (0.5 if name.startswith("gradient") else 0.1) * scale


def test_statistics_are_those_of_batchnorms():
    assert {trait for trait in ZOO if not has_batchnorm(make(trait))} == set(WITHOUT_STATISTICS)


@pytest.mark.parametrize("trait", [trait for trait in ZOO if trait not in WITHOUT_STATISTICS])
def test_statistics_are_of_each_call(trait):
    network = make(trait)
    frozen = FrozenTeacher(network, engine("float32"), SHAPE, 8)
    network = uncompiled(network)
    set_mode(network, training=False)
    seen = []
    for module in network.modules():
        if has_batchnorm(nn.Sequential(module)) and not list(module.children()):
            module.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach().clone()))
    images = torch.randn(8, *SHAPE)
    with torch.no_grad():
        seed_everything(6)
        network(images.clone())
        seed_everything(6)
        _, features = frozen.with_statistics(images)
    assert len(features) == len(frozen.norms) == len(seen)
    for found, expected in zip(features, seen, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
