"""The Triton kernels on a GPU."""

import itertools
from typing import Any

import pytest
import torch
from torch import Generator, Tensor

from dfad_kernels import (
    activation_boundary_loss,
    batch_norm,
    interpolated_kl_div,
    kernel_name,
    normalized_squared_error,
)
from dfad_kernels.checks import REDUCTIONS
from dfad_kernels.testing import OpCase, Settings
from tests.kernels import implementations, test_batch_norm, test_batchnorm_distance, test_frozen_batch_norm
from tests.kernels.test_numerics import LAYOUTS, check, each_case, each_dtype

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def on_gpu(values: Any) -> Any:
    """The same on the GPU, in the same layout."""
    if isinstance(values, Tensor):
        moved = torch.empty_strided(values.shape, values.stride(), dtype=values.dtype, device="cuda")
        return moved.copy_(values) if 0 not in values.stride() else values.cuda()
    if isinstance(values, dict):
        return {name: on_gpu(value) for name, value in values.items()}
    return [on_gpu(value) for value in values] if isinstance(values, (list, tuple)) else values


def test_triton_runs_here() -> None:
    assert kernel_name("cuda") == "triton"


@each_dtype
@each_case
def test_matches_the_equation(case: OpCase, dtype: torch.dtype) -> None:
    generator = Generator().manual_seed(1)
    for shape, reduction in itertools.product((*case.shapes, (64, 21, 64, 64)), REDUCTIONS):
        for options in case.settings(shape[0], generator):
            pair = on_gpu(case.pair(shape, dtype, generator))
            check(implementations.operator, case, pair, on_gpu({**options, "reduction": reduction}), generator)


@each_case
def test_any_layout(case: OpCase, generator: Generator) -> None:
    for first, second, shape in itertools.product(LAYOUTS, LAYOUTS, ((3, 4, 5, 2), (2, 3, 2, 2, 3), (2, 32, 16, 16))):
        student, teacher = case.pair(shape, torch.float32, generator)
        pair = on_gpu([LAYOUTS[first](student), LAYOUTS[second](teacher)])
        options: Settings = {**case.settings(shape[0], generator)[-1], "reduction": "none"}
        check(implementations.operator, case, pair, on_gpu(options), generator)


@each_case
def test_nothing_waits_and_two_runs_agree(case: OpCase, generator: Generator) -> None:
    for shape in ((32, 10), (8, 21, 32, 32), (4, 20_000)):
        pair = on_gpu(case.pair(shape, torch.float32, generator))
        for options in on_gpu(case.settings(shape[0], generator)):
            results = []
            for _ in range(2):
                torch.cuda.set_sync_debug_mode("error")
                try:
                    results.append(implementations.operator(case, pair, options, torch.ones_like))
                finally:
                    torch.cuda.set_sync_debug_mode("default")
            (loss, gradients), (again, gradients_again) = results
            assert torch.equal(loss, again)
            assert all(torch.equal(x, y) for x, y in zip(gradients, gradients_again, strict=True))


@each_case
def test_in_a_cuda_graph(case: OpCase, generator: Generator) -> None:
    student, teacher = on_gpu(case.pair((32, 10), torch.float32, generator))
    student.requires_grad_()
    options = on_gpu(case.settings(32, generator)[-1])

    def run() -> tuple[Tensor, Tensor]:
        loss = case.op(student, teacher, **options)
        return loss, torch.autograd.grad(loss, student)[0]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    with torch.no_grad():
        student.copy_(torch.randn_like(student))
    graph.replay()
    for replayed, expected in zip(captured, run(), strict=True):
        assert torch.equal(replayed, expected)


@each_case
def test_compiles_into_one_graph(case: OpCase, generator: Generator) -> None:
    compiled = torch.compile(case.op, fullgraph=True, dynamic=True)
    for samples in (4, 6):
        pair = on_gpu(case.pair((samples, 5), torch.float32, generator))
        options = on_gpu(case.settings(samples, generator)[-1])
        loss, gradients = implementations.differentiate(compiled, case, pair, options, torch.ones_like)
        expected, wanted = implementations.operator(case, pair, options, torch.ones_like)
        torch.testing.assert_close([loss, *gradients], [expected, *wanted], rtol=0, atol=0)


@each_dtype
def test_batch_norm_matches_the_equation(dtype: torch.dtype, generator: Generator) -> None:
    shapes = (*test_batch_norm.SHAPES, (3, 1, 40, 8), (64, 16, 32, 32), (2, 2048, 3, 3), (64, 96, 33, 31))
    for shape, variant in itertools.product(shapes, test_batch_norm.VARIANTS):
        test_batch_norm.check(shape, dtype, variant, None, generator, device="cuda")


@each_dtype
def test_frozen_batch_norm_matches_the_equation(dtype: torch.dtype, generator: Generator) -> None:
    shapes = (*test_frozen_batch_norm.SHAPES, (64, 16, 32, 32), (64, 96, 33, 31))
    for shape, variant in itertools.product(shapes, test_frozen_batch_norm.VARIANTS[::5]):
        test_frozen_batch_norm.check(shape, dtype, variant, None, generator, device="cuda")


@each_dtype
def test_batchnorm_distance_matches_the_equation(dtype: torch.dtype, generator: Generator) -> None:
    for shape in (*test_batchnorm_distance.SHAPES, (64, 16, 32, 32), (64, 96, 33, 31)):
        test_batchnorm_distance.check(shape, dtype, None, generator, device="cuda")


def test_batch_norm_moves_running_statistics_without_waiting_and_alike_in_a_graph(generator: Generator) -> None:
    variant = test_batch_norm.VARIANTS[-1]
    inputs = test_batch_norm.on("cuda", test_batch_norm.inputs_of((64, 96, 33, 31), variant, torch.float32, generator))
    x, weight, bias, residual = inputs
    moved = [torch.full((96,), value, device="cuda") for value in (0.7, 1.3)]
    expected = [value.clone() for value in moved]
    upstream = torch.randn(x.shape, generator=generator).cuda()

    def step() -> list[Tensor]:
        leaf = x.detach().requires_grad_()
        y = batch_norm(leaf, *moved, weight, bias, residual=residual, negative_slope=0.2)
        return [y, *torch.autograd.grad(y, leaf, upstream)]

    torch.cuda.set_sync_debug_mode("error")
    try:
        eager = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for _ in range(2):
        test_batch_norm.reference(x, *expected, weight, bias)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    torch.testing.assert_close(captured, eager, rtol=0, atol=0)
    torch.testing.assert_close(moved, expected)


def test_more_elements_than_32_bits_count() -> None:
    """Only the last elements differ from zero: a 32-bit offset would miss them."""
    free, _ = torch.cuda.mem_get_info()
    if free < 40 << 30:
        pytest.skip(f"holds two tensors past 2³¹ elements in 40 GB of GPU memory; {free >> 30} GB are free")
    torch.use_deterministic_algorithms(False)  # no poisoning of so much memory
    samples, classes = 3, (1 << 31) // 3 // 8 * 8 + 8  # three rows end past 2³¹
    student = torch.zeros(samples, classes, dtype=torch.bfloat16, device="cuda")
    student[-1, -8:] = 2.0
    teacher = torch.full_like(student, -1.0)
    leaf = student.requires_grad_()
    loss = activation_boundary_loss(leaf, teacher, reduction="sum")
    assert loss.item() == pytest.approx(student.numel() - 8 + 8 * 9, rel=1e-6)
    (gradient,) = torch.autograd.grad(loss, leaf)
    assert gradient[-1, -8:].tolist() == [6.0] * 8
    assert gradient[-1, -9] == 2
    error = normalized_squared_error(leaf, teacher)
    assert error.item() == pytest.approx(1 + 8 * 8 / student.numel(), rel=1e-6)
    (gradient,) = torch.autograd.grad(student.numel() * error, leaf)
    assert gradient[-1, -8:].tolist() == [6.0] * 8
    assert gradient[-1, -9] == 2
    del error, gradient, loss, leaf, student, teacher

    for shape in ((1 << 16, 1 << 15), ((1 << 31) // 16 + 8, 16)):  # chunked rows, resident rows
        logits = torch.zeros(shape, dtype=torch.bfloat16, device="cuda")
        logits[-1, -1] = 5.0
        uniform = torch.zeros_like(logits)
        leaf = logits.requires_grad_()
        loss = interpolated_kl_div(leaf, uniform, 1.0, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, leaf)
        last = logits[-1:].detach().double()
        exact = last.softmax(1) - 1 / shape[1]
        assert (gradient[-1:].double() - exact).abs().max() <= 4e-3 * exact.abs().max()
        assert torch.count_nonzero(gradient[:-1]) == 0
        del logits, uniform, leaf, loss, gradient

    features = torch.zeros((1 << 31) // 64 + 8, 64, dtype=torch.bfloat16, device="cuda")
    features[-8:, -1] = 1000.0
    mean, variance = torch.zeros(64, device="cuda"), torch.ones(64, device="cuda")
    y = batch_norm(features, mean, variance, momentum=1.0)
    assert mean[-1].item() == pytest.approx(8000 / features.shape[0], rel=1e-5)
    assert torch.count_nonzero(mean[:-1]) == 0
    assert y[-1, -1].item() == pytest.approx(1000 / variance[-1].item() ** 0.5, rel=1e-2)
