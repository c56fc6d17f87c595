"""Losses as modules: which equations, over which taps, with which weights. The mathematics is in the operators."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dfad import functional


class Discrepancy(nn.Module):
    """How far student and teacher are apart in their logits.

    Args:
        kind: ``l1``, the mean absolute difference (DFAD), or ``kl``, the KL divergence of the soft labels.
        temperature: of the soft labels.
        fused: see :class:`InterpolatedKLDivLoss`.
    """

    def __init__(self, kind: str = "l1", temperature: float = 1.0, *, fused: bool = True) -> None:
        super().__init__()
        self.divergence = InterpolatedKLDivLoss(temperature, fused=fused) if kind == "kl" else None

    def forward(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """Both ``(B, classes)``; gradients flow to both."""
        if self.divergence is None:
            return F.l1_loss(student_logits.float(), teacher_logits.float())
        result: Tensor = self.divergence(student_logits, teacher_logits, 1.0)
        return result


class BatchNormStatisticsLoss(nn.Module):
    """Distance between a batch's statistics and a network's, summed over its BatchNorms.

    See :func:`dfad.functional.batchnorm_distance`.

    Args:
        norms: the BatchNorms, whose running statistics are read at each call.
    """

    def __init__(self, norms: Sequence[_BatchNorm]) -> None:
        super().__init__()
        self.norms = list(norms)  # a list, not a ModuleList: they belong to the teacher

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """What reached each BatchNorm, ``(B, channels, ...)`` each."""
        distances = [
            functional.batchnorm_distance(x, norm.running_mean, norm.running_var)  # type: ignore[arg-type]
            for x, norm in zip(features, self.norms, strict=True)
        ]
        return torch.stack(distances).sum()
