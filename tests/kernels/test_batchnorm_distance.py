"""The distance of a batch's statistics from given ones: numbers against the equation in float64."""

import importlib
import sys
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, library

from dfad_kernels import batchnorm_distance
from dfad_kernels.batchnorm_distance import reference
from dfad_kernels.features import channels_last
from dfad_kernels.registration import compute_dtype
from dfad_kernels.testing import LOSS_TOLERANCE, TOLERANCE, relative_error
from tests.conftest import threads
from tests.kernels.implementations import FEATURE_KERNELS, interpreted
from tests.kernels.memory import guarded
from tests.waiting import NoWaiting

SHAPES = [(4, 3), (1, 2), (2, 1, 1, 1), (3, 1, 5, 5), (5, 3, 7), (2, 16, 4, 4), (2, 65, 9, 7), (2, 2049, 2, 2)]
each_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))
each_kernels = pytest.mark.parametrize("kernels", FEATURE_KERNELS)

Inputs = tuple[Tensor, Tensor, Tensor]
"""Features, mean and variance."""


def inputs_of(shape: tuple[int, ...], dtype: torch.dtype, generator: Generator) -> Inputs:
    x = channels_last(torch.randn(shape, generator=generator, dtype=torch.float64) + 1).to(dtype)
    mean = torch.randn(shape[1], generator=generator, dtype=torch.float64)
    variance = torch.rand(shape[1], generator=generator, dtype=torch.float64) + 0.5
    return x, mean.to(compute_dtype(x)), variance.to(compute_dtype(x))


def differentiate(op: Any, inputs: Inputs, upstream: float, **options: Any) -> tuple[Tensor, Tensor]:
    x, *statistics = inputs
    leaf = x.detach().requires_grad_()
    distance = op(leaf, *statistics, **options)
    return distance.detach(), torch.autograd.grad(distance, leaf, torch.full_like(distance, upstream))[0]


def check(
    shape: tuple[int, ...], dtype: torch.dtype, kernels: str | None, generator: Generator, device: str = "cpu"
) -> None:
    x, mean, variance = (value.to(device) for value in inputs_of(shape, dtype, generator))
    rows = x.numel() / shape[1]
    distance, gradient = differentiate(batchnorm_distance, (x, mean, variance), 3.0 * rows, kernels=kernels)
    exact, exact_gradient = differentiate(reference, (x.double(), mean.double(), variance.double()), 3.0 * rows)
    assert (distance.dtype, gradient.dtype) == (compute_dtype(x), dtype)
    assert gradient.stride() == x.stride()
    assert relative_error(distance, exact) <= 4 * LOSS_TOLERANCE[dtype]
    tolerance = 4 * TOLERANCE[dtype]
    if kernels == "triton" and dtype == torch.bfloat16:
        tolerance *= 2  # the interpreter cuts bfloat16 off where a GPU rounds
    assert relative_error(gradient, exact_gradient, 1.0) <= tolerance


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@each_dtype
@each_kernels
def test_matches_the_equation(
    shape: tuple[int, ...], dtype: torch.dtype, kernels: str | None, generator: Generator
) -> None:
    check(shape, dtype, kernels, generator)


@interpreted
@pytest.mark.parametrize("stretches", [1, 3])
def test_stretches_of_several_tiles(stretches: int, generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many stretches, as for large features, the last one ending within a tile; norms over several channel blocks."""
    channels = importlib.import_module("dfad_kernels.gpu.channels")
    for name, value in (("PROGRAMS", stretches), ("SUMMED_BYTES", 256), ("WALKED_BYTES", 256)):
        monkeypatch.setattr(channels, name, value)
    monkeypatch.setattr(importlib.import_module("dfad_kernels.gpu.batchnorm_distance"), "MEASURED_CHANNELS", 4)
    check((3, 13, 7, 3), torch.float32, "triton", generator)


def test_gradcheck(generator: Generator) -> None:
    x, mean, variance = inputs_of((3, 2, 3, 2), torch.float64, generator)
    assert torch.autograd.gradcheck(lambda leaf: batchnorm_distance(leaf, mean, variance), x.requires_grad_())


@each_kernels
def test_a_norm_of_zero_has_no_gradient(kernels: str | None) -> None:
    x = torch.tensor([[-1.0, 2.0], [1.0, 4.0]])
    for mean, variance in (([0.0, 3.0], [1.0, 1.0]), ([0.0, 3.0], [2.0, 1.0]), ([1.0, 3.0], [1.0, 1.0])):
        inputs = x, torch.tensor(mean), torch.tensor(variance)
        torch.testing.assert_close(
            differentiate(batchnorm_distance, inputs, 2.0, kernels=kernels), differentiate(reference, inputs, 2.0)
        )


@each_kernels
def test_a_mean_that_dwarfs_the_deviation_costs_no_variance(kernels: str | None, generator: Generator) -> None:
    x = torch.randn(8, 5, 32, 32, generator=generator) + 4096
    found = batchnorm_distance(x, x.double().mean((0, 2, 3)).float(), torch.zeros(5), kernels=kernels)
    exact = torch.linalg.vector_norm(x.double().var((0, 2, 3), correction=0))
    torch.testing.assert_close(found.double(), exact, rtol=1e-3, atol=0)  # the mean itself is rounded


@each_kernels
def test_nan_stays_nan(kernels: str | None, generator: Generator) -> None:
    x, mean, variance = inputs_of((4, 6, 5, 5), torch.float32, generator)
    x[1, 2, 3, 3] = torch.nan
    distance, gradient = differentiate(batchnorm_distance, (x, mean, variance), 2.0, kernels=kernels)
    assert distance.isnan()
    assert gradient.isnan().all()


@each_kernels
def test_other_layouts_are_taken_too(kernels: str | None, generator: Generator) -> None:
    x, *statistics = inputs_of((4, 6, 5, 7), torch.float32, generator)
    expected = differentiate(batchnorm_distance, (x, *statistics), 2.0, kernels=kernels)  # type: ignore[arg-type]
    other = torch.cat([x, x], dim=1)[:, :6]
    found = differentiate(batchnorm_distance, (other, *statistics), 2.0, kernels=kernels)  # type: ignore[arg-type]
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.skipif(sys.platform != "linux", reason="protects pages as Linux does")
@each_kernels
@each_dtype
def test_nothing_past_a_tensor_is_touched(kernels: str | None, dtype: torch.dtype, generator: Generator) -> None:
    for shape in [(5, 3), (7, 16), (3, 21), (300, 37), (9, 130)]:
        x, mean, variance = (guarded(value) for value in inputs_of(shape, dtype, generator))
        distance, gradient = differentiate(batchnorm_distance, (x, mean, variance), 2.0, kernels=kernels)
        assert distance.isfinite()
        assert gradient.isfinite().all()


def test_neither_runs_nor_threads_change_a_bit_nor_inputs(generator: Generator) -> None:
    inputs = inputs_of((16, 24, 33, 32), torch.bfloat16, generator)
    before = [value.clone() for value in inputs]
    results = []
    for number in (1, 2, 5, 5):
        with threads(number):
            results.append(differentiate(batchnorm_distance, inputs, 2.0))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=0, atol=0)
    torch.testing.assert_close(list(inputs), before, rtol=0, atol=0)


@interpreted
def test_triton_neither_waits_nor_changes_a_bit(generator: Generator) -> None:
    inputs = inputs_of((4, 6, 5, 7), torch.bfloat16, generator)
    with NoWaiting():
        results = [differentiate(batchnorm_distance, inputs, 2.0, kernels="triton") for _ in range(2)]
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_opcheck(generator: Generator) -> None:
    x, mean, variance = inputs_of((4, 3, 2, 5), torch.float32, generator)
    forward, backward = torch.ops.dfad_kernels.batchnorm_distance, torch.ops.dfad_kernels.batchnorm_distance_backward
    library.opcheck(forward.default, (x, mean, variance))
    _, saved = forward(x, mean, variance)
    library.opcheck(backward.default, (x, torch.ones(()), saved))


def test_compiles_into_one_graph(generator: Generator) -> None:
    torch.compiler.reset()
    inputs = inputs_of((4, 3, 2, 5), torch.float32, generator)
    compiled = torch.compile(batchnorm_distance, fullgraph=True, backend="aot_eager")
    found, expected = (differentiate(op, inputs, 2.0) for op in (compiled, batchnorm_distance))
    torch.testing.assert_close(found, expected)


ONES, NUMBERS = torch.ones(3, 2), torch.ones(2)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((ONES[:0], NUMBERS, NUMBERS), ValueError, r"shape is \(0, 2\); without values"),
        ((ONES, torch.ones(3), NUMBERS), ValueError, r"running_mean has shape \(3,\)"),
        ((ONES, NUMBERS, NUMBERS.double()), TypeError, "running_var is torch.float64"),
        ((ONES, NUMBERS, NUMBERS.clone().requires_grad_()), ValueError, "requires a gradient.*detach"),
        ((ONES.long(), NUMBERS, NUMBERS), TypeError, "features are torch.int64"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_calls_are_refused(arguments: tuple[Any, ...], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        batchnorm_distance(*arguments)
