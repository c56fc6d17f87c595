"""Cases of the operators for tests and benchmarks: inputs and tolerances."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from dfad_kernels import activation_boundary_loss, interpolated_kl_div, normalized_squared_error
from dfad_kernels.registration import FusedLoss, compute_dtype

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float64: 1e-13}
"""Largest error of a gradient, relative to its largest element; includes half a unit in the last place."""

LOSS_TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 3e-6, torch.float16: 3e-6, torch.float64: 1e-13}
"""Largest relative error of a loss, which is computed in float32 for every narrower dtype."""

Settings = dict[str, Any]


@dataclass(frozen=True)
class BadCall:
    """A call that must raise an error, and words of its message."""

    arguments: tuple[Any, ...]
    error: type[Exception]
    words: str
    settings: Settings


@dataclass(frozen=True)
class OpCase:
    """An operator's entry in every test and benchmark."""

    op: FusedLoss[Any]

    shapes: tuple[tuple[int, ...], ...]
    """From one element to past the size of a block, with odd sizes between."""

    settings: Callable[[int, Generator], list[Settings]]
    """Keyword arguments other than the reduction, for a batch of that size."""

    gradients: tuple[str, ...]
    """Names of the inputs that get a gradient."""

    unit: Callable[..., float]
    """Magnitude of a gradient's terms before they cancel, for the settings and an incoming gradient of 1; that of a
    loss is its square."""

    bad_calls: tuple[BadCall, ...]

    normalized: bool = False
    """Whether the loss is divided by what grows with the number of elements."""

    @property
    def name(self) -> str:
        """Name of the operator."""
        return self.op.__name__

    def pair(self, shape: tuple[int, ...], dtype: torch.dtype, generator: Generator) -> tuple[Tensor, Tensor]:
        """A student's and a teacher's tensor of standard deviation 3, without gradients."""
        student, teacher = (torch.randn(shape, generator=generator, dtype=torch.float64) * 3 for _ in range(2))
        return student.to(dtype), teacher.to(dtype)

    def bytes_moved(self, student: Tensor, gradients: int) -> tuple[int, int]:
        """Bytes that forward and backward pass must read and write: each input once, each gradient once."""
        size = student.numel() * student.element_size()
        return 2 * size, (2 + gradients) * size

    def upstream_like(self, loss: Tensor, student: Tensor, reduction: str, generator: Generator) -> Tensor:
        """An incoming gradient that is not 1, as large as with a loss scaler: no float16 gradient underflows."""
        factor = {"mean": student.numel(), "batchmean": student.shape[0]}.get(reduction, 1)
        if self.normalized:
            factor *= student.numel()
        random = torch.rand(loss.shape, generator=generator, dtype=torch.float64) + 0.5
        return (random * factor).to(compute_dtype(student)).to(loss.device)


def relative_error(actual: Tensor, exact: Tensor, floor: float = 0.0) -> float:
    """Largest difference over the largest exact value, or over ``floor`` where that is larger."""
    if exact.numel() == 0:
        return 0.0
    difference = (actual.double() - exact.double()).abs().max().item()
    scale = max(exact.double().abs().max().item(), floor)
    return difference / scale if difference else 0.0


def _activation_boundary_settings(samples: int, generator: Generator) -> list[Settings]:
    return [{}, {"margin": 0.37}]


def _interpolated_kl_div_settings(samples: int, generator: Generator) -> list[Settings]:
    coefficients = torch.rand(samples, generator=generator)
    return [
        {"mixing_coefficient": 0.3},
        {"mixing_coefficient": 1.0, "temperature": 4.0},
        {
            "mixing_coefficient": coefficients,
            "partner": torch.randperm(samples, generator=generator),
            "temperature": 2.0,
        },
    ]


def _normalized_squared_error_settings(samples: int, generator: Generator) -> list[Settings]:
    return [{}, {"size": torch.tensor(12345.0)}]


def _bad(*arguments: Any, error: type[Exception] = ValueError, words: str, **settings: Any) -> BadCall:
    return BadCall(arguments, error, words, settings)


_x, _y = torch.zeros(4, 3), torch.ones(4, 3)
_BAD_PAIRS = (
    _bad(_x, _y[:, :2], words=r"\(4, 3\).*\(4, 2\)"),
    _bad(_x, _y.double(), error=TypeError, words="float32.*float64"),
    _bad(_x.long(), _y.long(), error=TypeError, words="int64"),
    _bad(_x, _y.to("meta"), words="cpu.*meta"),
    _bad(_x, _y, words="'average'.*batchmean", reduction="average"),
    _bad(_x[0, 0], _y[0, 0], words="no dimensions"),
)


def _with(calls: tuple[BadCall, ...], **settings: Any) -> tuple[BadCall, ...]:
    return tuple(BadCall(call.arguments, call.error, call.words, settings | call.settings) for call in calls)


CASES = (
    OpCase(
        activation_boundary_loss,
        shapes=((1, 1), (3, 5), (7, 4, 5, 3), (2, 3, 2, 5, 3), (2, 2049), (1, 20001)),
        settings=_activation_boundary_settings,
        gradients=("student",),
        unit=lambda margin=1.0: margin,
        bad_calls=(
            *_BAD_PAIRS,
            *(
                _bad(_x, _y, words=f"margin is {value}", margin=value)
                for value in (0.0, -1.0, float("nan"), float("inf"))
            ),
        ),
    ),
    OpCase(
        interpolated_kl_div,
        shapes=((1, 1), (1, 7), (3, 5), (5, 10), (4, 2, 1), (6, 21, 5, 3), (3, 4, 2, 3, 2), (4, 33, 65), (3, 8193)),
        settings=_interpolated_kl_div_settings,
        gradients=("student", "teacher"),
        unit=lambda temperature=1.0, **_: max(temperature, 3.0),  # T q log(ỹ / p) is about as large as the logits
        bad_calls=(
            *_with(_BAD_PAIRS, mixing_coefficient=0.5),
            _bad(_x[:, 0], _y[:, 0], 0.5, words=r"\(4,\).*\(N, C\)"),
            _bad(_x, _y, -0.1, words=r"-0.1.*\[0, 1\]"),
            _bad(_x, _y, 1.1, words=r"1.1.*\[0, 1\]"),
            _bad(_x, _y, float("nan"), words=r"nan.*\[0, 1\]"),
            _bad(_x, _y, torch.rand(3), words=r"\(3,\).*\(4,\)"),
            _bad(_x, _y, torch.ones(4, dtype=torch.int64), error=TypeError, words="int64"),
            _bad(_x, _y, torch.rand(4, device="meta"), words="meta.*cpu"),
            _bad(_x, _y, torch.rand(4, requires_grad=True), words="detach"),
            _bad(_x, _y, 0.5, torch.arange(3), words=r"\(3,\).*\(4,\)"),
            _bad(_x, _y, 0.5, torch.arange(4, dtype=torch.int32), error=TypeError, words="int32.*long"),
            _bad(_x, _y, 0.5, torch.arange(4, device="meta"), words="meta.*cpu"),
            *(_bad(_x, _y, 0.5, words=f"temperature is {t}", temperature=t) for t in (0.0, -2.0, float("nan"))),
        ),
    ),
    OpCase(
        normalized_squared_error,
        shapes=((1, 1), (3, 5), (7, 4, 5, 3), (2, 3, 2, 5, 3), (2, 2049), (1, 20001)),
        settings=_normalized_squared_error_settings,
        gradients=("student",),
        unit=lambda **_: 0.0,  # errors are exact differences
        bad_calls=(
            *_BAD_PAIRS,
            _bad(_x, _y.clone().requires_grad_(), words="teacher.*detach"),
            _bad(_x, _y, torch.ones(4), words=r"size.*\(4,\).*\(\)"),
            _bad(_x, _y, torch.tensor(3), error=TypeError, words="size.*int64"),
            _bad(_x, _y, torch.ones((), device="meta"), words="size.*meta.*cpu"),
            _bad(_x, _y, torch.ones((), requires_grad=True), words="size.*detach"),
        ),
        normalized=True,
    ),
)
"""One case per operator; a test fails if one is missing."""
