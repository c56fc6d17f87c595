"""The squared error of a tap relative to the size of the teacher's, for feature matching."""

from typing import Any

import torch
from torch import Tensor

from dfad_kernels.checks import check_pair, check_reduction
from dfad_kernels.registration import compute_dtype, fused_loss, reduce, storage_order


def _prepare(student: Tensor, teacher: Tensor, size: Tensor | None = None, reduction: str = "sum") -> tuple[Any, ...]:
    check_pair(student, teacher)
    check_reduction(reduction)
    if teacher.requires_grad:
        raise ValueError("The teacher's tensor requires a gradient, which this loss does not give; `.detach()` it.")
    if size is not None:
        size = _check_size(size, student)
    return student, teacher, size, reduction


def _check_size(size: Tensor, student: Tensor) -> Tensor:
    if size.shape != ():
        raise ValueError(f"size has shape {tuple(size.shape)}; it must be (), one number for the whole batch.")
    if not size.is_floating_point():
        raise TypeError(f"size is {size.dtype}; convert it with `.float()`.")
    if size.device != student.device:
        raise ValueError(f"size is on {size.device}, the taps on {student.device}; move it with `.to(device)`.")
    if size.requires_grad:
        raise ValueError("size requires a gradient, which this loss does not give; `.detach()` it.")
    return size.to(compute_dtype(student))


def _size(kernels: str, student: Tensor) -> tuple[int, ...]:
    return (1,)


@fused_loss(prepare=_prepare, differentiable=1, view=storage_order, saved=_size)
def normalized_squared_error(student: Tensor, teacher: Tensor, size: Tensor | None, reduction: str) -> Tensor:
    r"""Squared error of a tap, relative to the size of the teacher's: 1 for a student that is zero everywhere.

    .. math:: \frac{\lVert s - t \rVert^2}{\lVert t \rVert^2}

    The loss of hints (Romero et al., "FitNets", ICLR 2015), normalized over the batch so that one weight suits every
    tap and every network. A size below 1e-12 counts as 1e-12.

    Args:
        student: tap, ``(B, ...)``.
        teacher: tap of the same shape, without a gradient.
        size: ``()``, what stands for ‖t‖² where the taps are a share of a batch; that of these taps if None.
        reduction: of the terms (s − t)² / ‖t‖²: ``sum``, as above, ``none``, ``mean`` over elements, or ``batchmean``:
            the sum over the batch's size.

    Raises:
        ValueError: if shapes or devices differ, or a gradient is required of anything but the student.
        TypeError: if the dtypes differ or are not floating-point.
    """
    size = squared_norm(teacher) if size is None else size
    error = squared_norm(student - teacher) if reduction == "sum" else reduce((student - teacher).square(), reduction)
    return error / size.clamp_min(1e-12)


def squared_norm(tensor: Tensor) -> Tensor:
    """‖x‖² as a scalar, summed in float32 at least."""
    return torch.linalg.vector_norm(tensor, dtype=compute_dtype(tensor)).square()
