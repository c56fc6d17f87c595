"""What follows a convolution in a frozen network: numbers against the equation in float64."""

import itertools
import sys
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, library, nn

from dfad_kernels import frozen_batch_norm
from dfad_kernels.features import channels_last
from dfad_kernels.frozen_batch_norm import reference
from dfad_kernels.registration import compute_dtype
from dfad_kernels.testing import TOLERANCE, relative_error
from tests.kernels.implementations import FEATURE_KERNELS, interpreted
from tests.kernels.memory import guarded
from tests.waiting import NoWaiting

SHAPES = [(4, 3), (1, 1), (2, 1, 1, 1), (3, 1, 5, 5), (5, 3, 7), (2, 16, 4, 4), (2, 65, 9, 7), (2, 2049, 2, 2)]
each_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))
each_kernels = pytest.mark.parametrize("kernels", FEATURE_KERNELS)


@dataclass(frozen=True)
class Variant:
    """Which optional parts there are."""

    normalises: bool
    scales: bool
    shifts: bool
    adds: bool
    slope: float

    def __str__(self) -> str:
        names = ("normalises", "scales", "shifts", "adds")
        return " ".join([name for name in names if getattr(self, name)] + [str(self.slope)])


VARIANTS = [Variant(*choice) for choice in itertools.product(*[(False, True)] * 4, (1.0, 0.0, 0.2))]


@dataclass(frozen=True)
class Inputs:
    """Tensors of a call."""

    x: Tensor
    of_channels: dict[str, Tensor]
    residual: Tensor | None
    slope: float

    def to(self, *where: Any) -> "Inputs":
        """A copy in the same layout."""
        residual = None if self.residual is None else self.residual.to(*where)
        of_channels = {name: value.to(*where) for name, value in self.of_channels.items()}
        return Inputs(self.x.to(*where), of_channels, residual, self.slope)


def inputs_of(shape: tuple[int, ...], variant: Variant, dtype: torch.dtype, generator: Generator) -> Inputs:
    x, residual = (channels_last(torch.randn(shape, generator=generator, dtype=torch.float64)) for _ in range(2))
    mean, weight, bias = torch.randn(3, shape[1], generator=generator, dtype=torch.float64)
    variance = torch.rand(shape[1], generator=generator, dtype=torch.float64) + 0.25
    given = {
        **({"mean": mean, "variance": variance} if variant.normalises else {}),
        **({"weight": weight} if variant.scales else {}),
        **({"bias": bias} if variant.shifts else {}),
    }
    of_channels = {name: value.to(compute_dtype(x.to(dtype))) for name, value in given.items()}
    return Inputs(x.to(dtype), of_channels, residual.to(dtype) if variant.adds else None, variant.slope)


def differentiate(op: Any, inputs: Inputs, upstream: Tensor, **options: Any) -> tuple[Tensor, list[Tensor]]:
    leaves = [value.detach().requires_grad_() for value in (inputs.x, inputs.residual) if value is not None]
    residual = leaves[1] if len(leaves) > 1 else None
    y = op(leaves[0], **inputs.of_channels, residual=residual, negative_slope=inputs.slope, **options)
    return y.detach(), list(torch.autograd.grad(y, leaves, upstream))


def check(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    variant: Variant,
    kernels: str | None,
    generator: Generator,
    device: str = "cpu",
) -> None:
    inputs = inputs_of(shape, variant, dtype, generator).to(device)
    upstream = torch.randn(shape, generator=generator).to(device, dtype)
    y, gradients = differentiate(frozen_batch_norm, inputs, upstream, kernels=kernels)
    exact, _ = differentiate(reference, inputs.to(torch.float64), upstream.double())
    tolerance = 4 * TOLERANCE[dtype]
    if kernels == "triton" and dtype == torch.bfloat16:
        tolerance *= 2  # the interpreter cuts bfloat16 off where a GPU rounds
    assert y.dtype == dtype
    assert y.stride() == inputs.x.stride()
    assert relative_error(y, exact, 1.0) <= tolerance
    # rounding may choose another side of zero; from there on the gradients are compared
    passed = torch.where(y > 0, upstream.double(), variant.slope * upstream.double())
    linear = Inputs(inputs.x, inputs.of_channels, inputs.residual, 1.0).to(torch.float64)
    _, exact_gradients = differentiate(reference, linear, passed)
    for gradient, expected in zip(gradients, exact_gradients, strict=True):
        assert gradient.dtype == dtype
        assert relative_error(gradient, expected) <= tolerance


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@each_dtype
@each_kernels
def test_matches_the_equation(
    shape: tuple[int, ...], dtype: torch.dtype, kernels: str | None, generator: Generator
) -> None:
    interpreted_slowly = kernels == "triton" and torch.Size(shape).numel() > 1000
    # every fifth: each part with and without each of the others
    for variant in VARIANTS[-2:-1] if interpreted_slowly else VARIANTS if kernels is None else VARIANTS[::5]:
        check(shape, dtype, variant, kernels, generator)


def test_gradcheck(generator: Generator) -> None:
    for variant in VARIANTS:
        inputs = inputs_of((3, 2, 3, 2), variant, torch.float64, generator)

        def op(x: Tensor, residual: Tensor | None = None, given: Inputs = inputs) -> Tensor:
            return frozen_batch_norm(x, **given.of_channels, residual=residual, negative_slope=given.slope)

        leaves = [value.requires_grad_() for value in (inputs.x, inputs.residual) if value is not None]
        assert torch.autograd.gradcheck(op, leaves)


@each_kernels
def test_other_layouts_and_expanded_gradients_are_taken_too(kernels: str | None, generator: Generator) -> None:
    inputs = inputs_of((4, 6, 5, 7), VARIANTS[-1], torch.float32, generator)
    assert inputs.residual is not None
    sliced = torch.cat([inputs.residual, inputs.residual], dim=1)[:, :6]
    other = Inputs(inputs.x.contiguous(), inputs.of_channels, sliced, inputs.slope)
    expected = differentiate(frozen_batch_norm, inputs, torch.ones(4, 6, 5, 7), kernels=kernels)
    found = differentiate(frozen_batch_norm, other, torch.ones(()).expand(4, 6, 5, 7), kernels=kernels)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.skipif(sys.platform != "linux", reason="protects pages as Linux does")
@each_kernels
@each_dtype
def test_nothing_past_a_tensor_is_touched(kernels: str | None, dtype: torch.dtype, generator: Generator) -> None:
    variants = VARIANTS[-2:] if kernels == "triton" else VARIANTS[::5]
    for shape, variant in itertools.product([(5, 3), (7, 16), (3, 21), (300, 37), (9, 130)], variants):
        given = inputs_of(shape, variant, dtype, generator)
        of_channels = {name: guarded(value) for name, value in given.of_channels.items()}
        residual = None if given.residual is None else guarded(given.residual)
        inputs = Inputs(guarded(given.x), of_channels, residual, given.slope)
        upstream = guarded(torch.randn(shape, generator=generator).to(dtype))
        y, gradients = differentiate(frozen_batch_norm, inputs, upstream, kernels=kernels)
        assert all(value.isfinite().all() for value in (y, *gradients))


@interpreted
def test_triton_neither_waits_nor_writes_inputs(generator: Generator) -> None:
    inputs = inputs_of((4, 6, 5, 7), VARIANTS[-1], torch.bfloat16, generator)
    assert inputs.residual is not None
    before = inputs.x.clone(), inputs.residual.clone()
    with NoWaiting():
        differentiate(frozen_batch_norm, inputs, torch.ones(4, 6, 5, 7).bfloat16(), kernels="triton")
    torch.testing.assert_close((inputs.x, inputs.residual), before, rtol=0, atol=0)


def test_only_what_is_needed_is_given(generator: Generator) -> None:
    for variant in VARIANTS:
        inputs = inputs_of((4, 6, 5, 5), variant, torch.float32, generator)
        leaves = [inputs.x, inputs.residual] if inputs.residual is not None else [inputs.x]
        for leaf in leaves:
            leaf.requires_grad_()
            y = frozen_batch_norm(
                inputs.x, **inputs.of_channels, residual=inputs.residual, negative_slope=variant.slope
            )
            y.sum().backward()
            assert [other.grad is not None for other in leaves] == [other is leaf for other in leaves]
            leaf.grad = None
            leaf.requires_grad_(False)


def test_an_operation_in_place_may_follow_where_no_activation_does(generator: Generator) -> None:
    x = torch.randn(4, 3, generator=generator, requires_grad=True)
    gradients = [
        torch.autograd.grad(op(x, bias=torch.ones(3)).relu_().square().sum(), x)
        for op in (frozen_batch_norm, reference)
    ]
    torch.testing.assert_close(*gradients)


def test_opcheck(generator: Generator) -> None:
    inputs = inputs_of((4, 3, 2, 5), VARIANTS[-1], torch.float32, generator)
    forward, backward = torch.ops.dfad_kernels.frozen_batch_norm, torch.ops.dfad_kernels.frozen_batch_norm_backward
    of_channels = inputs.of_channels
    library.opcheck(forward.default, (inputs.x, *of_channels.values(), inputs.residual, 1e-5, 0.2))
    for passes_on, y in ((True, inputs.x), (False, None)):
        arguments = inputs.x, passes_on, y, of_channels["variance"], of_channels["weight"], 1e-5, 0.2
        library.opcheck(backward.default, arguments)


def test_compiles_into_one_graph(generator: Generator) -> None:
    torch.compiler.reset()
    inputs = inputs_of((4, 3, 2, 5), VARIANTS[-1], torch.float32, generator)
    upstream = torch.ones(4, 3, 2, 5)
    compiled = torch.compile(frozen_batch_norm, fullgraph=True, backend="aot_eager")
    found, expected = (differentiate(op, inputs, upstream) for op in (compiled, frozen_batch_norm))
    torch.testing.assert_close(found, expected)


def test_is_what_the_module_computes(generator: Generator) -> None:
    x = channels_last(torch.randn(6, 5, 4, 4, generator=generator))
    norm = nn.BatchNorm2d(5)
    norm(x)
    norm.eval().requires_grad_(False)
    y = frozen_batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias)
    torch.testing.assert_close(y, norm(x))


ONES, NUMBERS = torch.ones(3, 2), torch.ones(2)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"mean": NUMBERS}, ValueError, "Only one of mean and variance"),
        ({"weight": torch.ones(3)}, ValueError, r"weight has shape \(3,\).*must be \(2,\)"),
        ({"bias": NUMBERS.double()}, TypeError, "bias is torch.float64"),
        ({"bias": NUMBERS.clone().requires_grad_()}, ValueError, "bias requires a gradient.*detach"),
        ({"residual": torch.ones(3, 1)}, ValueError, r"residual is \(3, 1\)"),
        ({"negative_slope": -0.5}, ValueError, "negative_slope is -0.5"),
        ({"epsilon": 0.0}, ValueError, "epsilon is 0.0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_calls_are_refused(options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        frozen_batch_norm(ONES, **options)
