"""Triton kernels of the activation-boundary loss: one pass over a pair of dense tensors in storage order."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096


@triton.jit
def _violation(s, t, margin):
    # NaN of either stays NaN: a comparison or a maximum alone would hide it
    v = margin + tl.where(t > 0, -s, s)
    return tl.where(v < 0, 0.0, v) + tl.where(t == t, 0.0, t)


@triton.jit
def _forward_kernel(
    loss_ptr, s_ptr, t_ptr, numel, margin, scale, ELEMENTWISE: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr
):
    block = tl.program_id(0)
    offsets = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < numel
    s = tl.load(s_ptr + offsets, mask=inside, other=0.0).to(DTYPE)
    t = tl.load(t_ptr + offsets, mask=inside, other=0.0).to(DTYPE)
    v = tl.where(inside, _violation(s, t, margin), 0.0)  # padding lanes violate by the margin
    if ELEMENTWISE:
        tl.store(loss_ptr + offsets, v * v * scale, mask=inside)
    else:
        tl.store(loss_ptr + block, tl.sum(v * v))


@triton.jit
def _backward_kernel(
    ds_ptr,
    g_ptr,
    s_ptr,
    t_ptr,
    numel,
    margin,
    scale,
    ELEMENTWISE: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0)
    offsets = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < numel
    s = tl.load(s_ptr + offsets, mask=inside, other=0.0).to(DTYPE)
    t = tl.load(t_ptr + offsets, mask=inside, other=0.0).to(DTYPE)
    if ELEMENTWISE:
        g = tl.load(g_ptr + offsets, mask=inside, other=0.0) * scale
    else:
        g = tl.load(g_ptr) * scale
    slope = 2 * _violation(s, t, margin)
    tl.store(ds_ptr + offsets, tl.where(t > 0, -slope, slope) * g, mask=inside)


def _dtype(tensor: Tensor) -> tl.dtype:
    return tl.float64 if tensor.dtype == torch.float64 else tl.float32


def forward(loss: Tensor, student: Tensor, teacher: Tensor, margin: float, scale: float) -> None:
    """Fills the loss: see :class:`dfad_kernels.registration.Kernels`."""
    elementwise = loss.ndim > 0
    blocks = triton.cdiv(student.numel(), BLOCK)
    out = loss if elementwise else loss.new_empty(blocks)
    _forward_kernel[(blocks,)](
        out,
        student,
        teacher,
        student.numel(),
        margin,
        scale,
        ELEMENTWISE=elementwise,
        DTYPE=_dtype(student),
        BLOCK=BLOCK,
    )
    if not elementwise:
        torch.sum(out, 0, out=loss).mul_(scale)


def backward(
    student_gradient: Tensor, loss_gradient: Tensor, student: Tensor, teacher: Tensor, margin: float, scale: float
) -> None:
    """Fills the gradient: see :class:`dfad_kernels.registration.Kernels`."""
    _backward_kernel[(triton.cdiv(student.numel(), BLOCK),)](
        student_gradient,
        loss_gradient,
        student,
        teacher,
        student.numel(),
        margin,
        scale,
        ELEMENTWISE=loss_gradient.ndim > 0,
        DTYPE=_dtype(student),
        BLOCK=BLOCK,
    )
