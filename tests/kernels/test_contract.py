"""Guarantees of the operators other than their numbers."""

import importlib
import itertools
import math
import mmap
import os
import pkgutil
import subprocess
import sys
import threading
import time
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, library

import dfad_kernels
from dfad_kernels import (
    FusedLoss,
    activation_boundary_loss,
    interpolated_kl_div,
    kernel_name,
    normalized_squared_error,
    registration,
)
from dfad_kernels.checks import REDUCTIONS
from dfad_kernels.testing import CASES, TOLERANCE, OpCase
from tests.conftest import threads
from tests.kernels import implementations
from tests.kernels.implementations import CPU_IMPLEMENTATIONS, Implementation, differentiate
from tests.kernels.memory import guarded
from tests.waiting import NoWaiting

BOUNDARY, DIVERGENCE, SQUARED_ERROR = CASES

each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
each_implementation = pytest.mark.parametrize("implementation", CPU_IMPLEMENTATIONS)


def arguments(case: OpCase, shape: tuple[int, ...], reduction: str, gradients: bool = True) -> list[tuple[Any, ...]]:
    """Arguments of the operator, for each of the case's settings."""
    generator = Generator().manual_seed(0)
    student, teacher = case.pair(shape, torch.float64, generator)
    student.requires_grad_(gradients)
    teacher.requires_grad_(gradients and "teacher" in case.gradients)
    return [
        case.op.prepare(student, teacher, **options, reduction=reduction)
        for options in case.settings(shape[0], generator)
    ]


# An operator is complete


def test_every_loss_has_all_its_parts() -> None:
    found = {
        value
        for module in pkgutil.iter_modules(dfad_kernels.__path__)
        if module.name not in ("_cpu", "gpu")
        for value in vars(importlib.import_module(f"dfad_kernels.{module.name}")).values()
        if isinstance(value, FusedLoss)
    }
    assert found == {case.op for case in CASES}, "give each loss an OpCase in dfad_kernels.testing"
    for op in found:
        assert op.__name__ in dfad_kernels.__all__
        registration.load_kernels("cpp", op.__name__)
        assert hasattr(importlib.import_module("dfad.functional"), op.__name__)
        if implementations.has_triton:
            registration.load_kernels("triton", op.__name__)


@each_case
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_opcheck(case: OpCase, reduction: str) -> None:
    operator = getattr(torch.ops.dfad_kernels, case.name).default
    for call in arguments(case, (4, 3, 2, 2), reduction):
        library.opcheck(operator, call)


@each_case
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradcheck(case: OpCase, reduction: str) -> None:
    generator = Generator().manual_seed(3)
    for options in case.settings(4, generator):
        pair = [
            x.requires_grad_(k < len(case.gradients))
            for k, x in enumerate(case.pair((4, 3, 2), torch.float64, generator))
        ]
        assert torch.autograd.gradcheck(lambda *x, o=options: case.op(*x, **o, reduction=reduction), pair)


@each_case
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_into_one_graph_for_all_sizes(case: OpCase, backend: str, generator: Generator) -> None:
    torch.compiler.reset()
    compiled = torch.compile(case.op, fullgraph=True, dynamic=True, backend=backend)
    for samples in (4, 6):
        options = case.settings(samples, generator)[-1]
        pair = case.pair((samples, 5), torch.float32, generator)
        loss, gradients = differentiate(compiled, case, pair, options, torch.ones_like)
        expected, wanted = differentiate(case.op, case, pair, options, torch.ones_like)
        torch.testing.assert_close([loss, *gradients], [expected, *wanted], rtol=0, atol=0)


@each_case
def test_a_second_derivative_raises_plainly(case: OpCase, generator: Generator) -> None:
    student, teacher = case.pair((4, 3), torch.float32, generator)
    student.requires_grad_()
    loss = case.op(student, teacher, **case.settings(4, generator)[0])
    (gradient,) = torch.autograd.grad(loss, student, create_graph=True)
    with pytest.raises(RuntimeError, match=f"no second derivative. Use {case.name}.reference"):
        gradient.sum().backward()


@each_case
def test_vmap_raises_plainly(case: OpCase, generator: Generator) -> None:
    student, teacher = case.pair((2, 4, 3), torch.float32, generator)
    options = case.settings(4, generator)[0]
    with pytest.raises(RuntimeError, match=f"Map {case.name}.reference instead"):
        torch.vmap(lambda s, t: case.op(s, t, **options))(student, teacher)


@each_case
def test_only_what_is_needed_is_computed(case: OpCase, generator: Generator) -> None:
    options = case.settings(4, generator)[0]
    for name in case.gradients:
        pair = dict(zip(("student", "teacher"), case.pair((4, 3), torch.float32, generator), strict=True))
        pair[name].requires_grad_()
        case.op(*pair.values(), **options).backward()
        assert [key for key, x in pair.items() if x.grad is not None] == [name]


# What a caller gives wrong


@pytest.mark.parametrize(
    ("case", "call"),
    [pytest.param(c, b, id=f"{c.name}-{k}") for c in CASES for k, b in enumerate(c.bad_calls)],
)
@pytest.mark.parametrize("fused", [True, False], ids=["operator", "reference"])
def test_bad_calls_are_refused(case: OpCase, call: Any, fused: bool) -> None:
    with pytest.raises(call.error, match=call.words):
        (case.op if fused else case.op.reference)(*call.arguments, **call.settings)


@pytest.mark.parametrize("partner", [[0, 0, 1], [0, 1, 3], [0, 1, -1]], ids=str)
def test_a_partner_that_is_no_permutation_is_refused(partner: list[int]) -> None:
    logits = torch.randn(3, 4)
    with pytest.raises(ValueError, match=r"partner\[\d\] is"):
        interpolated_kl_div(logits, logits, 0.5, torch.tensor(partner))


@implementations.interpreted
@pytest.mark.parametrize("classes", [4, 8193], ids=["resident", "chunked"])
def test_triton_makes_a_partner_that_is_no_permutation_show(classes: int) -> None:
    """An error would need to wait for the GPU, so an index out of range gives NaN, and never reads other memory."""
    logits = torch.randn(3, classes)
    for partner, loss_is_nan in (([0, 1, 3], True), ([0, 1, -1], True), ([0, 0, 1], False)):
        call = interpolated_kl_div.prepare(logits, logits, 0.5, torch.tensor(partner))
        loss, saved = interpolated_kl_div.run_forward("triton", *call)
        assert loss.isnan().item() == loss_is_nan
        _, gradient = interpolated_kl_div.run_backward("triton", torch.tensor(1.0), saved, [True, True], *call)
        assert gradient.isnan().any()


# Side effects


@each_implementation
@each_case
def test_inputs_are_never_written_and_two_runs_agree(
    case: OpCase, implementation: Implementation, generator: Generator
) -> None:
    for shape in ((5, 3, 4, 4), (3, 700)):
        pair = case.pair(shape, torch.float32, generator)
        for reduction in ("mean", "none"):
            options = {**case.settings(shape[0], generator)[-1], "reduction": reduction}
            tensors = [*pair, *(value for value in options.values() if isinstance(value, Tensor))]
            before = [x.clone() for x in tensors]
            first = implementation(case, pair, options, torch.ones_like)
            second = implementation(case, pair, options, torch.ones_like)
            assert all(torch.equal(x, copy) for x, copy in zip(tensors, before, strict=True))
            assert torch.equal(first[0], second[0])
            assert all(torch.equal(x, y) for x, y in zip(first[1], second[1], strict=True))


@each_case
def test_the_number_of_threads_does_not_change_a_bit(case: OpCase, generator: Generator) -> None:
    pair = case.pair((16, 21, 33, 32), torch.float32, generator)
    options = case.settings(16, generator)[-1]
    results = []
    for number in (1, 2, 5):
        with threads(number):
            results.append(implementations.operator(case, pair, options, torch.ones_like))
    for loss, gradients in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert all(torch.equal(x, y) for x, y in zip(gradients, results[0][1], strict=True))


@pytest.mark.skipif(sys.platform != "linux", reason="protects pages as Linux does")
@pytest.mark.parametrize("level", registration.instruction_sets())
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@each_case
def test_nothing_past_a_tensor_is_touched(case: OpCase, dtype: torch.dtype, level: str, generator: Generator) -> None:
    kernels = registration.load_kernels(f"cpp.{level}", case.name)
    for classes in (1, 3, 10, 16, 21, 37, 65, 131):
        for shape in ((4, classes, 1), (3, 7, classes)):
            pair = [guarded(x) for x in case.pair(shape, dtype, generator)]
            for reduction, options in itertools.product(("sum", "none"), case.settings(shape[0], generator)):
                arguments = case.op.prepare(*pair, **options, reduction=reduction)
                loss, saved = (guarded(x) for x in case.op.run_forward(f"cpp.{level}", *arguments))
                upstream = guarded(torch.ones_like(loss))
                kernels.forward(loss, *arguments[:-1], 1.0, saved=saved)
                for needed in itertools.product((True, False), repeat=len(case.gradients)):
                    gradients = [guarded(x) if need else None for x, need in zip(pair, needed, strict=False)]
                    if any(needed):
                        kernels.backward(*gradients, upstream, *arguments[:-1], 1.0, saved=saved)


def test_threads_follow_torch() -> None:
    program = """
import os, torch
from dfad_kernels import activation_boundary_loss
x = torch.zeros(1 << 21)
def run(threads):
    torch.set_num_threads(threads)
    before = len(os.listdir("/proc/self/task"))
    activation_boundary_loss(x, x)
    return len(os.listdir("/proc/self/task")) - before
print(run(1), run(4))
"""
    if not os.path.isdir("/proc/self/task"):
        pytest.skip("counts threads in /proc, which this system does not have")
    assert _python(program, OMP_NUM_THREADS="1").split() == ["0", "3"]


def test_the_interpreter_lock_is_released() -> None:
    logits = torch.randn(64, 100, 64, 64)
    arguments = interpolated_kl_div.prepare(logits, logits, 0.5)
    running = threading.Event()
    done = threading.Event()

    def work() -> None:
        running.set()
        interpolated_kl_div.run_forward("cpp.baseline", *arguments)
        done.set()

    worker = threading.Thread(target=work)
    worker.start()
    running.wait()
    ticks = 0
    while not done.is_set():
        ticks += 1
        time.sleep(0.001)
    worker.join()
    assert ticks > 20  # about 1: the lock was held


@implementations.interpreted
@each_case
def test_nothing_waits_for_the_device(case: OpCase, generator: Generator) -> None:
    """The launchers that a GPU runs, here on the CPU, and the operator around them."""
    for classes in (5, 8193):
        pair = case.pair((4, classes), torch.float32, generator)
        for reduction in ("mean", "none"):
            for options in case.settings(4, generator):
                for implementation in (implementations.interpreted_triton, implementations.operator):
                    with NoWaiting():
                        implementation(case, pair, {**options, "reduction": reduction}, torch.ones_like)


@each_case
def test_under_autocast(case: OpCase, generator: Generator) -> None:
    pair = case.pair((4, 3, 2, 2), torch.bfloat16, generator)
    options = case.settings(4, generator)[0]
    expected = differentiate(case.op, case, pair, options, torch.ones_like)
    with torch.autocast("cpu", torch.bfloat16):
        loss, gradients = differentiate(case.op, case, pair, options, torch.ones_like)
    assert loss.dtype == torch.float32
    assert [g.dtype for g in gradients] == [torch.bfloat16] * len(gradients)
    torch.testing.assert_close([loss, *gradients], [expected[0], *expected[1]], rtol=0, atol=0)


# Where kernels cannot be had


def _python(program: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_losses_are_importable_without_triton() -> None:
    _python(
        "import sys; sys.modules['triton'] = None; import torch, dfad.losses; x = torch.ones(2, 2);"
        "dfad.losses.ActivationBoundaryLoss()(x, x); dfad.losses.InterpolatedKLDivLoss()(x, x, 0.5)"
    )


def test_kernel_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernel_name("cpu") == "cpp"
    with pytest.raises(RuntimeError, match=r"no fused kernels for the device 'xpu'.*--no-fused"):
        kernel_name("xpu")
    registration.load_kernels.cache_clear()
    monkeypatch.setitem(sys.modules, "dfad_kernels.gpu.activation_boundary_loss", None)
    monkeypatch.setitem(sys.modules, "dfad_kernels._cpu", None)
    for device, way_out in (("cuda", "pip install triton"), ("cpu", "C\\+\\+ compiler")):
        with pytest.raises(RuntimeError, match=f"cannot be loaded.*{way_out}.*--no-fused"):
            kernel_name(device)
    with pytest.raises(RuntimeError, match="cannot be loaded"):
        activation_boundary_loss(torch.ones(2), torch.ones(2))


# What the equations say


@each_implementation
def test_a_student_equal_to_its_teacher(implementation: Implementation, generator: Generator) -> None:
    for shape in ((4, 10), (3, 21, 5), (2, 8193)):
        logits, _ = DIVERGENCE.pair(shape, torch.float32, generator)
        loss, gradients = implementation(
            DIVERGENCE, (logits, logits.clone()), {"mixing_coefficient": 1.0, "temperature": 3.0}, torch.ones_like
        )
        if implementation is implementations.reference:
            assert abs(loss.item()) < 1e-5
            assert all(gradient.abs().max() < 1e-5 for gradient in gradients)
        else:
            assert loss.item() == 0
            assert all(torch.count_nonzero(gradient) == 0 for gradient in gradients)


@each_implementation
def test_coefficients_of_zero_and_one_choose_a_label(implementation: Implementation, generator: Generator) -> None:
    student, teacher = DIVERGENCE.pair((4, 6), torch.float32, generator)
    for coefficient, label in ((1.0, teacher), (0.0, teacher.flip(0))):
        loss, _ = implementation(DIVERGENCE, (student, teacher), {"mixing_coefficient": coefficient}, torch.ones_like)
        expected = F.kl_div(student.log_softmax(1), label.softmax(1), reduction="batchmean")
        torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@each_implementation
def test_extreme_logits(implementation: Implementation, dtype: torch.dtype) -> None:
    inf = math.inf
    options = {"mixing_coefficient": 0.5, "partner": torch.arange(1), "reduction": "sum"}
    for student, teacher, expected in (
        ([1e4, -1e4, 0.0], [1e4, -1e4, 0.0], 0.0),
        ([1e4, -1e4, 0.0], [-1e4, 1e4, 0.0], 2e4),
        ([1.0, 2.0, -inf], [1.0, 2.0, -inf], 0.0),  # a class that both exclude
        ([1.0, 1.0, 1.0], [1.0, 1.0, -inf], math.log(1.5)),
        ([1.0, 1.0, -inf], [1.0, 1.0, 1.0], inf),
        ([-inf] * 3, [1.0, 2.0, 3.0], math.nan),
        ([1.0, math.nan, 1.0], [1.0, 2.0, 3.0], math.nan),
        ([1.0, 2.0, 3.0], [1.0, math.nan, 1.0], math.nan),
    ):
        pair = [torch.tensor([x], dtype=dtype) for x in (student, teacher)]
        loss, gradients = implementation(DIVERGENCE, pair, options, torch.ones_like)
        torch.testing.assert_close(loss, torch.tensor(expected, dtype=dtype), equal_nan=True)
        if math.isfinite(expected):
            assert all(gradient.isfinite().all() for gradient in gradients)
        elif math.isnan(expected):
            assert gradients[0].isnan().any()


@each_implementation
def test_many_classes(implementation: Implementation, generator: Generator) -> None:
    pair = DIVERGENCE.pair((2, 100_000), torch.float32, generator)
    loss, gradients = implementation(DIVERGENCE, pair, {"mixing_coefficient": 0.5}, torch.ones_like)
    wide = [x.double() for x in pair]
    expected, wanted = implementations.reference(DIVERGENCE, wide, {"mixing_coefficient": 0.5}, torch.ones_like)
    tolerance = 2e-5 if implementation is implementations.reference else 1e-6
    torch.testing.assert_close(loss.double(), expected, rtol=tolerance, atol=0)
    for gradient, exact in zip(gradients, wanted, strict=True):
        assert (gradient - exact).abs().max() <= tolerance * exact.abs().max()


def test_more_elements_than_32_bits_count() -> None:
    """Only the last row differs: a 32-bit offset would miss it. Only its pages use memory."""

    def zeros(*shape: int) -> Tensor:
        pages = mmap.mmap(-1, 2 * math.prod(shape), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            pages.madvise(mmap.MADV_HUGEPAGE)  # the system's one huge page of zeros
        return torch.frombuffer(pages, dtype=torch.bfloat16).view(shape)

    classes = 1 << 15
    rows = (1 << 31) // classes + 2
    student, teacher = zeros(rows, classes), zeros(rows, classes)
    student[-1, -3:] = 1000.0

    violations = activation_boundary_loss(student, teacher, reduction="sum")
    assert violations.item() == pytest.approx(student.numel() + 3 * (1001**2 - 1), rel=1e-7)

    divergence = interpolated_kl_div(student, teacher, 1.0, reduction="sum")
    last = student[-1].double()
    assert divergence.item() == pytest.approx((last.logsumexp(0) - last.mean()).item() - math.log(classes), rel=1e-5)

    error = normalized_squared_error(student, teacher, torch.tensor(2.0))
    assert error.item() == pytest.approx(3 * 1000**2 / 2, rel=1e-7)


@each_implementation
def test_the_boundary_itself(implementation: Implementation) -> None:
    student = torch.tensor([-0.5, 0.0, 0.5, 1.0, -1.0, -0.0, 2.0, -2.0])
    for teacher, sign in ((3.0, 1.0), (-3.0, -1.0), (0.0, -1.0), (-0.0, -1.0), (math.inf, 1.0), (-math.inf, -1.0)):
        loss, (gradient,) = implementation(
            BOUNDARY, (student, torch.full_like(student, teacher)), {"reduction": "none"}, torch.ones_like
        )
        violation = (1 - sign * student).clamp_min(0)
        torch.testing.assert_close(loss, violation**2, rtol=0, atol=0)
        torch.testing.assert_close(gradient, -2 * sign * violation, rtol=0, atol=0)


@each_implementation
def test_nan_stays_nan(implementation: Implementation) -> None:
    nan = torch.tensor([math.nan, 1.0, 1.0])
    for pair in ((nan, torch.ones(3)), (torch.ones(3), nan)):
        loss, (gradient,) = implementation(BOUNDARY, pair, {"reduction": "none"}, torch.ones_like)
        assert loss.isnan().tolist() == gradient.isnan().tolist() == [True, False, False]
        assert implementation(BOUNDARY, pair, {}, torch.ones_like)[0].isnan()


@each_implementation
@pytest.mark.parametrize("given", [None, 0.0], ids=["own size", "given size"])
def test_a_teacher_of_zeros_divides_by_a_little(implementation: Implementation, given: float | None) -> None:
    student, teacher = torch.tensor([1e-6, 2e-6, -1e-6]), torch.zeros(3)
    size = None if given is None else torch.tensor(given)
    loss, (gradient,) = implementation(SQUARED_ERROR, (student, teacher), {"size": size}, torch.ones_like)
    torch.testing.assert_close(loss, torch.tensor(6.0))
    torch.testing.assert_close(gradient, 2e12 * student)
    loss, (gradient,) = implementation(SQUARED_ERROR, (teacher, teacher), {"size": size}, torch.ones_like)
    assert loss == torch.count_nonzero(gradient) == 0


@each_implementation
def test_nan_stays_nan_in_errors(implementation: Implementation) -> None:
    nan = torch.tensor([math.nan, 1.0, 1.0])
    for pair, where in (((nan, torch.ones(3)), [True, False, False]), ((torch.ones(3), nan), [True] * 3)):
        loss, (gradient,) = implementation(SQUARED_ERROR, pair, {"reduction": "none"}, torch.ones_like)
        assert loss.isnan().tolist() == gradient.isnan().tolist() == where
        assert implementation(SQUARED_ERROR, pair, {}, torch.ones_like)[0].isnan()
    for pair in ((nan, torch.ones(3)), (torch.ones(3), nan)):
        assert implementation(SQUARED_ERROR, pair, {"size": torch.tensor(2.0)}, torch.ones_like)[0].isnan()
    assert implementation(SQUARED_ERROR, (nan, nan), {"size": torch.tensor(math.nan)}, torch.ones_like)[0].isnan()
