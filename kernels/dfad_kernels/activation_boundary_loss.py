"""The activation-boundary loss: the student's pre-activations on the teacher's side of zero, at a distance."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dfad_kernels.checks import check_pair, check_positive, check_reduction
from dfad_kernels.registration import fused_loss, reduce, storage_order


def _prepare(student: Tensor, teacher: Tensor, margin: float = 1.0, reduction: str = "mean") -> tuple[Any, ...]:
    check_pair(student, teacher)
    check_positive("margin", margin)
    check_reduction(reduction)
    return student, teacher, float(margin), reduction


@fused_loss(prepare=_prepare, differentiable=1, view=storage_order)
def activation_boundary_loss(student: Tensor, teacher: Tensor, margin: float, reduction: str) -> Tensor:
    r"""Squared violation of the teacher's activation boundary.

    .. math:: \max(0,\, m - \operatorname{sgn}(t)\, s)^2, \quad \operatorname{sgn}(0) = -1

    Heo et al., "Knowledge Transfer via Distillation of Activation Boundaries", AAAI 2019, "alternative loss".

    Args:
        student: pre-activation tap, ``(B, ...)``.
        teacher: tap of the same shape; only its sign matters, so it gets no gradient.
        margin: distance from zero that the student must keep, in activation units.
        reduction: ``none``, ``mean`` over elements, ``sum``, or ``batchmean``: the sum over the batch's size.

    Raises:
        ValueError: if shapes or devices differ, or the margin is not positive.
        TypeError: if the dtypes differ or are not floating-point.
    """
    # -sgn(t), but NaN for NaN, which a comparison alone would hide
    side = torch.where(teacher > 0, -1.0, torch.where(teacher <= 0, 1.0, teacher))
    return reduce(F.relu(margin + side * student).square(), reduction)
