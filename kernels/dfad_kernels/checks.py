"""Checks of the arguments of losses. Messages quote what was given and say what to do."""

import math

import torch
from torch import Tensor

REDUCTIONS = ("none", "mean", "sum", "batchmean")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_pair(student: Tensor, teacher: Tensor) -> None:
    """Raises unless both are floating-point tensors of one shape, dtype and device."""
    for name, tensor in (("student", student), ("teacher", teacher)):
        if tensor.dtype not in DTYPES:
            known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
            raise TypeError(f"The {name}'s tensor is {tensor.dtype}; convert it to one of: {known}.")
    if student.shape != teacher.shape:
        raise ValueError(
            f"The student's shape {tuple(student.shape)} differs from the teacher's {tuple(teacher.shape)}; "
            "both must come from the same batch and have the same width: put a connector between them if not."
        )
    if student.dtype != teacher.dtype:
        raise TypeError(
            f"The student's tensor is {student.dtype}, the teacher's {teacher.dtype}; convert one with `.to(dtype)`."
        )
    if student.device != teacher.device:
        raise ValueError(
            f"The student's tensor is on {student.device}, the teacher's on {teacher.device}; "
            "move one with `.to(device)`."
        )
    if student.ndim == 0:
        raise ValueError("The tensors have no dimensions; the first one must count the samples.")


def check_positive(name: str, value: float) -> None:
    """Raises unless the value is a finite number above zero."""
    if not 0 < value < math.inf:  # not math.isfinite, which torch.compile cannot trace
        raise ValueError(f"{name} is {value}; it must be a finite number above 0.")


def check_reduction(reduction: str) -> None:
    """Raises unless the reduction is one of torch's."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction is {reduction!r}; choose one of: {', '.join(REDUCTIONS)}.")
