"""Whole rounds: rounds and images per second, peak memory, and how far each contender is from the floor.

Below them, choices of how a round is built against their alternatives: mixed images apart from the others, BatchNorm
statistics taken before the folding, BatchNorms computed with what follows them.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bench.floor import Floor
from bench.rounds import CASES, Case, contenders
from dfad.config import EngineConfig
from dfad.estimate import TensorMemory
from dfad.folding import fold_batchnorm
from dfad.fusing import FusedBatchNorm
from dfad.losses import BatchNormStatisticsLoss
from dfad.models.taps import BatchNormTaps, with_taps
from dfad.trainer import Distiller

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
RUNNABLE = [pytest.param(case, id=case.name) for case in CASES if DEVICE.type == "cuda" or not case.gpu_only]
ROUNDS = 40 if DEVICE.type == "cuda" else 5
WARM_UP = 6 if DEVICE.type == "cuda" else 1
"""More than a CUDA graph waits for before it is captured."""


def measure(benchmark: Any, case: Case, name: str, round_: Callable[[], object]) -> None:
    """Time a round; its rates and peak memory go to the record."""

    def run() -> None:
        round_()
        wait()

    benchmark.group = f"round {case.name}"
    benchmark.pedantic(run, rounds=ROUNDS, warmup_rounds=WARM_UP)
    seconds = benchmark.stats.stats.median
    images = (case.method.student_steps + 1) * case.method.batch_size
    benchmark.extra_info |= {
        "contender": name,
        "rounds_per_second": 1 / seconds,
        "images_per_second": images / seconds,
        "peak_memory_bytes": peak_memory(round_),
    }


def make_distiller(case: Case) -> Distiller:
    """The case's, with neither graph nor compilation in the way of looking inside."""
    teacher, student = case.networks()
    config = case.config(DEVICE, engine=EngineConfig(cuda_graph="off"))
    return Distiller(teacher, student, config, image_shape=case.image_shape)


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


@pytest.mark.parametrize("case", RUNNABLE)
@pytest.mark.parametrize(("name", "make"), contenders(DEVICE), ids=[name for name, _ in contenders(DEVICE)])
def test_round(case: Case, name: str, make: Callable[[Case], Callable[[], object]], benchmark: Any) -> None:
    measure(benchmark, case, name, make(case))


@pytest.mark.parametrize("case", RUNNABLE)
def test_floor(case: Case, benchmark: Any) -> None:
    measure(benchmark, case, "floor", Floor(make_distiller(case)))


@pytest.mark.parametrize("case", RUNNABLE)
@pytest.mark.parametrize("batches", ["two", "one"])
def test_mixed_images_in_two_batches_or_one(case: Case, batches: str, benchmark: Any) -> None:
    """The student forward and backward on images and mixed images; one batch would share BatchNorm statistics."""
    distiller = make_distiller(case)
    images = distiller.generator(distiller.sample_noise(case.method.batch_size)).detach()
    distiller.student.train()

    def run() -> None:
        with distiller.engine.autocast():
            if batches == "two":
                loss = sum(distiller.student(x).logits.float().square().mean() for x in (images, images.flip(0)))
            else:
                loss = 2 * distiller.student(torch.cat([images, images.flip(0)])).logits.float().square().mean()
        assert isinstance(loss, torch.Tensor)
        loss.backward()
        wait()

    benchmark.group = f"mixed images {case.name}"
    benchmark.extra_info["contender"] = "two batches" if batches == "two" else "one batch"
    benchmark.pedantic(run, rounds=ROUNDS, warmup_rounds=2)


@pytest.mark.parametrize("case", [c for c in RUNNABLE if c.id != "mnist-lenet5"])
@pytest.mark.parametrize("network", ["as it is", "folded"])
def test_batchnorm_statistics(case: Case, network: str, benchmark: Any) -> None:
    """The teacher forward and backward to the images, with the statistics of what reaches each BatchNorm.

    Of the folded network they are taken of what its convolutions return; a loss would still have to divide them by the
    BatchNorms' scales.
    """
    distiller = make_distiller(case)
    images = distiller.generator(distiller.sample_noise(case.method.batch_size)).detach().requires_grad_()
    teacher = case.networks()[0].eval().requires_grad_(False)
    norms = [module for module in teacher.modules() if isinstance(module, nn.BatchNorm2d)]
    if network == "folded":
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
        wait()

    benchmark.group = f"BatchNorm statistics {case.name}"
    benchmark.extra_info["contender"] = network
    benchmark.pedantic(run, rounds=ROUNDS, warmup_rounds=2)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="is for CPUs")
@pytest.mark.parametrize("channels", [16, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("residual", [False, True], ids=["", "addition"])
@pytest.mark.parametrize("contender", ["PyTorch", "torch.compile", "ours"])
def test_batchnorm_and_what_follows(
    channels: int, dtype: torch.dtype, residual: bool, contender: str, benchmark: Any
) -> None:
    """Forward and backward of a BatchNorm, an addition where there is one, and a ReLU."""
    shape = (64, channels, 32, 32)
    features, added, upstream = (
        torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last) for _ in range(3)
    )
    norm = nn.BatchNorm2d(channels)
    operands = [features.requires_grad_(), added.requires_grad_()] if residual else [features.requires_grad_()]

    def separate(features: torch.Tensor, added: torch.Tensor | None = None) -> torch.Tensor:
        normalised = norm(features)
        return F.relu(normalised if added is None else normalised + added)

    torch.compiler.reset()
    contenders: dict[str, Callable[..., torch.Tensor]] = {
        "PyTorch": separate,
        "torch.compile": torch.compile(separate, dynamic=False, fullgraph=True),
        "ours": FusedBatchNorm(norm, negative_slope=0.0),
    }
    compute = contenders[contender]
    torch.testing.assert_close(compute(*operands), separate(*operands), rtol=0.02, atol=0.02)

    def run() -> None:
        torch.autograd.grad(compute(*operands), [*operands, *norm.parameters()], upstream)

    name = f"BatchNorm, {'addition, ' if residual else ''}ReLU {'x'.join(map(str, shape))}"
    benchmark.group = f"{name}, {str(dtype).removeprefix('torch.')}, forward+backward"
    benchmark.extra_info["contender"] = contender
    benchmark.pedantic(run, rounds=100, warmup_rounds=5)
