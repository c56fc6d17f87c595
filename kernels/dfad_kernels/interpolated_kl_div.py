"""Distillation against soft labels that are interpolated between pairs of samples."""

import math
from typing import Any

import torch
from torch import Tensor

from dfad_kernels.checks import check_pair, check_positive, check_reduction
from dfad_kernels.registration import compute_dtype, fused_loss, reduce, rows_classes_sites

RESIDENT_CLASSES = 4096
"""Largest number of classes that a GPU program holds at once without spilling; longer rows are read in chunks."""


def _prepare(
    student_logits: Tensor,
    teacher_logits: Tensor,
    mixing_coefficient: Tensor | float,
    partner: Tensor | None = None,
    temperature: float = 1.0,
    reduction: str = "batchmean",
) -> tuple[Any, ...]:
    check_pair(student_logits, teacher_logits)
    check_positive("temperature", temperature)
    check_reduction(reduction)
    if student_logits.ndim < 2:
        raise ValueError(
            f"The logits' shape is {tuple(student_logits.shape)}; it must be (N, C) or (N, C, *), "
            "classes in the second dimension."
        )
    coefficient = _check_coefficient(mixing_coefficient, student_logits)
    if partner is not None:
        _check_partner(partner, student_logits)
    return student_logits, teacher_logits, coefficient, partner, float(temperature), reduction


def _check_coefficient(mixing_coefficient: Tensor | float, logits: Tensor) -> Tensor:
    if not isinstance(mixing_coefficient, Tensor):
        if not 0 <= mixing_coefficient <= 1:
            raise ValueError(f"mixing_coefficient is {mixing_coefficient}; it must lie in [0, 1].")
        return torch.full((), mixing_coefficient, dtype=compute_dtype(logits), device=logits.device)
    rows = logits.shape[0]
    if mixing_coefficient.shape not in ((), (rows,)):
        raise ValueError(
            f"mixing_coefficient has shape {tuple(mixing_coefficient.shape)}; it must be () for the whole batch "
            f"or ({rows},), one for each sample."
        )
    if not mixing_coefficient.is_floating_point():
        raise TypeError(f"mixing_coefficient is {mixing_coefficient.dtype}; convert it with `.float()`.")
    if mixing_coefficient.device != logits.device:
        raise ValueError(
            f"mixing_coefficient is on {mixing_coefficient.device}, the logits on {logits.device}; "
            "move it with `.to(device)`."
        )
    if mixing_coefficient.requires_grad:
        raise ValueError("mixing_coefficient requires a gradient, which this loss does not give; `.detach()` it.")
    return mixing_coefficient.to(compute_dtype(logits))


def _check_partner(partner: Tensor, logits: Tensor) -> None:
    if partner.dtype != torch.int64:
        raise TypeError(f"partner is {partner.dtype}; convert it with `.long()`.")
    if partner.shape != logits.shape[:1]:
        raise ValueError(
            f"partner has shape {tuple(partner.shape)}; it must be ({logits.shape[0]},): "
            "for each sample the index of the one it is mixed with."
        )
    if partner.device != logits.device:
        raise ValueError(f"partner is on {partner.device}, the logits on {logits.device}; move it with `.to(device)`.")


def _statistics(kernels: str, student_logits: Tensor) -> tuple[int, ...]:
    """Shape of the statistics that are saved per row, that is, per site of a sample.

    The C++ kernels keep four numbers: largest logit and inverse of the softmax's denominator, of student and teacher.
    The Triton kernels keep six for rows that they read in chunks; for shorter rows, computing them again is faster.
    """
    samples, classes, *sites = student_logits.shape
    if kernels == "triton" and classes <= RESIDENT_CLASSES:
        return (0,)
    return (6 if kernels == "triton" else 4, samples * math.prod(sites))


@fused_loss(prepare=_prepare, differentiable=2, view=rows_classes_sites, saved=_statistics)
def interpolated_kl_div(
    student_logits: Tensor,
    teacher_logits: Tensor,
    mixing_coefficient: Tensor,
    partner: Tensor | None,
    temperature: float,
    reduction: str,
) -> Tensor:
    r"""Kullback-Leibler divergence of the student from an interpolated soft label.

    .. math::
        T^2 \operatorname{KL}\bigl(\tilde y \,\|\, \operatorname{softmax}(s / T)\bigr), \quad
        \tilde y = \lambda \operatorname{softmax}(t / T) + (1 - \lambda) \operatorname{softmax}(t_\pi / T)

    Hinton et al., "Distilling the Knowledge in a Neural Network", 2015, with the label mixed as in Zhang et al.,
    "mixup", ICLR 2018. A coefficient of 1 gives the plain distillation loss. A class of probability 0 in the label
    adds nothing, also where the student gives it 0.

    Args:
        student_logits: ``(N, C)`` or ``(N, C, *)``.
        teacher_logits: of the same shape; gets a gradient as well.
        mixing_coefficient: :math:`\lambda` in [0, 1], a number or a tensor of shape ``()`` or ``(N,)``. A number is
            checked; a tensor is not, as nothing waits for the device. It gets no gradient.
        partner: :math:`\pi`, a permutation of the samples as int64 indices, ``(N,)``; the reversed batch if None.
        temperature: T, in units of the logits.
        reduction: as in :func:`torch.nn.functional.kl_div`.

    Raises:
        ValueError: if shapes or devices do not fit, or a number is out of its range.
        TypeError: if the logits' dtypes differ or are not floating-point, or the partner is not int64.
    """
    student = (student_logits / temperature).log_softmax(dim=1)
    own = (teacher_logits / temperature).softmax(dim=1)
    coefficient = mixing_coefficient.view(-1, *[1] * (own.ndim - 1))
    label = coefficient * own + (1 - coefficient) * (own.flip(0) if partner is None else own[partner])
    # the inner selection keeps 0 · (log 0 − …) out of the gradient
    ratio = torch.where(label == 0, 1.0, label).log() - torch.where(label == 0, 0.0, student)
    return reduce(temperature**2 * label * ratio, reduction)
