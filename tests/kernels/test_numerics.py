"""Values and gradients against the equation in float64."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Generator, Tensor

from dfad_kernels.checks import REDUCTIONS
from dfad_kernels.registration import compute_dtype, instruction_sets
from dfad_kernels.testing import CASES, LOSS_TOLERANCE, TOLERANCE, OpCase, Settings, relative_error
from tests.kernels import implementations
from tests.kernels.implementations import CPU_IMPLEMENTATIONS, Implementation
from tests.kernels.tables import document

DTYPES = list(TOLERANCE)
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
each_choice_of_gradients = pytest.mark.parametrize(
    "case",
    [
        *CASES,
        *(replace(case, gradients=(name,)) for case in CASES if len(case.gradients) > 1 for name in case.gradients),
    ],
    ids=lambda case: f"{case.name}-{'-'.join(case.gradients)}",
)
each_implementation = pytest.mark.parametrize("implementation", CPU_IMPLEMENTATIONS)


def exact(case: OpCase, pair: Any, options: Settings, upstream: Tensor) -> implementations.Result:
    """The equation in float64 on the same numbers as the implementation."""
    wide = {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in options.items()
    }
    if "mixing_coefficient" in wide:
        # a number becomes a float32 tensor unless the logits are float64
        coefficient = torch.as_tensor(
            options["mixing_coefficient"], dtype=compute_dtype(pair[0]), device=pair[0].device
        )
        wide["mixing_coefficient"] = coefficient.double()
    return implementations.reference(case, [x.double() for x in pair], wide, lambda _: upstream.double())


def test_the_equation_is_computed_where_the_pair_is() -> None:
    case = next(case for case in CASES if case.name == "interpolated_kl_div")
    pair = [torch.zeros(4, 3, device="meta") for _ in range(2)]
    upstream = torch.ones((), device="meta")
    loss, gradients = exact(case, pair, {"mixing_coefficient": 0.3, "reduction": "mean"}, upstream)
    assert {x.device.type for x in (loss, *gradients)} == {"meta"}


REFERENCE_TOLERANCE = 2e-5
"""Tolerance for PyTorch's softmax and logarithm in float32; the fused kernels reach 1e-6."""


def is_interpreted(implementation: Implementation) -> bool:
    return implementation is implementations.interpreted_triton


def gradient_tolerance(dtype: torch.dtype, implementation: Implementation) -> float:
    if implementation is implementations.reference and dtype != torch.float64:
        return max(TOLERANCE[dtype], REFERENCE_TOLERANCE)
    if dtype == torch.bfloat16 and is_interpreted(implementation):
        return 2 * TOLERANCE[dtype]  # the interpreter cuts bfloat16 off where a GPU rounds
    return TOLERANCE[dtype]


def check(
    implementation: Implementation, case: OpCase, pair: Any, options: Settings, generator: Generator
) -> tuple[float, float]:
    """Errors of loss and gradients, after asserting that they are small and that dtypes and layouts are right."""
    student = pair[0]
    kept: list[Tensor] = []

    def upstream(loss: Tensor) -> Tensor:
        kept.append(case.upstream_like(loss, student, options["reduction"], generator))
        return kept[0]

    loss, gradients = implementation(case, pair, options, upstream)
    exact_loss, exact_gradients = exact(case, pair, options, kept[0])
    assert loss.dtype == compute_dtype(student)
    assert loss.shape == exact_loss.shape
    loss_error = relative_error(loss, exact_loss, floor=_floor(case, options, 1.0, student, power=2))
    loss_tolerance = LOSS_TOLERANCE[student.dtype]
    if implementation is implementations.reference and student.dtype != torch.float64:
        loss_tolerance = REFERENCE_TOLERANCE
    assert loss_error <= loss_tolerance
    floor = _floor(case, options, float(kept[0].abs().max()), student)
    gradient_error = 0.0
    for gradient, wanted, source in zip(gradients, exact_gradients, pair, strict=False):
        assert gradient.dtype == source.dtype
        assert gradient.shape == source.shape
        gradient_error = max(gradient_error, relative_error(gradient, wanted, floor))
    assert gradient_error <= gradient_tolerance(student.dtype, implementation)
    return loss_error, gradient_error


def _floor(case: OpCase, options: Settings, upstream: float, student: Tensor, power: int = 1) -> float:
    divisor = {"mean": student.numel(), "batchmean": student.shape[0]}.get(options["reduction"], 1)
    unit = case.unit(**{name: value for name, value in options.items() if name != "reduction"})
    return float(unit**power * upstream / divisor)


@each_implementation
@each_dtype
@each_choice_of_gradients
def test_matches_the_equation(case: OpCase, dtype: torch.dtype, implementation: Implementation) -> None:
    generator = Generator().manual_seed(1)
    pairs = itertools.product(case.shapes, REDUCTIONS)
    if is_interpreted(implementation):
        # reductions differ only in a factor that all kernels get, and interpreting them is slow
        pairs = zip(case.shapes, itertools.cycle(("none", "mean")), strict=False)
    for shape, reduction in pairs:
        for options in case.settings(shape[0], generator):
            check(
                implementation, case, case.pair(shape, dtype, generator), {**options, "reduction": reduction}, generator
            )


@pytest.mark.parametrize("level", instruction_sets())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each_choice_of_gradients
def test_gradients_too_large_for_a_cache(case: OpCase, dtype: torch.dtype, level: str, generator: Generator) -> None:
    """Large gradients are written past the cache."""
    rows = 2 * 4 // dtype.itemsize
    for shape in ((rows, 21, 224, 256), (550 * rows, 2048)):
        options = {**case.settings(shape[0], generator)[0], "reduction": "mean"}
        check(implementations.kernels(f"cpp.{level}"), case, case.pair(shape, dtype, generator), options, generator)


def _contiguous(x: Tensor) -> Tensor:
    return x


def _channels_last(x: Tensor) -> Tensor:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.contiguous(memory_format=formats[x.ndim]) if x.ndim in formats else x


def _slice(x: Tensor) -> Tensor:
    padded = x.new_full([n + 2 for n in x.shape], float("nan"))
    inner = padded[tuple(slice(1, n + 1) for n in x.shape)]
    inner.copy_(x)
    return inner


def _transposed(x: Tensor) -> Tensor:
    return x.transpose(0, -1).contiguous().transpose(0, -1)


def _unaligned(x: Tensor) -> Tensor:
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


def _expanded(x: Tensor) -> Tensor:
    return x[:1].expand(x.shape)


LAYOUTS = {
    layout.__name__.strip("_"): layout
    for layout in (_contiguous, _channels_last, _slice, _transposed, _unaligned, _expanded)
}


@each_implementation
@pytest.mark.parametrize("layouts", list(itertools.product(LAYOUTS, LAYOUTS)), ids="-".join)
@each_case
def test_any_layout(
    case: OpCase, layouts: tuple[str, str], implementation: Implementation, generator: Generator
) -> None:
    for shape in ((3, 4, 5, 2), (2, 3, 2, 2, 3)):
        pair = [LAYOUTS[name](x) for name, x in zip(layouts, case.pair(shape, torch.float32, generator), strict=True)]
        for reduction in ("sum", "none"):
            options = {**case.settings(shape[0], generator)[-1], "reduction": reduction}
            check(implementation, case, pair, options, generator)


@each_case
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_gradient_has_its_inputs_memory_format(case: OpCase, layout: str, generator: Generator) -> None:
    student, teacher = case.pair((3, 4, 5, 2), torch.float32, generator)
    pair = [_channels_last(student), LAYOUTS[layout](teacher)]
    for reduction in ("sum", "none"):
        options = {**case.settings(3, generator)[0], "reduction": reduction}
        _, gradients = implementations.operator(case, pair, options, torch.ones_like)
        for gradient, source in zip(gradients, pair, strict=False):
            assert gradient.stride() == source.stride()


@each_implementation
@each_case
def test_an_incoming_gradient_may_be_expanded(
    case: OpCase, implementation: Implementation, generator: Generator
) -> None:
    pair = case.pair((4, 3, 5), torch.float32, generator)
    options = {**case.settings(4, generator)[-1], "reduction": "none"}
    kept = torch.randn(4, 1, 1, generator=generator)
    _, gradients = implementation(case, pair, options, lambda loss: kept.expand(loss.shape))
    _, wanted = exact(case, pair, options, kept.expand(4, 3, 5))
    for gradient, expected in zip(gradients, wanted, strict=True):
        assert relative_error(gradient, expected) <= 1e-6


@each_implementation
@each_case
def test_no_samples(case: OpCase, implementation: Implementation, generator: Generator) -> None:
    for shape in ((0, 3), (0, 3, 2, 2), (3, 4, 0)):
        pair = case.pair(shape, torch.float32, generator)
        for reduction in REDUCTIONS:
            options = {**case.settings(shape[0], generator)[-1], "reduction": reduction}
            loss, gradients = implementation(case, pair, options, torch.ones_like)
            torch.testing.assert_close(loss, case.op.reference(*pair, **options), equal_nan=True)
            assert all(gradient.shape == shape for gradient in gradients)


@st.composite
def calls(draw: st.DrawFn, case: OpCase, largest: int) -> tuple[Any, Settings, Generator]:
    generator = Generator().manual_seed(draw(st.integers(0, 2**31)))
    shape = tuple(draw(st.lists(st.integers(1, largest), min_size=2, max_size=4)))
    dtype = draw(st.sampled_from(DTYPES))
    layouts = draw(st.tuples(*[st.sampled_from(list(LAYOUTS))] * 2))
    pair = [LAYOUTS[name](x) for name, x in zip(layouts, case.pair(shape, dtype, generator), strict=True)]
    options = draw(st.sampled_from(case.settings(shape[0], generator)))
    if "temperature" in options:
        options = {**options, "temperature": draw(st.floats(0.5, 20.0))}
    if "margin" in options:
        options = {**options, "margin": draw(st.floats(0.01, 10.0))}
    return pair, {**options, "reduction": draw(st.sampled_from(REDUCTIONS))}, generator


@each_case
def test_whatever_the_call(case: OpCase) -> None:
    @settings(max_examples=1200, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
    @given(calls(case, 20))
    def test(call: tuple[Any, Settings, Generator]) -> None:
        pair, options, generator = call
        check(implementations.operator, case, pair, options, generator)

    test()


@implementations.interpreted
@each_case
def test_whatever_the_call_to_interpreted_kernels(case: OpCase) -> None:
    @settings(max_examples=50, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
    @given(calls(case, 6))
    def test(call: tuple[Any, Settings, Generator]) -> None:
        pair, options, generator = call
        check(implementations.interpreted_triton, case, pair, options, generator)

    test()


def test_the_documented_errors() -> None:
    """Errors of the kernels on fixed samples, as in the documentation."""
    rows = []
    for case, dtype in itertools.product(CASES, DTYPES):
        row = [case.name, str(dtype).removeprefix("torch."), f"{TOLERANCE[dtype]:.0e}"]
        for implementation in (implementations.reference, implementations.operator):
            generator = Generator().manual_seed(2)
            errors = []
            for shape in ((64, 10), (32, 100), (4, 21, 16, 16)):
                for options in case.settings(shape[0], generator):
                    pair = case.pair(shape, dtype, generator)
                    errors.append(check(implementation, case, pair, {**options, "reduction": "sum"}, generator))
            row += [f"{max(column):.1e}" for column in zip(*errors, strict=True)]
        rows.append(row)
    document(
        "losses.md",
        "numerics",
        ["operator", "dtype", "bound of the gradient", "reference: loss", "gradient", "C++ kernels: loss", "gradient"],
        rows,
    )
