"""Triton kernels of the activation-boundary loss: one pass over a pair of dense tensors in storage order."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dfad_kernels.gpu.common import compute_type, load_block

BLOCK = 2048
"""Number of elements that a program reads from each tensor: four 128-bit loads of float32 in each of 128 threads."""


@triton.jit
def _violation(s, t, margin):
    # NaN of either stays NaN: a comparison or a maximum alone would hide it
    v = margin + tl.where(t > 0, -s, s)
    return tl.where(v < 0, 0.0, v) + tl.where(t == t, 0.0, t)


@triton.jit
def _activation_boundary_forward_kernel(
    loss_ptr, s_ptr, t_ptr, numel, margin: tl.float64, scale: tl.float64,
    ELEMENTWISE: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    offsets, inside, s, t = load_block(s_ptr, t_ptr, numel, DTYPE, BLOCK)
    v = tl.where(inside, _violation(s, t, tl.full((), margin, DTYPE)), 0.0)  # padding lanes violate by the margin
    if ELEMENTWISE:
        tl.store(loss_ptr + offsets, v * v * tl.full((), scale, DTYPE), mask=inside)
    else:
        tl.store(loss_ptr + tl.program_id(0), tl.sum(v * v) * tl.full((), scale, DTYPE))


@triton.jit
def _activation_boundary_backward_kernel(
    ds_ptr, g_ptr, s_ptr, t_ptr, numel, margin: tl.float64, scale: tl.float64,
    ELEMENTWISE: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    offsets, inside, s, t = load_block(s_ptr, t_ptr, numel, DTYPE, BLOCK)
    g = 2 * tl.full((), scale, DTYPE)
    if ELEMENTWISE:
        g *= tl.load(g_ptr + offsets, mask=inside, other=0.0)
    else:
        g *= tl.load(g_ptr)
    v = _violation(s, t, tl.full((), margin, DTYPE))
    tl.store(ds_ptr + offsets, tl.where(t > 0, -v, v) * g, mask=inside)


def forward(loss: Tensor, student: Tensor, teacher: Tensor, margin: float, scale: float, saved: Tensor) -> None:
    """Fills the loss: see :class:`dfad_kernels.registration.Kernels`."""
    numel = student.numel()
    blocks = triton.cdiv(numel, BLOCK)
    out = loss if loss.ndim else loss.new_empty(blocks)
    settings = {"ELEMENTWISE": loss.ndim > 0, "DTYPE": compute_type(student), "BLOCK": BLOCK}
    _activation_boundary_forward_kernel[(blocks,)](out, student, teacher, numel, margin, scale, **settings)
    if not loss.ndim:
        torch.sum(out, 0, out=loss)


def backward(
    student_gradient: Tensor,
    loss_gradient: Tensor,
    student: Tensor,
    teacher: Tensor,
    margin: float,
    scale: float,
    saved: Tensor,
) -> None:
    """Fills the gradient: see :class:`dfad_kernels.registration.Kernels`."""
    numel = student.numel()
    settings = {"ELEMENTWISE": loss_gradient.ndim > 0, "DTYPE": compute_type(student), "BLOCK": BLOCK}
    inputs = (loss_gradient, student, teacher)
    _activation_boundary_backward_kernel[(triton.cdiv(numel, BLOCK),)](
        student_gradient, *inputs, numel, margin, scale, **settings
    )
