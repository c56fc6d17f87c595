"""Whole rounds: rounds and images per second, peak memory, and the distance of each contender from the floor.

Further, choices of how a round is built, against their alternatives: mixed images in a separate batch, BatchNorm
statistics of the unfolded teacher, BatchNorms computed with what follows them, and with the convolutions before them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bench.device import DEVICE, ON_GPU, captured, cold_cache, seconds_of
from bench.kernel_times import kernels_of
from bench.race import Contender, Outcome, Rules
from bench.rounds import CASES, TELLING, Case, contenders, make_distiller
from dfad.distillation.tensor_memory import TensorMemory
from dfad.engine.cuda_graph import WARM_UP_ROUNDS
from dfad.engine.fold_batchnorm import fold_batchnorm
from dfad.engine.fuse_batchnorm import FusedBatchNorm, fuse_batchnorm
from dfad.engine.fuse_convolutions import fuse_convolutions
from dfad.losses import BatchNormStatisticsLoss
from dfad.models.resnet import BasicBlock
from dfad.models.taps import BatchNormTaps, with_taps

RUNNABLE = [pytest.param(case, id=case.name) for case in CASES if ON_GPU or not case.gpu_only]


def peak_memory(round_: Callable[[], object]) -> dict[str, Any]:
    """Bytes: allocated on a GPU, by a round without a graph; on a CPU, of the tensors that a round creates."""
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
        round_()
        return {"peak_memory_bytes": torch.cuda.max_memory_allocated()}
    with TensorMemory() as memory:
        round_()
    return {"peak_memory_bytes": memory.peak}


RULES = Rules(
    # between events on a GPU, whose medians are stable: as many as take three seconds
    rounds=lambda seconds: max(8, min(int(3 / seconds), 40)) if ON_GPU else 10,
    # all contenders at once do not fit into a GPU's memory
    turns=1 if ON_GPU else 5,
    warm_up=2,
)
torch.compiler.config.recompile_limit = 64  # several contenders compile the same networks in one process


@pytest.mark.parametrize("case", RUNNABLE)
def test_round(case: Case, race: Callable[..., None], request: pytest.FixtureRequest) -> None:
    """Whole rounds; on a GPU they are captured in the warm-up, or launched without a graph."""
    makers = contenders(DEVICE)
    names: Sequence[str] = list(makers)
    if not request.config.getoption("--full"):
        names = [name for name in names if name in TELLING]

    def enter(name: str) -> Contender:
        if ON_GPU:
            torch.cuda.empty_cache()
        return makers[name](case)

    def rates(outcomes: Mapping[str, Outcome], name: str) -> dict[str, float]:
        median = outcomes[name].row("", "")["median"]
        return {"rounds_per_second": 1 / median, "images_per_second": case.method.images_per_round / median}

    # on a GPU the round is captured in the warm-up, and inspected before that
    rules = replace(RULES, warm_up=WARM_UP_ROUNDS + 2 if ON_GPU else 1, inspect=peak_memory)
    race(f"round {case.name}", {name: partial(enter, name) for name in names}, rules, rates)


@pytest.mark.full
@pytest.mark.parametrize("case", RUNNABLE)
def test_kernels(case: Case, keep_profile: Callable[[dict[str, Any]], None]) -> None:
    """Where the time of one of our rounds goes; after all that is timed, because a profiler stays in the process."""
    entrant = contenders(DEVICE)["ours"](case)
    with entrant.running():
        for _ in range(WARM_UP_ROUNDS + 2):
            entrant.run()
        seconds = min(seconds_of(entrant.run) for _ in range(5))
        found = {"milliseconds": seconds * 1e3, **kernels_of(entrant.run), **entrant.details()}
    keep_profile({"round": case.name, **found})


@pytest.mark.full
@pytest.mark.parametrize("case", RUNNABLE)
def test_mixed_images_in_two_batches_or_one(case: Case, race: Callable[..., None]) -> None:
    """Student forward and backward on images and mixed images; in one batch they would share BatchNorm statistics."""

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

    race(f"mixed images {case.name}", {name: partial(enter, name) for name in ("two batches", "one batch")}, RULES)


@pytest.mark.full
@pytest.mark.parametrize("case", [c for c in RUNNABLE if c.id != "mnist-lenet5"])
def test_batchnorm_statistics(case: Case, race: Callable[..., None]) -> None:
    """Teacher forward, and backward to the images, with the statistics of each BatchNorm's input.

    For the folded network they are those of its convolutions' outputs; a loss would still have to divide them by the
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

    race(f"BatchNorm statistics {case.name}", {name: partial(enter, name) for name in ("as it is", "folded")}, RULES)


@pytest.mark.parametrize("channels", [pytest.param(16, marks=pytest.mark.full), 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("residual", [pytest.param(False, marks=pytest.mark.full), True], ids=["", "addition"])
def test_batchnorm_and_what_follows(
    channels: int, dtype: torch.dtype, residual: bool, race: Callable[..., None]
) -> None:
    """Forward and backward of a BatchNorm, an optional addition, and a ReLU; as a CUDA graph on a GPU."""
    shape = (512 if ON_GPU else 64, channels, 32, 32)
    features, added, upstream = (
        torch.randn(shape, device=DEVICE).to(dtype).contiguous(memory_format=torch.channels_last) for _ in range(3)
    )
    operands = [features.requires_grad_(), added.requires_grad_()] if residual else [features.requires_grad_()]

    def enter(name: str) -> Callable[[], object]:
        norm = nn.BatchNorm2d(channels, device=DEVICE)

        def separate(features: torch.Tensor, added: torch.Tensor | None = None) -> torch.Tensor:
            normalised = norm(features)
            return F.relu(normalised if added is None else normalised + added)

        compute: dict[str, Callable[..., torch.Tensor]] = {
            "PyTorch": separate,
            "torch.compile": torch.compile(separate, dynamic=False, fullgraph=True),
            "ours": FusedBatchNorm(norm, negative_slope=0.0, smallest=0, counted=[]),
        }
        torch.testing.assert_close(compute[name](*operands), separate(*operands), rtol=0.02, atol=0.02)
        return captured(
            lambda: torch.autograd.grad(compute[name](*operands), [*operands, *norm.parameters()], upstream)
        )

    task = f"BatchNorm, {'addition, ' if residual else ''}ReLU {'x'.join(map(str, shape))}"
    group = f"{task}, {str(dtype).removeprefix('torch.')}, forward+backward"
    entrants = {name: partial(enter, name) for name in ("PyTorch", "torch.compile", "ours")}
    race(group, entrants, replace(RULES, turns=5, rounds=lambda seconds: 100, prepare=cold_cache()))


@pytest.mark.skipif(ON_GPU, reason="is for CPUs")
@pytest.mark.full
@pytest.mark.parametrize(("channels", "size"), [(16, 32), (32, 16), (64, 8)])
def test_residual_blocks(channels: int, size: int, race: Callable[..., None]) -> None:
    """Forward and backward of a stage of ResNet-20 in bfloat16: three blocks; the contender names the fusion."""
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

    names = ("PyTorch", "BatchNorm", "convolution and BatchNorm")
    entrants = {name: partial(enter, name) for name in names}
    group = f"stage of ResNet-20 64x{channels}x{size}x{size}, forward+backward"
    race(group, entrants, replace(RULES, rounds=lambda seconds: 50))
