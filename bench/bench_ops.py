"""The fused losses against the formulas as published, their reference, and what ``torch.compile`` makes of it; and
operators over features against PyTorch's own.

A red check of a contender's loss or gradient stops its benchmark.
"""

import functools
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.device import DEVICE, ON_GPU, captured, cold_cache
from bench.race import Outcome, Rules
from dfad_kernels import (
    activation_boundary_loss,
    batch_norm,
    batchnorm_distance,
    frozen_batch_norm,
    interpolated_kl_div,
    normalized_squared_error,
)
from dfad_kernels.batchnorm_distance import reference as batchnorm_distance_reference
from dfad_kernels.testing import CASES, OpCase, relative_error

MIXING_COEFFICIENT = 0.3
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Task:
    """A loss between tensors of one size, with the ways to compute it."""

    case: OpCase
    name: str
    shape: tuple[int, ...]
    contenders: dict[str, Loss]

    @property
    def id(self) -> str:
        """The name without what a shell minds."""
        return self.name.replace(", ", "-").replace(" ", "-")

    @property
    def kind(self) -> str:
        """The name without the size."""
        return self.name.rpartition(" ")[0]


def published_activation_boundary(student: Tensor, teacher: Tensor, margin: float = 1.0) -> Tensor:
    """Heo et al.'s expression, averaged over elements: all terms computed everywhere, and masked."""
    too_high = ((student > -margin) & (teacher <= 0)).float()
    too_low = ((student <= margin) & (teacher > 0)).float()
    return ((student + margin) ** 2 * too_high + (student - margin) ** 2 * too_low).abs().mean()


def published_normalized_squared_error(student: Tensor, teacher: Tensor) -> Tensor:
    """The equation, as it is usually written."""
    return ((student - teacher) ** 2).sum() / (teacher**2).sum()


def published_interpolated_kl_div(student: Tensor, teacher: Tensor) -> Tensor:
    """Softmax, mix, and PyTorch's divergence."""
    soft = teacher.softmax(dim=1)
    label = MIXING_COEFFICIENT * soft + (1 - MIXING_COEFFICIENT) * soft.flip(0)
    return F.kl_div(student.log_softmax(dim=1), label, reduction="batchmean")


def plain_kl_div(student: Tensor, teacher: Tensor) -> Tensor:
    """The case that other libraries have: no mixing."""
    return F.kl_div(student.log_softmax(dim=1), teacher.softmax(dim=1), reduction="batchmean")


compiled = functools.partial(torch.compile, dynamic=False, fullgraph=True)
"""For each size on its own, as suits it best."""


def _activation_boundary(shape: tuple[int, ...], name: str) -> Task:
    return Task(
        CASES[0],
        name,
        shape,
        {
            "published": published_activation_boundary,
            "reference": activation_boundary_loss.reference,
            "torch.compile": compiled(activation_boundary_loss.reference),
            "ours": activation_boundary_loss,
        },
    )


def _normalized_squared_error(shape: tuple[int, ...], name: str) -> Task:
    return Task(
        CASES[2],
        name,
        shape,
        {
            "published": published_normalized_squared_error,
            "reference": normalized_squared_error.reference,
            "torch.compile": compiled(normalized_squared_error.reference),
            "ours": normalized_squared_error,
        },
    )


def _interpolated_kl_div(shape: tuple[int, ...], name: str) -> Task:
    reference: Loss = lambda s, t: interpolated_kl_div.reference(s, t, MIXING_COEFFICIENT)  # noqa: E731
    return Task(
        CASES[1],
        name,
        shape,
        {
            "published": published_interpolated_kl_div,
            "reference": reference,
            "torch.compile": compiled(reference),
            "ours": lambda s, t: interpolated_kl_div(s, t, MIXING_COEFFICIENT),
        },
    )


def _plain(shape: tuple[int, ...], name: str) -> Task:
    contenders: dict[str, Loss] = {
        "published": plain_kl_div,
        "torch.compile": compiled(plain_kl_div),
        "ours": lambda s, t: interpolated_kl_div(s, t, 1.0),
    }
    if ON_GPU and importlib.util.find_spec("liger_kernel"):
        from liger_kernel.transformers import LigerKLDIVLoss

        liger = LigerKLDIVLoss(reduction="batchmean")
        contenders["liger-kernel"] = lambda s, t: liger(s.log_softmax(dim=1), t.softmax(dim=1))
    return Task(CASES[1], name, shape, contenders)


def tasks() -> list[Task]:
    """Taps of ResNet-18, logits of 10 to 32,000 classes, dense logits; larger ones on a GPU."""
    batch = 256 if ON_GPU else 64
    taps = [(batch, 64, 32, 32), (batch, 128, 16, 16), (batch, 256, 8, 8), (batch, 512, 4, 4)]
    if ON_GPU:
        taps.insert(0, (512, 64, 32, 32))  # 32 M elements
    logits = [(256, 10), (256, 100), (256, 1000), (1024 if ON_GPU else 64, 32000)]
    dense = (16, 21, 320, 320) if ON_GPU else (16, 21, 128, 128)
    return [
        *(_activation_boundary(shape, f"activation boundary, taps {_size(shape)}") for shape in taps),
        *(_normalized_squared_error(shape, f"normalized squared error, taps {_size(shape)}") for shape in taps),
        *(_interpolated_kl_div(shape, f"interpolated KL, logits {_size(shape)}") for shape in logits),
        _interpolated_kl_div(dense, f"interpolated KL, dense {_size(dense)}"),
        _plain((256, 1000), "plain KL, logits 256x1000"),
    ]


def _size(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


TASKS = tasks()


def inputs(task: Task, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    student, teacher = task.case.pair(task.shape, dtype, torch.Generator().manual_seed(0))
    return student.to(DEVICE).requires_grad_(), teacher.to(DEVICE)


def check(task: Task, loss: Loss, dtype: torch.dtype) -> None:
    """Compare with the first contender in float64; with a wider tolerance for dtypes that torch rounds at each step."""
    student, teacher = (x[:8] for x in inputs(task, dtype))
    exact = task.contenders["published"]
    wide = [x.detach().double().requires_grad_() for x in (student, teacher)]
    expected, value = exact(*wide), loss(student, teacher)
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    assert relative_error(value.detach(), expected.detach()) <= tolerance
    (gradient,) = torch.autograd.grad(value, student)
    (wanted,) = torch.autograd.grad(expected, wide[0])
    assert relative_error(gradient, wanted) <= tolerance


@pytest.fixture(scope="module")
def cold() -> Callable[[], object]:
    """Empties the GPU's cache, so that a run reads its tensors from memory."""
    return cold_cache()


def copying(bytes_moved: int) -> Callable[[], object]:
    """A copy that reads half of these bytes and writes the other half; random ones, because a GPU compresses zeros."""
    source = torch.randint(256, (bytes_moved // 2,), dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def races() -> Iterator[Any]:
    """Task, dtype, launch and direction; without --full only the largest task of each kind, forward and backward."""
    launches = ("eager", "graph") if ON_GPU else ("eager",)
    largest = {task.kind: task for task in sorted(TASKS, key=lambda task: torch.Size(task.shape).numel())}
    for task in TASKS:
        for dtype in (torch.float32, torch.bfloat16):
            for launch in launches:
                for direction in ("forward", "forward+backward"):
                    always = largest[task.kind] is task and direction != "forward" and launch == launches[-1]
                    words = f"{task.id}-{str(dtype).removeprefix('torch.')}-{direction}-{launch}"
                    marks = () if always else (pytest.mark.full,)
                    yield pytest.param(task, dtype, launch, direction, id=words, marks=marks)


@pytest.mark.parametrize(("task", "dtype", "launch", "direction"), list(races()))
def test_loss(
    task: Task,
    dtype: torch.dtype,
    launch: str,
    direction: str,
    race: Callable[..., None],
    cold: Callable[[], object],
    request: pytest.FixtureRequest,
) -> None:
    """Losses, and a copy that moves as many bytes."""
    student, teacher = inputs(task, dtype)
    forward, backward = task.case.bytes_moved(student, gradients=1)
    bytes_moved = forward if direction == "forward" else forward + backward
    budget = request.config.getoption("--seconds")
    launched = captured if launch == "graph" else lambda function: function

    def enter(name: str) -> Callable[[], object]:
        if name == "copy":
            return launched(copying(bytes_moved))
        loss = task.contenders[name]
        if name == "torch.compile":
            torch.compiler.reset()  # code for other sizes counts towards a limit beyond which nothing is compiled
        check(task, loss, dtype)

        def run() -> object:
            if direction == "forward":
                with torch.no_grad():
                    return loss(student, teacher)
            return torch.autograd.grad(loss(student, teacher), student)

        return launched(run)

    def bandwidth(outcomes: Mapping[str, Outcome], name: str) -> dict[str, Any]:
        fastest = outcomes[name].fastest
        found = {"bytes": bytes_moved, "gigabytes_per_second": bytes_moved / fastest / 1e9}
        if ON_GPU:
            found["captured"] = launch == "graph"
        if "copy" in outcomes:
            found["share_of_copy_bandwidth"] = outcomes["copy"].fastest / fastest
        return found

    group = f"{task.name}, {str(dtype).removeprefix('torch.')}, {direction}, {launch}"
    rules = Rules(
        rounds=lambda seconds: max(5, min(int(budget / max(seconds, 1e-9)), 500)), turns=5, warm_up=2, prepare=cold
    )
    race(group, {name: functools.partial(enter, name) for name in (*task.contenders, "copy")}, rules, bandwidth)


@dataclass(frozen=True)
class FeatureTask:
    """An operator over features, and PyTorch's operations that it stands for.

    Both are called with the features, what is added to them, and four numbers for each channel.
    """

    name: str
    plain: Callable[..., Tensor]
    ours: Callable[..., Tensor]
    adds: bool
    tensors: int
    """Of the features' size, that ours reads and writes forward and backward."""


def _batch_norm(x: Tensor, added: Tensor, *numbers: Tensor) -> Tensor:
    return F.relu(F.batch_norm(x, *numbers, training=True) + added)


def _frozen_batch_norm(x: Tensor, added: Tensor, *numbers: Tensor) -> Tensor:
    return F.relu(F.batch_norm(x, *numbers, training=False) + added)


def _epilogue(x: Tensor, added: Tensor, *numbers: Tensor) -> Tensor:
    return F.relu(x + numbers[-1].to(x.dtype).view(-1, 1, 1) + added)


FEATURE_TASKS = (
    FeatureTask(
        "BatchNorm, addition, ReLU",
        _batch_norm,
        lambda x, added, *numbers: batch_norm(x, *numbers, residual=added, negative_slope=0.0),
        adds=True,
        tensors=11,
    ),
    FeatureTask(
        "frozen BatchNorm, addition, ReLU",
        _frozen_batch_norm,
        lambda x, added, *numbers: frozen_batch_norm(x, *numbers, residual=added, negative_slope=0.0),
        adds=True,
        tensors=7,
    ),
    FeatureTask(
        "bias, addition, ReLU",
        _epilogue,
        lambda x, added, *numbers: frozen_batch_norm(x, bias=numbers[-1], residual=added, negative_slope=0.0),
        adds=True,
        tensors=6,
    ),
    FeatureTask(
        "distance of BatchNorm statistics",
        lambda x, added, *numbers: batchnorm_distance_reference(x, *numbers[:2]),
        lambda x, added, *numbers: batchnorm_distance(x, *numbers[:2]),
        adds=False,
        tensors=3,
    ),
)


@pytest.mark.parametrize("task", FEATURE_TASKS, ids=lambda task: task.name.replace(", ", "-").replace(" ", "-"))
@pytest.mark.parametrize("channels", [64, pytest.param(512, marks=pytest.mark.full)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.full)], ids=str)
def test_features(
    task: FeatureTask,
    channels: int,
    dtype: torch.dtype,
    race: Callable[..., None],
    cold: Callable[[], object],
    request: pytest.FixtureRequest,
) -> None:
    """Forward and backward beside a copy of as many bytes; as a CUDA graph on a GPU."""
    size = 32 if channels == 64 else 8
    shape = (512 if ON_GPU else 64, channels, size, size)
    generator = torch.Generator().manual_seed(0)
    x, added, upstream = (
        torch.randn(shape, generator=generator).to(DEVICE, dtype).contiguous(memory_format=torch.channels_last)
        for _ in range(3)
    )
    numbers = [(torch.rand(channels, generator=generator) + 0.5).to(DEVICE) for _ in range(4)]
    leaves = [x.requires_grad_(), added.requires_grad_()] if task.adds else [x.requires_grad_()]
    bytes_moved = task.tensors * x.numel() * x.element_size()
    budget = request.config.getoption("--seconds")

    def differentiate(compute: Callable[..., Tensor]) -> list[Tensor]:
        y = compute(x, added, *numbers)
        return [y.detach(), *torch.autograd.grad(y, leaves, upstream if y.ndim else torch.ones_like(y))]

    def enter(name: str) -> Callable[[], object]:
        if name == "copy":
            return captured(copying(bytes_moved))
        if name == "torch.compile":
            torch.compiler.reset()
        compute = {"PyTorch": task.plain, "torch.compile": compiled(task.plain), "ours": task.ours}[name]
        for found, expected in zip(differentiate(compute), differentiate(task.plain), strict=True):
            difference = (found.double() - expected.double()).norm()
            # in bfloat16 PyTorch rounds between operations, which may choose another side of zero
            assert difference <= (1e-3 if dtype == torch.float32 else 5e-2) * expected.double().norm()
        return captured(lambda: differentiate(compute))

    def bandwidth(outcomes: Mapping[str, Outcome], name: str) -> dict[str, Any]:
        found: dict[str, Any] = {"bytes": bytes_moved}
        if "copy" in outcomes:
            found["share_of_copy_bandwidth"] = outcomes["copy"].fastest / outcomes[name].fastest
        return found

    group = f"{task.name} {_size(shape)}, {str(dtype).removeprefix('torch.')}, forward+backward"
    rules = Rules(
        rounds=lambda seconds: max(5, min(int(budget / max(seconds, 1e-9)), 200)), turns=5, warm_up=2, prepare=cold
    )
    names = ("PyTorch", "torch.compile", "ours", "copy")
    race(group, {name: functools.partial(enter, name) for name in names}, rules, bandwidth)
