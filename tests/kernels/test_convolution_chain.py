"""Chains of convolutions: numbers against the equation in float64, and further guarantees."""

import itertools
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from dfad_kernels.cpu.convolution_chain import (
    TILES,
    ConvolutionChain,
    Layer,
    Link,
    Misfit,
    instruction_sets,
    unavailable,
)
from tests.conftest import threads
from tests.kernels.memory import guarded

SHAPES = [
    # batch, in, out, height, width
    (9, 3, 16, 2, 1),
    (3, 1, 16, 5, 7),
    (1, 16, 16, 4, 4),
    (5, 16, 32, 9, 2),
    (2, 32, 16, 3, 33),
    (7, 32, 64, 6, 6),
    (40, 64, 32, 3, 3),
    (3, 5, 96, 17, 16),
]
"""Images that fill a chunk, a part of one, and several; channels that are padded, and odd sizes."""

VARIANTS = [
    Link(0, negative_slope=0.0),
    Link(0, negative_slope=0.2, stride=2),
    Link(0, residual=1, negative_slope=0.0, keeps_pre=True),
    Link(0, residual=1, negative_slope=0.2),
    Link(0, keeps_pre=True, keeps_post=False),
    Link(0, residual=1, stride=2, keeps_pre=True, keeps_post=False),
]
EVERY_VARIANT = [*VARIANTS, *(replace(link, normalises=False) for link in VARIANTS)]
each_variant = pytest.mark.parametrize("link", EVERY_VARIANT, ids=str)
each_level = pytest.mark.parametrize("level", instruction_sets())


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def layer_of(link: Link, channels: int, out: int, generator: Generator) -> Layer:
    kernel = torch.randn(out, channels, 3, 3, generator=generator) / (3 * channels**0.5)
    kernel = channels_last(kernel.bfloat16().float())  # exact in bfloat16, so that rounding it is no error
    bias = torch.randn(out, generator=generator)
    if not link.normalises:
        return Layer(kernel, bias=bias)
    return Layer(kernel, torch.rand(out, generator=generator) + 0.5, bias)


def inputs_of(shape: Sequence[int], link: Link, generator: Generator) -> list[Tensor]:
    batch, channels, out, height, width = shape
    result = batch, out, -(-height // link.stride), -(-width // link.stride)
    shapes = [(batch, channels, height, width)] if link.residual is None else [(batch, channels, height, width), result]
    return [channels_last(torch.randn(size, generator=generator).bfloat16()) for size in shapes]


def chain_of(*links: Link, inputs: int = 1, outputs: Sequence[int] = ()) -> ConvolutionChain:
    """A chain whose outputs are the kept values of the last link, unless others are given."""
    last = inputs + 2 * (len(links) - 1)
    kept = [last + i for i, keeps in enumerate((links[-1].keeps_pre, links[-1].keeps_post)) if keeps]
    return ConvolutionChain(links, inputs, outputs or kept)


def leaves_of(layers: Sequence[Layer], inputs: Sequence[Tensor]) -> list[Tensor]:
    parameters = (tensor for layer in layers for tensor in layer[:3] if tensor is not None)
    return [*inputs, *(tensor for tensor in parameters if tensor.requires_grad)]


def differentiate(
    compute: Any, links: Sequence[Link], layers: Sequence[Layer], inputs: Sequence[Tensor], seed: int = 1
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs, and gradients of all inputs and parameters, always for the same incoming gradients."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    layers = [
        Layer(*(t if t is None else t.detach().requires_grad_(link.normalises) for t in layer[:3]), *layer[3:])
        for link, layer in zip(links, layers, strict=True)
    ]
    outputs = list(compute(layers, inputs))
    generator = torch.Generator().manual_seed(seed)
    upstream = [channels_last(torch.randn(y.shape, generator=generator).bfloat16()).to(y.dtype) for y in outputs]
    gradients = torch.autograd.grad(outputs, leaves_of(layers, inputs), upstream, allow_unused=True)
    return [y.detach() for y in outputs], [g for g in gradients if g is not None]


def double(layers: Sequence[Layer], inputs: Sequence[Tensor]) -> tuple[list[Layer], list[Tensor]]:
    wide = [Layer(*(t if t is None else t.double() for t in layer[:5]), *layer[5:]) for layer in layers]
    return wide, [x.double() for x in inputs]


def assert_near(found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> None:
    assert len(found) == len(expected)
    for actual, exact in zip(found, expected, strict=True):
        assert actual.shape == exact.shape
        error = (actual.double() - exact).norm() / exact.norm().clamp_min(1e-6)
        assert error <= tolerance, (tuple(exact.shape), error)


@each_level
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@each_variant
def test_a_link_matches_the_equation(shape: tuple[int, ...], link: Link, level: str, generator: Generator) -> None:
    inputs = inputs_of(shape, link, generator)
    layers = [layer_of(link, *shape[1:3], generator)]
    chain = chain_of(link, inputs=len(inputs))
    found = differentiate(lambda *a: chain(*a, instruction_set=level), [link], layers, inputs)
    expected = differentiate(lambda *a: chain.reference(*a), [link], *double(layers, inputs))
    for actual, exact, tolerance in zip(found, expected, (2**-8, 2**-6.5), strict=True):
        assert_near(actual, exact, tolerance)
    assert {y.dtype for y in found[0]} == {torch.bfloat16}
    assert all(y.is_contiguous(memory_format=torch.channels_last) for y in found[0])
    assert [g.dtype for g in found[1]] == [t.dtype for t in leaves_of(layers, inputs)[: len(inputs)]] + [
        torch.float32
    ] * (3 * link.normalises)


RESIDUAL_NETWORK = [
    Link(0),  # 2: unwritten
    Link(2, residual=0, keeps_pre=True),  # 3 pre, 4 post
    Link(4, negative_slope=0.2),  # 6: unwritten
    Link(6, residual=4),  # 8
    Link(8, keeps_pre=True, keeps_post=False),  # 9
]


def network_of(normalises: bool, generator: Generator) -> tuple[ConvolutionChain, list[Layer], list[Tensor]]:
    """A chain with values that have no, one or several readers, inside and outside."""
    links = [replace(link, normalises=normalises) for link in RESIDUAL_NETWORK]
    layers = [layer_of(link, 16, 16, generator) for link in links]
    inputs = [channels_last(torch.randn(6, 16, 7, 5, generator=generator).bfloat16())]
    return ConvolutionChain(links, 1, [3, 8, 9]), layers, inputs


@each_level
@pytest.mark.parametrize("normalises", [True, False])
def test_a_chain_is_its_links(normalises: bool, level: str, generator: Generator) -> None:
    chain, layers, inputs = network_of(normalises, generator)
    assert chain.unwritten == [normalises, False, normalises, False, False]

    def one_by_one(layers: Sequence[Layer], inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        def compute(number: int, x: Tensor, residual: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
            link = chain.links[number]
            operands = [x] if residual is None else [x, residual]
            alone = replace(link, source=0, residual=None if residual is None else 1)
            given = iter(chain_of(alone, inputs=len(operands))([layers[number]], operands, instruction_set=level))
            pre, post = (next(given) if keeps else None for keeps in (link.keeps_pre, link.keeps_post))
            return pre, post

        return chain.link_by_link(inputs, compute)

    found = differentiate(lambda *a: chain(*a, instruction_set=level), chain.links, layers, inputs)
    expected = differentiate(one_by_one, chain.links, layers, inputs)
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=0)
    # where gradients meet, a chain does not round their sum
    assert_near(found[1], [g.double() for g in expected[1]], 2**-6)
    exact = differentiate(lambda *a: chain.reference(*a), chain.links, *double(layers, inputs))
    assert_near(found[0], exact[0], 2**-6)
    # each layer's rounding decides on which side of an activation a few values are
    assert_near(found[1], exact[1], 0.1)


@pytest.mark.parametrize("normalises", [True, False])
def test_what_is_let_go_of_changes_nothing(normalises: bool, generator: Generator) -> None:
    chain, layers, inputs = network_of(normalises, generator)
    kept, _ = differentiate(chain, chain.links, layers, inputs)
    with torch.no_grad():
        torch.testing.assert_close(list(chain(layers, inputs)), kept, rtol=0, atol=0)


@pytest.mark.skipif(unavailable() is not None, reason=f"the processor has no {TILES}")
@each_variant
def test_tiles_compute_what_loops_compute(link: Link, generator: Generator) -> None:
    shape = (9, 32, 32, 8, 8)
    inputs, layers = inputs_of(shape, link, generator), [layer_of(link, 32, 32, generator)]
    chain = chain_of(link, inputs=len(inputs))
    results = [
        differentiate(lambda *a, level=level: chain(*a, instruction_set=level), [link], layers, inputs)
        for level in (TILES, "baseline")
    ]
    for found, expected in zip(*results, strict=True):
        assert_near(found, [t.double() for t in expected], 2**-9)


@each_level
def test_running_statistics_move_as_pytorch_moves_them(level: str, generator: Generator) -> None:
    link = Link(0)
    (x,), layer = inputs_of((4, 16, 16, 5, 5), link, generator), layer_of(link, 16, 16, generator)
    moved, expected = ([torch.full((16,), 0.7), torch.full((16,), 1.3)] for _ in range(2))
    y = F.conv2d(x.float(), layer.kernel, padding=1).bfloat16().float()
    for _ in range(3):
        chain_of(link)([Layer(*layer[:3], *moved, momentum=0.3)], [x], instruction_set=level)
        F.batch_norm(y, *expected, training=True, momentum=0.3)
    torch.testing.assert_close(moved, expected, rtol=2e-3, atol=1e-4)
    assert not torch.equal(moved[0], torch.full((16,), 0.7))


def test_a_mean_that_dwarfs_the_deviation_costs_no_variance(generator: Generator) -> None:
    x = torch.randn(8, 16, 16, 16, generator=generator).bfloat16() / 8 + 30
    x = channels_last(x.bfloat16())
    identity = torch.zeros(16, 16, 3, 3)
    identity[torch.arange(16), torch.arange(16), 1, 1] = 1
    mean, variance = torch.zeros(16), torch.zeros(16)
    layer = Layer(channels_last(identity), running_mean=mean, running_variance=variance, momentum=1.0)
    chain_of(Link(0))([layer], [x])
    torch.testing.assert_close(variance, x.double().var((0, 2, 3)).float(), rtol=1e-5, atol=0)
    torch.testing.assert_close(mean, x.double().mean((0, 2, 3)).float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("normalises", [True, False])
def test_neither_runs_nor_threads_change_a_bit_nor_inputs(normalises: bool, generator: Generator) -> None:
    links = [Link(0, normalises=normalises), Link(2, residual=0, keeps_pre=True, normalises=normalises)]
    layers = [layer_of(link, 32, 32, generator) for link in links]
    inputs = [channels_last(torch.randn(33, 32, 16, 16, generator=generator).bfloat16())]
    before = [x.clone() for x in inputs]
    results = []
    for number in (1, 2, 5, 5):
        with threads(number):
            results.append(differentiate(chain_of(*links), links, layers, inputs))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=0, atol=0)
    torch.testing.assert_close(inputs, before, rtol=0, atol=0)


def test_another_default_dtype_changes_nothing(generator: Generator) -> None:
    inputs, layers = inputs_of((4, 16, 16, 5, 7), VARIANTS[0], generator), [layer_of(VARIANTS[0], 16, 16, generator)]
    (expected,), _ = differentiate(chain_of(VARIANTS[0]), VARIANTS[:1], layers, inputs)
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        x = inputs[0].detach().requires_grad_()
        (y,) = chain_of(VARIANTS[0])(layers, [x])
        y.float().sum().backward()
    finally:
        torch.set_default_dtype(default)
    torch.testing.assert_close(y.detach(), expected, rtol=0, atol=0)
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_other_layouts_are_taken_too(generator: Generator) -> None:
    link = VARIANTS[2]
    inputs, layers = inputs_of((4, 16, 16, 5, 7), link, generator), [layer_of(link, 16, 16, generator)]
    chain = chain_of(link, inputs=2)
    expected = differentiate(chain, [link], layers, inputs)
    other = [x.contiguous(memory_format=torch.contiguous_format) for x in inputs]
    torch.testing.assert_close(differentiate(chain, [link], layers, other), expected, rtol=0, atol=0)
    x = inputs[0].clone().requires_grad_()
    pre, post = chain(layers, [x, inputs[1]])
    (one,) = torch.autograd.grad(post.sum() + pre.sum(), x, retain_graph=True)  # an expanded gradient
    (other_one,) = torch.autograd.grad([pre, post], x, [torch.ones_like(pre), torch.ones_like(post)])
    torch.testing.assert_close(one, other_one, rtol=0, atol=0)


@pytest.mark.skipif(sys.platform != "linux", reason="protects pages as Linux does")
@each_level
@each_variant
def test_nothing_past_a_tensor_is_touched(link: Link, level: str, generator: Generator) -> None:
    for shape in SHAPES[1:]:
        inputs = [guarded(x) for x in inputs_of(shape, link, generator)]
        layer = layer_of(link, *shape[1:3], generator)
        layer = Layer(*(t if t is None else guarded(t) for t in layer[:3]))
        chain = chain_of(link, inputs=len(inputs))
        y, gradients = differentiate(lambda *a, c=chain: c(*a, instruction_set=level), [link], [layer], inputs)
        assert all(value.isfinite().all() for value in (*y, *gradients))


@pytest.mark.parametrize(("channels", "reach"), [(16, 4), (32, 3)])  # two taps of 16 channels share a tile
def test_nan_stays_in_its_image_and_neighbourhood(channels: int, reach: int, generator: Generator) -> None:
    link = Link(0, keeps_pre=True, keeps_post=False, normalises=False)
    (x,) = inputs_of((3, channels, 16, 9, 9), link, generator)
    x[1, 3, 4, 4] = torch.nan
    (y,) = chain_of(link)([layer_of(link, channels, 16, generator)], [x])
    assert y[1, :, 3:6, 3:6].isnan().all()
    assert y.isnan().sum() == 3 * reach * 16


def test_only_what_is_needed_is_given(generator: Generator) -> None:
    link = VARIANTS[3]
    inputs, layer = inputs_of((4, 16, 16, 5, 5), link, generator), layer_of(link, 16, 16, generator)
    leaves = [*inputs, *(t for t in layer[:3] if t is not None)]
    for needed in leaves:
        needed.requires_grad_()
        (y,) = chain_of(link, inputs=2)([layer], inputs)
        y.float().sum().backward()
        assert [leaf.grad is not None for leaf in leaves] == [leaf is needed for leaf in leaves]
        needed.requires_grad_(False)
        needed.grad = None


def test_an_output_without_a_gradient_is_left_out(generator: Generator) -> None:
    chain, layers, inputs = network_of(True, generator)
    x = inputs[0].requires_grad_()
    outputs = chain(layers, [x])
    for used, unused in itertools.permutations((0, 1)):
        grads = torch.autograd.grad(outputs[used].float().square().sum(), x, retain_graph=True)
        zero = 0 * outputs[unused].float().sum()
        torch.testing.assert_close(
            grads,
            torch.autograd.grad(outputs[used].float().square().sum() + zero, x, retain_graph=True),
            rtol=0.02,
            atol=0.02,
        )


def test_what_is_before_an_activation_may_be_overwritten(generator: Generator) -> None:
    link = VARIANTS[4]
    (x,), layer = inputs_of((4, 16, 16, 5, 5), link, generator), layer_of(link, 16, 16, generator)
    x.requires_grad_()
    gradients = []
    for activate in (torch.relu, torch.relu_):
        (pre,) = chain_of(link)([layer], [x])
        gradients += torch.autograd.grad(activate(pre).float().square().sum(), x)
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_a_second_derivative_raises_plainly(generator: Generator) -> None:
    (x,) = inputs_of((4, 16, 16, 5, 5), Link(0), generator)
    x.requires_grad_()
    (y,) = chain_of(Link(0))([layer_of(Link(0), 16, 16, generator)], [x])
    (gradient,) = torch.autograd.grad(y.float().square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        gradient.sum().backward()


def test_a_parameter_that_is_exchanged_is_looked_at_again(generator: Generator) -> None:
    (x,), layer = inputs_of((4, 16, 16, 5, 5), Link(0), generator), layer_of(Link(0), 16, 16, generator)
    chain = chain_of(Link(0))
    chain([layer], [x])
    kernel = torch.nn.Parameter(layer.kernel)
    chain([layer._replace(kernel=kernel)], [x])
    kernel.data = kernel.data.double()
    with pytest.raises(Misfit, match=r"kernel of link 0 is \(16, 16, 3, 3\), torch.float64"):
        chain([layer._replace(kernel=kernel)], [x])


X = torch.ones(2, 16, 4, 4, dtype=torch.bfloat16)
KERNEL = channels_last(torch.ones(16, 16, 3, 3))


@pytest.mark.parametrize(
    ("link", "layer", "inputs", "words"),
    [
        (Link(0), Layer(KERNEL), [X.float()], r"input is \(2, 16, 4, 4\), torch.float32"),
        (Link(0), Layer(KERNEL), [X[0]], r"input is \(16, 4, 4\)"),
        (Link(0), Layer(KERNEL), [X.to("meta")], "on meta"),
        (Link(0), Layer(KERNEL), [X[:0]], "and hold something"),
        (Link(0), Layer(KERNEL), [X, X], "2 inputs and 1 layers are given; the chain has 1 inputs"),
        (Link(0), Layer(KERNEL[:, :, :1, :1]), [X], r"kernel of link 0 is \(16, 16, 1, 1\)"),
        (Link(0), Layer(KERNEL.contiguous()), [X], "channels last in memory"),
        (Link(0), Layer(KERNEL.bfloat16()), [X], "torch.bfloat16, on cpu; it must be"),
        (Link(0), Layer(KERNEL.to("meta")), [X], "torch.float32, on meta; it must be"),
        (Link(0), Layer(KERNEL, torch.ones(16, device="meta")), [X], "statistic of link 0 is .* on meta"),
        (Link(0), Layer(channels_last(torch.ones(48, 16, 3, 3))), [X], "out 16 or divisible by 32"),
        (Link(0), Layer(channels_last(torch.ones(16, 8, 3, 3))), [X], "with a kernel for 8 channels"),
        (Link(1), Layer(KERNEL), [X], "convolves a value that does not exist"),
        (Link(0, residual=0, stride=2), Layer(KERNEL), [X], r"adds \(2, 16, 4, 4\) to \(2, 16, 2, 2\)"),
        (Link(0), Layer(KERNEL), [X[:1, :, :1, :1]], "no variance"),
        (Link(0), Layer(KERNEL, torch.ones(8)), [X], r"link 0 is \(8,\), torch.float32"),
        (Link(0), Layer(KERNEL, bias=torch.ones(16).double()), [X], "torch.float64, on cpu; it must be"),
        (Link(0, normalises=False), Layer(KERNEL.clone().requires_grad_()), [X], "nothing of it learns"),
    ],
)
def test_what_does_not_fit_is_refused(link: Link, layer: Layer, inputs: list[Tensor], words: str) -> None:
    with pytest.raises(Misfit, match=words):
        ConvolutionChain([link], 1, [2])([layer], inputs)
