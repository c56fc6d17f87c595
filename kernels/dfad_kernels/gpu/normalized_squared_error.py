"""Triton kernels of the normalized squared error: one pass over a pair of dense tensors in storage order.

Forward, each program sums a block's errors and the teacher's size; a second kernel adds the blocks and divides.
"""

import triton
import triton.language as tl
from torch import Tensor

from dfad_kernels.gpu.common import compute_type, load_block

BLOCK = 2048
"""Number of elements that a program reads from each tensor: four 128-bit loads of float32 in each of 128 threads."""

BLOCKS = 4096
"""Number of blocks that are added at a time, by 512 threads of a single program: it should take few steps."""

SMALLEST_SIZE = tl.constexpr(1e-12)


@triton.jit
def _normalized_squared_error_sums_kernel(
    partial_ptr, s_ptr, t_ptr, numel, DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    _, _, s, t = load_block(s_ptr, t_ptr, numel, DTYPE, BLOCK)
    error = s - t
    tl.store(partial_ptr + tl.program_id(0), tl.sum(error * error))
    tl.store(partial_ptr + tl.num_programs(0) + tl.program_id(0), tl.sum(t * t))


@triton.jit
def _normalized_squared_error_quotient_kernel(
    loss_ptr, saved_ptr, partial_ptr, size_ptr, blocks, scale: tl.float64, DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """In one program: saves the size, and divides by it where the loss is the sum."""
    errors = tl.zeros((BLOCK,), tl.float64)
    sizes = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, blocks, BLOCK):
        block = first + tl.arange(0, BLOCK).to(tl.int64)
        errors += tl.load(partial_ptr + block, mask=block < blocks, other=0.0)
        sizes += tl.load(partial_ptr + blocks + block, mask=block < blocks, other=0.0)
    if size_ptr is None:
        size = tl.sum(sizes, 0)
    else:
        size = tl.load(size_ptr).to(tl.float64)
    size = tl.where(size < SMALLEST_SIZE, SMALLEST_SIZE, size)  # NaN stays NaN
    tl.store(saved_ptr, size.to(DTYPE))
    if loss_ptr is not None:
        tl.store(loss_ptr, (tl.sum(errors, 0) / size * scale).to(DTYPE))


@triton.jit
def _normalized_squared_error_forward_kernel(
    loss_ptr, s_ptr, t_ptr, saved_ptr, numel, scale: tl.float64, DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The terms, where the loss is not their sum."""
    offsets, inside, s, t = load_block(s_ptr, t_ptr, numel, DTYPE, BLOCK)
    error = s - t
    factor = tl.full((), scale, DTYPE) / tl.load(saved_ptr)
    tl.store(loss_ptr + offsets, error * error * factor, mask=inside)


@triton.jit
def _normalized_squared_error_backward_kernel(
    ds_ptr, g_ptr, s_ptr, t_ptr, saved_ptr, numel, scale: tl.float64,
    ELEMENTWISE: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    offsets, inside, s, t = load_block(s_ptr, t_ptr, numel, DTYPE, BLOCK)
    error = s - t
    g = 2 * tl.full((), scale, DTYPE) / tl.load(saved_ptr)
    if ELEMENTWISE:
        g *= tl.load(g_ptr + offsets, mask=inside, other=0.0)
    else:
        g *= tl.load(g_ptr)
    tl.store(ds_ptr + offsets, error * g, mask=inside)


def forward(loss: Tensor, student: Tensor, teacher: Tensor, size: Tensor | None, scale: float, saved: Tensor) -> None:
    """Fills the loss, and what errors were divided by: see :class:`dfad_kernels.registration.Kernels`."""
    numel = student.numel()
    blocks = triton.cdiv(numel, BLOCK)
    partial = saved.new_empty(2, blocks)
    settings = {"DTYPE": compute_type(student), "BLOCK": BLOCK}
    _normalized_squared_error_sums_kernel[(blocks,)](partial, student, teacher, numel, **settings)
    _normalized_squared_error_quotient_kernel[(1,)](
        None if loss.ndim else loss, saved, partial, size, blocks, scale,
        DTYPE=compute_type(student), BLOCK=BLOCKS, num_warps=16,
    )  # fmt: skip
    if loss.ndim:
        _normalized_squared_error_forward_kernel[(blocks,)](loss, student, teacher, saved, numel, scale, **settings)


def backward(
    student_gradient: Tensor,
    loss_gradient: Tensor,
    student: Tensor,
    teacher: Tensor,
    size: Tensor | None,
    scale: float,
    saved: Tensor,
) -> None:
    """Fills the gradient: see :class:`dfad_kernels.registration.Kernels`."""
    numel = student.numel()
    settings = {"ELEMENTWISE": loss_gradient.ndim > 0, "DTYPE": compute_type(student), "BLOCK": BLOCK}
    _normalized_squared_error_backward_kernel[(triton.cdiv(numel, BLOCK),)](
        student_gradient, loss_gradient, student, teacher, saved, numel, scale, **settings
    )
