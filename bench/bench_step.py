"""Whole rounds: rounds and images per second, peak memory, and how far each contender is from the floor.

Below them, choices of how a round is built against their alternatives: mixed images apart from the others, BatchNorm
statistics taken before the folding, BatchNorms computed with what follows them, and with the convolutions before them.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bench.race import Rules, replayed
from bench.rounds import CASES, Case, contenders, make_distiller
from dfad.distillation.tensor_memory import TensorMemory
from dfad.engine.fold_batchnorm import fold_batchnorm
from dfad.engine.fuse_batchnorm import FusedBatchNorm, fuse_batchnorm
from dfad.engine.fuse_convolutions import fuse_convolutions
from dfad.losses import BatchNormStatisticsLoss
from dfad.models.resnet import BasicBlock
from dfad.models.taps import BatchNormTaps, with_taps

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
RUNNABLE = [pytest.param(case, id=case.name) for case in CASES if DEVICE.type == "cuda" or not case.gpu_only]


def wait() -> None:
    """For the device."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def peak_memory(round_: Callable[[], object]) -> int:
    """Bytes: allocated on a GPU; on a CPU of the tensors that a round makes."""
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        round_()
        return torch.cuda.max_memory_allocated()
    with TensorMemory() as memory:
        round_()
    return memory.peak


def seconds() -> float:
    """When the device has done what it was given."""
    wait()
    return time.perf_counter()


ON_GPU = DEVICE.type == "cuda"
RULES = Rules(
    rounds=lambda run: 40 if ON_GPU else 10,
    timer=seconds,
    # the memory of a GPU does not hold all contenders at once
    turns=1 if ON_GPU else 10,
    # more than a CUDA graph waits for before it is captured
    warm_up=6 if ON_GPU else 1,
)
CONTENDERS = dict(contenders(DEVICE))
torch._dynamo.config.recompile_limit = 64  # several contenders compile the same networks in one process


@pytest.mark.benchmark(timer=replayed)
@pytest.mark.parametrize("case", RUNNABLE)
@pytest.mark.parametrize("contender", CONTENDERS)
def test_round(case: Case, contender: str, race: Any, benchmark: Any) -> None:
    rules = replace(RULES, inspect=lambda run: {"peak_memory_bytes": peak_memory(run)})
    race(f"round {case.name}", lambda name: CONTENDERS[name](case), rules)
    median = benchmark.stats.stats.median
    benchmark.extra_info |= {
        "rounds_per_second": 1 / median,
        "images_per_second": case.method.images_per_round / median,
    }


@pytest.mark.benchmark(timer=replayed)
@pytest.mark.parametrize("case", RUNNABLE)
@pytest.mark.parametrize("contender", ["two batches", "one batch"])
def test_mixed_images_in_two_batches_or_one(case: Case, contender: str, race: Any) -> None:
    """The student forward and backward on images and mixed images; one batch would share BatchNorm statistics."""

    def enter(name: str) -> Callable[[], object]:
        distiller = make_distiller(case, DEVICE)
        images = distiller.generator(distiller.round.sample_noise(case.method.batch_size)).detach()
        distiller.student.train()

        def run() -> None:
            with distiller.engine.autocast():
                if name == "two batches":
                    first, second = (distiller.student(x).logits.float() for x in (images, images.flip(0)))
                else:
                    first, second = distiller.student(torch.cat([images, images.flip(0)])).logits.float().chunk(2)
                loss = first.square().mean() + second.square().mean()
            loss.backward()

        return run

    race(f"mixed images {case.name}", enter, RULES)


@pytest.mark.benchmark(timer=replayed)
@pytest.mark.parametrize("case", [c for c in RUNNABLE if c.id != "mnist-lenet5"])
@pytest.mark.parametrize("contender", ["as it is", "folded"])
def test_batchnorm_statistics(case: Case, contender: str, race: Any) -> None:
    """The teacher forward and backward to the images, with the statistics of what reaches each BatchNorm.

    Of the folded network they are taken of what its convolutions return; a loss would still have to divide them by the
    BatchNorms' scales.
    """

    def enter(name: str) -> Callable[[], object]:
        distiller = make_distiller(case, DEVICE)
        images = distiller.generator(distiller.round.sample_noise(case.method.batch_size)).detach().requires_grad_()
        teacher = case.networks()[0].eval().requires_grad_(False)
        norms = [module for module in teacher.modules() if isinstance(module, nn.BatchNorm2d)]
        if name == "folded":
            folded = fold_batchnorm(teacher)
            names = [name for name, module in folded.named_modules() if isinstance(module, nn.Conv2d)]
            measured = distiller.engine.place(with_taps(folded, names))
            features_of = lambda x: measured(x).taps  # noqa: E731
        else:
            taps = distiller.engine.place(BatchNormTaps(teacher))
            features_of = lambda x: taps(x)[1]  # noqa: E731
        loss_of = BatchNormStatisticsLoss(norms)

        def run() -> None:
            with distiller.engine.autocast():
                loss = loss_of(features_of(images))
            loss.backward()

        return run

    race(f"BatchNorm statistics {case.name}", enter, RULES)


@pytest.mark.skipif(ON_GPU, reason="is for CPUs")
@pytest.mark.benchmark(timer=replayed)
@pytest.mark.parametrize("channels", [16, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("residual", [False, True], ids=["", "addition"])
@pytest.mark.parametrize("contender", ["PyTorch", "torch.compile", "ours"])
def test_batchnorm_and_what_follows(
    channels: int, dtype: torch.dtype, residual: bool, contender: str, race: Any
) -> None:
    """Forward and backward of a BatchNorm, an addition where there is one, and a ReLU."""
    shape = (64, channels, 32, 32)
    features, added, upstream = (
        torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last) for _ in range(3)
    )
    operands = [features.requires_grad_(), added.requires_grad_()] if residual else [features.requires_grad_()]

    def enter(name: str) -> Callable[[], object]:
        norm = nn.BatchNorm2d(channels)

        def separate(features: torch.Tensor, added: torch.Tensor | None = None) -> torch.Tensor:
            normalised = norm(features)
            return F.relu(normalised if added is None else normalised + added)

        compute: dict[str, Callable[..., torch.Tensor]] = {
            "PyTorch": separate,
            "torch.compile": torch.compile(separate, dynamic=False, fullgraph=True),
            "ours": FusedBatchNorm(norm, negative_slope=0.0),
        }
        torch.testing.assert_close(compute[name](*operands), separate(*operands), rtol=0.02, atol=0.02)
        return lambda: torch.autograd.grad(compute[name](*operands), [*operands, *norm.parameters()], upstream)

    task = f"BatchNorm, {'addition, ' if residual else ''}ReLU {'x'.join(map(str, shape))}"
    group = f"{task}, {str(dtype).removeprefix('torch.')}, forward+backward"
    race(group, enter, replace(RULES, rounds=lambda run: 100))


@pytest.mark.skipif(ON_GPU, reason="is for CPUs")
@pytest.mark.benchmark(timer=replayed)
@pytest.mark.parametrize(("channels", "size"), [(16, 32), (32, 16), (64, 8)])
@pytest.mark.parametrize("contender", ["PyTorch", "BatchNorm", "convolution and BatchNorm"])
def test_residual_blocks(channels: int, size: int, contender: str, race: Any) -> None:
    """Forward and backward of a stage of ResNet-20 in bfloat16: three blocks; what is fused names the contender."""
    x = torch.randn(64, channels, size, size).bfloat16().contiguous(memory_format=torch.channels_last).requires_grad_()
    upstream = torch.randn_like(x)

    def enter(name: str) -> Callable[[], object]:
        blocks = [BasicBlock(channels, channels, 1, nn.Identity()) for _ in range(3)]
        stage = nn.Sequential(*blocks).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if name == "BatchNorm":
            fuse_batchnorm(stage)
        elif name == "convolution and BatchNorm":
            fuse_convolutions(stage)
        leaves = [x, *stage.parameters()]

        def run() -> None:
            with torch.autocast("cpu", torch.bfloat16):
                y = stage(x)
            torch.autograd.grad(y, leaves, upstream)

        return run

    race(
        f"stage of ResNet-20 64x{channels}x{size}x{size}, forward+backward",
        enter,
        replace(RULES, rounds=lambda run: 50),
    )
