"""Batch normalisation with what follows it: numbers against the equation in float64, and further guarantees."""

import importlib
import itertools
import math
import sys
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, library, nn

from dfad_kernels import batch_norm
from dfad_kernels.batch_norm import reference
from dfad_kernels.registration import compute_dtype
from dfad_kernels.testing import TOLERANCE, relative_error
from tests.conftest import threads
from tests.kernels.implementations import FEATURE_KERNELS, interpreted
from tests.kernels.memory import guarded
from tests.waiting import NoWaiting

SHAPES = [(4, 3), (2, 1, 1, 1), (3, 1, 5, 5), (5, 3, 7), (2, 16, 4, 4), (9, 64, 1, 1), (2, 65, 9, 7)]
each_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))
each_kernels = pytest.mark.parametrize("kernels", FEATURE_KERNELS)

Inputs = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]
"""Features, weight, bias and residual."""


@dataclass(frozen=True)
class Variant:
    """Which optional parts there are besides the normalisation."""

    adds: bool
    affine: bool
    slope: float

    def __str__(self) -> str:
        return f"{'adds ' * self.adds}{'affine ' * self.affine}{self.slope}"


VARIANTS = [Variant(*choice) for choice in itertools.product((False, True), (False, True), (1.0, 0.0, 0.2))]
each_variant = pytest.mark.parametrize("variant", VARIANTS, ids=str)


def inputs_of(shape: tuple[int, ...], variant: Variant, dtype: torch.dtype, generator: Generator) -> Inputs:
    """Features whose mean is not small compared to their deviation."""
    x, residual = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    weight, bias = torch.randn(2, shape[1], generator=generator, dtype=torch.float64)
    x, residual = channels_last(x + 3).to(dtype), channels_last(residual).to(dtype)
    wide = compute_dtype(x)
    parameters = (weight.to(wide), bias.to(wide)) if variant.affine else (None, None)
    return x, *parameters, residual if variant.adds else None


def channels_last(x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def on(device: str, inputs: Inputs) -> Inputs:
    """A copy in the same layout."""
    x, weight, bias, residual = (value if value is None else value.to(device) for value in inputs)
    assert x is not None
    return x, weight, bias, residual


def double(inputs: Inputs) -> Inputs:
    x, weight, bias, residual = (value if value is None else value.double() for value in inputs)
    assert x is not None
    return x, weight, bias, residual


def call(op: Any, inputs: Inputs, slope: float, **options: Any) -> Tensor:
    x, weight, bias, residual = inputs
    result: Tensor = op(x, None, None, weight, bias, residual=residual, negative_slope=slope, **options)
    return result


def differentiate(
    op: Any, inputs: Inputs, slope: float, upstream: Tensor, **options: Any
) -> tuple[Tensor, list[Tensor]]:
    leaves = tuple(value if value is None else value.detach().requires_grad_() for value in inputs)
    y = call(op, leaves, slope, **options)  # type: ignore[arg-type]
    return y.detach(), list(torch.autograd.grad(y, [leaf for leaf in leaves if leaf is not None], upstream))


@pytest.mark.parametrize("shape", [*SHAPES, (2, 2048, 3, 3), (3, 100, 40, 8)], ids=str)
@each_dtype
@each_kernels
def test_matches_the_equation(
    shape: tuple[int, ...], dtype: torch.dtype, kernels: str | None, generator: Generator
) -> None:
    interpreted_slowly = kernels == "triton" and math.prod(shape) > 1000
    for variant in VARIANTS[-2:-1] if interpreted_slowly else VARIANTS:
        check(shape, dtype, variant, kernels, generator)


def check(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    variant: Variant,
    kernels: str | None,
    generator: Generator,
    device: str = "cpu",
) -> None:
    inputs = on(device, inputs_of(shape, variant, dtype, generator))
    upstream = torch.randn(shape, generator=generator).to(device, dtype)
    exact_inputs = double(inputs)
    exact = call(reference, exact_inputs, variant.slope)
    dims = [0, *range(2, len(shape))]
    scale = exact_inputs[0].var(dims, correction=0).add(1e-5).rsqrt()
    scale = scale if exact_inputs[1] is None else scale * exact_inputs[1].abs()
    count = exact_inputs[0].numel() // shape[1]
    # of the terms that cancel in a gradient
    sizes = [scale.max().item(), count**0.5, count**0.5, 1.0]
    sizes = [size for size, value in zip(sizes, inputs, strict=True) if value is not None]
    # the factor is for the mean, which is rounded where it is three times the deviation, or more in few values
    tolerance = 4 * TOLERANCE[dtype] * max(1.0, scale.max().item())
    if kernels == "triton" and dtype == torch.bfloat16:
        tolerance *= 2  # the interpreter cuts bfloat16 off where a GPU rounds
    y, gradients = differentiate(batch_norm, inputs, variant.slope, upstream, kernels=kernels)
    assert y.dtype == dtype
    assert y.stride() == inputs[0].stride()
    assert relative_error(y, exact, 1.0) <= tolerance
    # rounding may choose another side of zero; from there on the gradients are compared
    passed = torch.where(y > 0, upstream.double(), variant.slope * upstream.double())
    _, exact_gradients = differentiate(reference, exact_inputs, 1.0, passed)
    for gradient, expected, size in zip(gradients, exact_gradients, sizes, strict=True):
        assert gradient.dtype == (dtype if gradient.shape == shape else compute_dtype(inputs[0]))
        assert relative_error(gradient, expected, size) <= tolerance


@each_kernels
@each_dtype
def test_running_statistics_move_as_pytorch_moves_them(
    dtype: torch.dtype, kernels: str | None, generator: Generator
) -> None:
    x, weight, bias, _ = inputs_of((6, 5, 3, 3), VARIANTS[3], dtype, generator)
    given = torch.full((5,), 0.7, dtype=compute_dtype(x)), torch.full((5,), 1.3, dtype=compute_dtype(x))
    moved, expected = [[value.clone() for value in given] for _ in range(2)]
    for _ in range(3):
        batch_norm(x, *moved, weight, bias, momentum=0.3, kernels=kernels)
        reference(x, *expected, weight, bias, momentum=0.3)
    torch.testing.assert_close(moved, expected)
    assert not torch.equal(moved[0], given[0])


@pytest.mark.parametrize("offset", [0.0, 4096.0])
@each_kernels
def test_a_mean_that_dwarfs_the_deviation_costs_no_variance(
    offset: float, kernels: str | None, generator: Generator
) -> None:
    x = torch.randn(8, 5, 32, 32, generator=generator) + offset
    mean, variance = torch.zeros(5), torch.zeros(5)
    batch_norm(x, mean, variance, momentum=1.0, kernels=kernels)
    torch.testing.assert_close(variance, x.double().var((0, 2, 3)).float(), rtol=1e-5, atol=0)
    torch.testing.assert_close(mean, x.double().mean((0, 2, 3)).float(), rtol=1e-6, atol=1e-6)


@each_variant
def test_gradcheck(variant: Variant, generator: Generator) -> None:
    inputs = inputs_of((3, 2, 3, 2), variant, torch.float64, generator)

    def op(*leaves: Tensor) -> Tensor:
        rest = iter(leaves)
        x, weight, bias, residual = (value if value is None else next(rest) for value in inputs)
        assert x is not None
        return call(batch_norm, (x, weight, bias, residual), variant.slope)

    assert torch.autograd.gradcheck(op, [value.requires_grad_() for value in inputs if value is not None])


def test_neither_runs_nor_threads_change_a_bit_nor_inputs(generator: Generator) -> None:
    inputs = inputs_of((16, 24, 33, 32), VARIANTS[-1], torch.bfloat16, generator)
    before = [value if value is None else value.clone() for value in inputs]
    upstream = channels_last(torch.randn(16, 24, 33, 32, generator=generator).bfloat16())
    results = []
    for number in (1, 2, 5, 5):
        with threads(number):
            results.append(differentiate(batch_norm, inputs, 0.2, upstream))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=0, atol=0)
    torch.testing.assert_close(list(inputs), before, rtol=0, atol=0)


@each_kernels
def test_other_layouts_are_taken_too(kernels: str | None, generator: Generator) -> None:
    x, weight, bias, residual = inputs_of((4, 6, 5, 7), VARIANTS[-1], torch.float32, generator)
    assert residual is not None
    upstream = torch.randn(4, 6, 5, 7, generator=generator)
    expected = differentiate(batch_norm, (x, weight, bias, residual), 0.2, upstream, kernels=kernels)
    sliced = channels_last(torch.cat([residual, residual], dim=1))[:, :6]
    other = x.contiguous(), weight, bias, sliced
    found = differentiate(batch_norm, other, 0.2, upstream, kernels=kernels)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    expanded = torch.ones(()).expand(4, 6, 5, 7)
    torch.testing.assert_close(
        *(differentiate(batch_norm, other, 0.2, ones, kernels=kernels) for ones in (expanded, torch.ones(4, 6, 5, 7))),
        rtol=0,
        atol=0,
    )


@each_kernels
def test_nan_fills_its_channel_and_no_other(kernels: str | None, generator: Generator) -> None:
    x, *others = inputs_of((4, 6, 5, 5), VARIANTS[-1], torch.float32, generator)
    x[1, 2, 3, 3] = torch.nan
    y = call(batch_norm, (x, *others), 0.2, kernels=kernels)  # type: ignore[arg-type]
    assert y[:, 2].isnan().all()
    assert y[:, [0, 1, 3, 4, 5]].isfinite().all()


@interpreted
@pytest.mark.parametrize("stretches", [1, 3])
@each_variant
def test_stretches_of_several_tiles(
    variant: Variant, stretches: int, generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many stretches, as for large features; the last one ends within a tile."""
    channels = importlib.import_module("dfad_kernels.gpu.channels")
    for name, value in (("PROGRAMS", stretches), ("SUMMED_BYTES", 128), ("WALKED_BYTES", 256)):
        monkeypatch.setattr(channels, name, value)
    check((3, 5, 7, 3), torch.float32, variant, "triton", generator)


@interpreted
def test_triton_neither_waits_nor_writes_inputs_nor_changes_a_bit(generator: Generator) -> None:
    for variant in VARIANTS[-2:]:
        inputs = inputs_of((4, 6, 5, 7), variant, torch.bfloat16, generator)
        running = torch.zeros(6), torch.ones(6)
        before = [value if value is None else value.clone() for value in inputs]
        upstream = torch.randn(4, 6, 5, 7, generator=generator).bfloat16()
        with NoWaiting():
            x, weight, bias, residual = inputs
            batch_norm(x, *running, weight, bias, residual=residual, kernels="triton")
            results = [differentiate(batch_norm, inputs, 0.2, upstream, kernels="triton") for _ in range(2)]
        torch.testing.assert_close(*results, rtol=0, atol=0)
        torch.testing.assert_close(list(inputs), before, rtol=0, atol=0)


def test_opcheck(generator: Generator) -> None:
    for variant in VARIANTS[-2:]:
        x, weight, bias, residual = inputs_of((4, 3, 2, 5), variant, torch.float32, generator)
        running = torch.zeros(3), torch.ones(3)
        forward, backward = torch.ops.dfad_kernels.batch_norm, torch.ops.dfad_kernels.batch_norm_backward
        library.opcheck(forward.default, (x, *running, weight, bias, residual, 0.1, 1e-5, variant.slope))
        y, statistics = forward(x, None, None, weight, bias, residual, 0.1, 1e-5, variant.slope)
        for kept in (y, None):
            library.opcheck(backward.default, (x, x, kept, statistics, weight, bias, 1e-5, variant.slope))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_into_one_graph(backend: str, generator: Generator) -> None:
    torch.compiler.reset()

    def move(op: Any, inputs: Inputs) -> tuple[Any, ...]:
        x, weight, bias, residual = inputs
        running = [torch.zeros(3), torch.ones(3)]

        def step(x: Tensor, *others: Any, **options: Any) -> Tensor:
            return op(x, *running, *others[2:], **options) * 2

        upstream = torch.ones(4, 3, 2, 5)
        return differentiate(step, (x, weight, bias, residual), 0.2, upstream), running

    inputs = inputs_of((4, 3, 2, 5), VARIANTS[-1], torch.float32, generator)
    compiled = torch.compile(batch_norm, fullgraph=True, backend=backend)
    torch.testing.assert_close(move(compiled, inputs), move(batch_norm, inputs))


@pytest.mark.skipif(sys.platform != "linux", reason="protects pages as Linux does")
@each_kernels
@each_dtype
def test_nothing_past_a_tensor_is_touched(kernels: str | None, dtype: torch.dtype, generator: Generator) -> None:
    shapes = [(5, 3), (7, 16), (3, 21), (300, 37), (9, 130)]
    variants = VARIANTS[-2:] if kernels == "triton" else VARIANTS
    for shape, variant in itertools.product(shapes, variants):
        given = (value if value is None else guarded(value) for value in inputs_of(shape, variant, dtype, generator))
        upstream = guarded(torch.randn(shape, generator=generator).to(dtype))
        y, gradients = differentiate(batch_norm, tuple(given), variant.slope, upstream, kernels=kernels)
        assert all(value.isfinite().all() for value in (y, *gradients))


def test_only_what_is_needed_is_given(generator: Generator) -> None:
    inputs = inputs_of((4, 6, 5, 5), VARIANTS[-1], torch.float32, generator)
    for needed, value in enumerate(inputs):
        assert value is not None
        value.requires_grad_()
        call(batch_norm, inputs, 0.2).sum().backward()
        assert [other is not None and other.grad is not None for other in inputs] == [k == needed for k in range(4)]
        value.grad = None
        value.requires_grad_(False)


def test_an_addition_in_place_may_follow_where_no_activation_does(generator: Generator) -> None:
    x = torch.randn(4, 3, generator=generator, requires_grad=True)
    upstream = torch.randn(4, 3, generator=generator)
    gradients = [torch.autograd.grad(op(x, negative_slope=1.0).add_(1), x, upstream) for op in (batch_norm, reference)]
    torch.testing.assert_close(*gradients)


def test_a_second_derivative_raises_plainly(generator: Generator) -> None:
    x = torch.randn(4, 3, generator=generator, requires_grad=True)
    (gradient,) = torch.autograd.grad(batch_norm(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        gradient.sum().backward()


ONES = torch.ones(3, 2)


@pytest.mark.parametrize(
    ("x", "options", "error", "words"),
    [
        (torch.ones(3, 2, dtype=torch.int64), {}, TypeError, "features are torch.int64; convert"),
        (ONES, {"weight": torch.ones(2, device="meta")}, ValueError, "weight has shape .* on meta.*on cpu"),
        (torch.ones(3), {}, ValueError, r"shape is \(3,\)"),
        (torch.ones(1, 2), {}, ValueError, "there is no variance"),
        (ONES, {"residual": torch.ones(3, 1)}, ValueError, r"residual is \(3, 1\)"),
        (ONES, {"running_mean": torch.ones(2)}, ValueError, "Only one of running_mean and running_variance"),
        (ONES, {"weight": torch.ones(3)}, ValueError, r"weight has shape \(3,\).*must be \(2,\)"),
        (ONES, {"bias": torch.ones(2).double()}, TypeError, "bias is torch.float64"),
        (ONES, {"weight": torch.ones(4)[::2]}, ValueError, r"weight has stride \(2,\)"),
        (ONES, {"momentum": 1.5}, ValueError, "momentum is 1.5"),
        (ONES, {"negative_slope": -0.5}, ValueError, "negative_slope is -0.5"),
        (ONES, {"epsilon": 0.0}, ValueError, "epsilon is 0.0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_calls_are_refused(x: Tensor, options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        batch_norm(x, **options)


def test_is_what_the_module_computes(generator: Generator) -> None:
    x = channels_last(torch.randn(6, 5, 4, 4, generator=generator))
    norms = [nn.BatchNorm2d(5) for _ in range(2)]
    y = norms[0](x)
    other = norms[1]
    torch.testing.assert_close(batch_norm(x, other.running_mean, other.running_var, other.weight, other.bias), y)
    torch.testing.assert_close(other.running_var, norms[0].running_var)
