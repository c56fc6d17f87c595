"""Contenders for whole rounds: the loop as published, the same repaired, and this project's with ever more parts."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.bench_ops import published_activation_boundary
from bench.device import ON_GPU, captured
from bench.floor import Floor
from bench.race import Contender
from dfad import models
from dfad.config import (
    ActivationConfig,
    DistillConfig,
    EngineConfig,
    GeneratorConfig,
    InterpolationConfig,
    MethodConfig,
    RegularizerConfig,
    Switch,
)
from dfad.distillation.distiller import Distiller
from dfad.engine import Engine, has_bfloat16
from dfad.engine.compile import compile_call
from dfad.engine.precision import float32_products
from dfad.models.connectors import Connectors
from dfad.models.generator import Generator

BOTH_REGULARIZERS = {
    "activation": ActivationConfig(weight=1.0),
    "interpolation": InterpolationConfig(weight=1.0),
}


SINGLE_PARTS = ("channels_last", "fuse_batchnorm", "merge_upsampling", "cast_weights")
"""Parts of the engine that ours is measured without, on a GPU."""


@dataclass(frozen=True)
class Case:
    """A pair of networks and a batch."""

    name: str
    teacher: Callable[[], nn.Module]
    student: Callable[[], nn.Module]
    image_shape: tuple[int, int, int]
    method: MethodConfig
    generator: GeneratorConfig = GeneratorConfig()
    gpu_only: bool = False

    def config(self, device: torch.device, **changes: object) -> DistillConfig:
        return replace(
            DistillConfig(device=str(device), method=self.method, generator=self.generator),
            **changes,  # type: ignore[arg-type]
        )

    def networks(self) -> tuple[nn.Module, nn.Module]:
        torch.manual_seed(0)
        return self.teacher(), self.student()


CASES = [
    Case(
        "digits",
        lambda: models.convnet(channels=(32, 64, 128), in_channels=1),
        lambda: models.convnet(channels=(16, 32, 64), in_channels=1),
        (1, 8, 8),
        MethodConfig(batch_size=128, regularizers=RegularizerConfig(0.1, 0.1, 5.0), **BOTH_REGULARIZERS),
        GeneratorConfig(noise_dim=64, width=32),
    ),
    Case(
        "mnist-lenet5",
        models.lenet5,
        models.lenet5_half,
        (1, 28, 28),
        MethodConfig(batch_size=64, **BOTH_REGULARIZERS),
        GeneratorConfig(noise_dim=100, width=32),
    ),
    Case(
        "cifar-resnet20",
        models.resnet20,
        models.resnet20,
        (3, 32, 32),
        MethodConfig(batch_size=64, **BOTH_REGULARIZERS),
    ),
    Case(
        "cifar-resnet34-resnet18",
        models.resnet34,
        models.resnet18,
        (3, 32, 32),
        MethodConfig(batch_size=256, regularizers=RegularizerConfig(1.0, 1.0, 20.0), **BOTH_REGULARIZERS),
        GeneratorConfig(width=128),
        gpu_only=True,
    ),
]


def repaired_engine(device: torch.device) -> EngineConfig:
    """What a careful user turns on by hand: channels-last and autocast."""
    precision = "bfloat16" if has_bfloat16(device) else "float32"
    return EngineConfig(
        precision=precision,
        channels_last="on",
        fused_optimizers="off",
        fold_batchnorm="off",
        fuse_batchnorm="off",
        fuse_convolutions="off",
        keep_memory="off",
        cast_weights="off",
        merge_upsampling="off",
        cuda_graph="off",
    )


class PublishedRound:
    """The loop as its sources publish it: float32, NCHW, a teacher whose parameters take gradients and whose forward
    keeps a graph in every step, unfused optimizers and losses.

    Args:
        case: networks and batch.
        device: to run on.
    """

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case = case
        self.device = device
        self.teacher, self.student = (network.to(device) for network in case.networks())
        self.teacher.eval()
        self.generator = Generator(case.image_shape, case.generator.noise_dim, case.generator.width).to(device)
        probe = torch.zeros(2, *case.image_shape, device=device)
        self.connectors = Connectors(self.student(probe).taps, self.teacher(probe).taps).to(device)
        parameters = [*self.student.parameters(), *self.connectors.parameters()]
        self.student_optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=5e-4, foreach=False)
        self.generator_optimizer = torch.optim.Adam(self.generator.parameters(), lr=1e-3, foreach=False)
        self.norm_inputs: list[Tensor] = []
        self.norms = [m for m in self.teacher.modules() if isinstance(m, nn.BatchNorm2d)]
        if case.method.regularizers.batchnorm:
            for norm in self.norms:
                norm.register_forward_hook(lambda module, inputs, output: self.norm_inputs.append(inputs[0]))

    def __call__(self) -> None:
        for _ in range(self.case.method.student_steps):
            self.student_step()
        self.generator_step()

    def student_step(self) -> None:
        method = self.case.method
        self.student.train()
        images = self.generator(self.noise()).detach()
        self.norm_inputs.clear()
        teacher = self.teacher(images)
        student = self.student(images)
        loss = F.l1_loss(student.logits, teacher.logits.detach())
        loss = loss + method.activation.weight * sum(
            published_activation_boundary(s, t.detach(), method.activation.margin)
            for s, t in zip(self.connectors(student.taps), teacher.taps, strict=True)
        )
        weight = torch.distributions.Beta(1.0, 1.0).sample((len(images),)).to(self.device)
        partner = torch.randperm(len(images), device=self.device)
        pixels = weight.view(-1, 1, 1, 1)
        mixed = pixels * images + (1 - pixels) * images[partner]
        soft = teacher.logits.detach().softmax(dim=1)
        label = weight.view(-1, 1) * soft + (1 - weight.view(-1, 1)) * soft[partner]
        divergence = F.kl_div(self.student(mixed).logits.log_softmax(dim=1), label, reduction="batchmean")
        loss = loss + method.interpolation.weight * divergence
        self.student_optimizer.zero_grad()
        loss.backward()
        self.student_optimizer.step()

    def generator_step(self) -> None:
        regularizers = self.case.method.regularizers
        images = self.generator(self.noise())
        self.norm_inputs.clear()
        teacher, student = self.teacher(images), self.student(images)
        loss = -F.l1_loss(student.logits, teacher.logits)
        if regularizers.batchnorm:
            for x, norm in zip(self.norm_inputs, self.norms, strict=True):
                mean = x.mean([0, 2, 3])
                variance = x.permute(1, 0, 2, 3).reshape(x.size(1), -1).var(1, unbiased=False)
                distance = torch.norm(norm.running_var - variance, 2) + torch.norm(norm.running_mean - mean, 2)  # type: ignore[operator]
                loss = loss + regularizers.batchnorm * distance
            loss = loss + regularizers.one_hot * F.cross_entropy(teacher.logits, teacher.logits.argmax(1))
            prediction = teacher.logits.softmax(1).mean(0)
            loss = loss + regularizers.diversity * (prediction * prediction.log()).sum()
        self.generator_optimizer.zero_grad()
        loss.backward()
        self.generator_optimizer.step()

    def noise(self) -> Tensor:
        return torch.randn(self.case.method.batch_size, self.case.generator.noise_dim, device=self.device)


def ours(case: Case, device: torch.device, engine: EngineConfig, *, fused: bool) -> Contender:
    """This project's round with the given parts."""
    teacher, student = case.networks()
    config = case.config(device, engine=engine, fused=fused)
    with left_out() as reasons:
        distiller = Distiller(teacher, student, config, image_shape=case.image_shape)
    return contender(distiller, reasons)


def contender(distiller: Distiller, reasons: Sequence[str] = ()) -> Contender:
    """A distiller's rounds.

    Args:
        distiller: runs them.
        reasons: why parts of its engine are left out.
    """
    engine = distiller.engine

    def details() -> dict[str, Any]:
        found: dict[str, Any] = {"precision": engine.precision}
        if ON_GPU:
            found["captured"] = engine.captured
        return found | ({"left_out": list(reasons)} if reasons else {})

    return Contender(distiller.run_round, engine.running, details)


@contextmanager
def left_out() -> Iterator[list[str]]:
    """Collects why parts of the engine are left out for networks; what the machine lacks is not among it."""
    reasons: list[str] = []
    log = logging.getLogger("dfad.engine")
    handler = logging.Handler()
    handler.addFilter(lambda record: record.name != Engine.__module__)
    handler.emit = lambda record: reasons.append(record.getMessage())  # type: ignore[method-assign]
    before = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield reasons
    finally:
        log.removeHandler(handler)
        log.setLevel(before)


def make_distiller(case: Case, device: torch.device, **parts: Switch) -> Distiller:
    """The case's distiller with all parts of the engine except the graph and the named ones."""
    teacher, student = case.networks()
    config = case.config(device, engine=EngineConfig(cuda_graph="off", **parts))
    return Distiller(teacher, student, config, image_shape=case.image_shape)


def floor(case: Case, device: torch.device) -> Contender:
    """The floor of our round; on a GPU, as a CUDA graph."""
    distiller = make_distiller(case, device, fuse_convolutions="off")
    with distiller.engine.running():
        replay = captured(Floor(distiller))
    return Contender(replay, distiller.engine.running, lambda: {"captured": True} if ON_GPU else {})


def published(case: Case, device: torch.device, *, with_tf32: bool) -> Contender:
    """The loop as published, which leaves TF32 as PyTorch sets it."""
    precision: Literal["tf32", "ieee"] = "tf32" if with_tf32 else "ieee"
    return Contender(
        PublishedRound(case, device), partial(float32_products, precision), lambda: {"products": precision}
    )


def repaired_and_compiled(case: Case, device: torch.device, mode: str) -> Contender:
    """The repaired round, with each network compiled by hand: in the mode reduce-overhead with CUDA graphs of its own.

    The engine's own part would compile each network once more, to compare it.
    """
    teacher, student = case.networks()
    config = case.config(device, engine=repaired_engine(device), fused=False)
    distiller = Distiller(teacher, student, config, image_shape=case.image_shape)
    teacher_networks = (distiller.teacher.network, distiller.teacher.measured)
    for network in (*teacher_networks, distiller.student, distiller.generator):
        if network is not None:
            compile_call(network, mode=mode, dynamic=False)

    def round_() -> None:
        torch.compiler.cudagraph_mark_step_begin()
        distiller.run_round()

    return Contender(round_, distiller.engine.running)


def contenders(device: torch.device) -> dict[str, Callable[[Case], Contender]]:
    """Functions that build rounds, from the slowest to the fastest idea, and the floor of the fastest."""
    on_gpu = device.type == "cuda"
    repaired = repaired_engine(device)
    with_folding = replace(repaired, fold_batchnorm="on")
    with_merging = replace(with_folding, merge_upsampling="on")
    with_optimizers = replace(with_merging, fused_optimizers="on")
    best = EngineConfig(cuda_graph="on" if on_gpu else "off")
    compiled = replace(best, compile="on", fuse_batchnorm="off", fuse_convolutions="off")

    def make(engine: EngineConfig, *, fused: bool = True) -> Callable[[Case], Contender]:
        return partial(ours, device=device, engine=engine, fused=fused)

    makers: dict[str, Callable[[Case], Contender]] = {
        "published": partial(published, device=device, with_tf32=False),
        "repaired": make(repaired, fused=False),
        "repaired + torch.compile": partial(repaired_and_compiled, device=device, mode="default"),
        "losses": make(repaired),
        "losses, folding": make(with_folding),
        "losses, folding, merging": make(with_merging),
        "losses, folding, merging, optimizers": make(with_optimizers),
        "losses, folding, merging, optimizers, BatchNorm": make(replace(with_optimizers, fuse_batchnorm="on")),
        "ours": make(best),
        "ours + torch.compile": make(compiled),
        "floor": partial(floor, device=device),
    }
    if on_gpu:
        makers["published, TF32"] = partial(published, device=device, with_tf32=True)
        makers["repaired + reduce-overhead"] = partial(repaired_and_compiled, device=device, mode="reduce-overhead")
        without_graph = replace(best, cuda_graph="off")
        makers["ours without the graph"] = make(without_graph)
        makers["ours without the graph, BatchNorm"] = make(replace(without_graph, fuse_batchnorm="on"))
        makers["ours with two streams"] = make(replace(best, two_streams="on"))
        for part in SINGLE_PARTS:
            makers[f"ours without {part}"] = make(replace(best, **{part: "off"}))
    return makers


TELLING = ("published", "published, TF32", "repaired", "ours", "ours without the graph", "floor")
"""Contenders without --full, which compile nothing."""
