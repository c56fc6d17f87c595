"""Losses as modules: which equations, over which taps, with which weights. The mathematics is in the operators."""

from collections.abc import Callable, Sequence
from typing import ParamSpec

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfad.modes import BatchNorm
from dfad_kernels import (
    FusedLoss,
    activation_boundary_loss,
    batchnorm_distance,
    interpolated_kl_div,
    normalized_squared_error,
)
from dfad_kernels.batchnorm_distance import reference as batchnorm_distance_reference
from dfad_kernels.normalized_squared_error import squared_norm
from dfad_kernels.registration import compute_dtype

P = ParamSpec("P")


def _implementation(loss: FusedLoss[P], fused: bool) -> Callable[P, Tensor]:
    """The one place that chooses between an operator and its equation in PyTorch."""
    return loss if fused else loss.reference


def weighted(weight: float, loss: Tensor) -> Tensor:
    """Their product; the loss itself where the weight is 1, for which a GPU would launch a kernel in each direction."""
    return loss if weight == 1 else weight * loss


def _alike(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the wider of their dtypes: under autocast, the last operations of two networks may differ in dtype."""
    dtype = torch.promote_types(student.dtype, teacher.dtype)
    return student.to(dtype), teacher.to(dtype)


class ActivationBoundaryLoss(nn.Module):
    """:func:`~dfad.functional.activation_boundary_loss` of one pair of taps, or summed over several.

    Args:
        margin: distance from zero that the student must keep, in activation units.
        weights: of the taps: a number for each, ``uniform`` (also None), or ``halving``: 1 for the last tap, and for
            each earlier one half of the weight of the tap after it (Heo et al., AAAI 2019).
        reduction: as in torch; ``none`` is for a single pair.
        fused: run the operator's kernels instead of its reference.
    """

    def __init__(
        self,
        margin: float = 1.0,
        weights: Sequence[float] | str | None = None,
        reduction: str = "mean",
        fused: bool = True,
    ) -> None:
        super().__init__()
        if isinstance(weights, str) and weights not in ("uniform", "halving"):
            raise ValueError(f"weights is {weights!r}; give 'uniform', 'halving', or a number for each tap.")
        self.margin = margin
        self.weights = weights
        self.reduction = reduction
        self.loss = _implementation(activation_boundary_loss, fused)

    def forward(self, student: Tensor | Sequence[Tensor], teacher: Tensor | Sequence[Tensor]) -> Tensor:
        """Both a tap ``(B, ...)``, or both a sequence of taps in the order of the network."""
        if isinstance(student, Tensor) and isinstance(teacher, Tensor):
            student, teacher = [student], [teacher]
        if len(student) != len(teacher):
            raise ValueError(
                f"The student has {len(student)} taps, the teacher {len(teacher)}; give the same number for both."
            )
        if len(student) == 0:
            raise ValueError("There are no taps; give one or more of each network.")
        if len(student) > 1 and self.reduction == "none":
            raise ValueError(
                f"reduction is 'none' for {len(student)} taps; give one pair, or choose another reduction."
            )
        losses = [self.loss(*_alike(s, t), self.margin, self.reduction) for s, t in zip(student, teacher, strict=True)]
        terms = [weighted(weight, loss) for weight, loss in zip(self._weights(len(losses)), losses, strict=True)]
        return sum(terms[1:], start=terms[0])

    def _weights(self, taps: int) -> Sequence[float]:
        if self.weights is None or self.weights == "uniform":
            return [1.0] * taps
        if self.weights == "halving":
            return [0.5 ** (taps - 1 - tap) for tap in range(taps)]
        if len(self.weights) != taps:
            raise ValueError(f"There are {len(self.weights)} weights for {taps} taps; give one for each.")
        return [float(weight) for weight in self.weights]


class InterpolatedKLDivLoss(nn.Module):
    """:func:`~dfad.functional.interpolated_kl_div`; with a mixing coefficient of 1 the plain distillation loss.

    Args:
        temperature: in units of the logits.
        reduction: as in :class:`torch.nn.KLDivLoss`.
        fused: run the operator's kernels instead of its reference.
    """

    def __init__(self, temperature: float = 1.0, reduction: str = "batchmean", fused: bool = True) -> None:
        super().__init__()
        self.temperature = temperature
        self.reduction = reduction
        self.loss = _implementation(interpolated_kl_div, fused)

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        mixing_coefficient: Tensor | float,
        partner: Tensor | None = None,
    ) -> Tensor:
        """See :func:`~dfad.functional.interpolated_kl_div`."""
        pair = _alike(student_logits, teacher_logits)
        return self.loss(*pair, mixing_coefficient, partner, self.temperature, self.reduction)


class Discrepancy(nn.Module):
    """The difference between the logits of student and teacher.

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


class FeatureMatchingLoss(nn.Module):
    """:func:`~dfad.functional.normalized_squared_error` summed over pairs of taps.

    Args:
        fused: run the operator's kernels instead of its reference.
        average: returns the mean over all shares of a batch, if the taps are those of a share; errors are then relative
            to the mean size.
    """

    def __init__(self, fused: bool = True, average: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.error = _implementation(normalized_squared_error, fused)
        self.average = average

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """Both a sequence of taps ``(B, ...)``, in the order of the network; the teacher's get no gradient."""
        pairs = [_alike(s, t.detach()) for s, t in zip(student, teacher, strict=True)]
        errors = [self.error(s, t, None if self.average is None else self.average(squared_norm(t))) for s, t in pairs]
        return torch.stack(errors).sum()


class BatchNormStatisticsLoss(nn.Module):
    """Distance between a batch's statistics and a network's, summed over its BatchNorms.

    See :func:`~dfad.functional.batchnorm_distance`.

    Args:
        norms: the BatchNorms, whose running statistics are read at each call; the list may change between calls.
        fused: run the operator's kernels instead of its reference.
        average: returns the whole batch's mean for that of a share, if the features are a share of the batch; the
            statistics are then computed by PyTorch's own operations.
    """

    def __init__(
        self, norms: Sequence[BatchNorm], fused: bool = True, average: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        super().__init__()
        self.norms = norms  # no ModuleList: they belong to the teacher
        self.distance = batchnorm_distance if fused else batchnorm_distance_reference
        self.average = average

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """The input of each BatchNorm, ``(B, channels, ...)``."""
        if self.average is not None:
            return self._of_shares(features, self.average)
        distances = [
            self.distance(x, norm.running_mean, norm.running_var)  # type: ignore[arg-type]
            for x, norm in zip(features, self.norms, strict=True)
        ]
        return torch.stack(distances).sum()

    def _of_shares(self, features: Sequence[Tensor], average: Callable[[Tensor], Tensor]) -> Tensor:
        """One average for the means of all BatchNorms and one for their variances."""
        moments = [torch.var_mean(x.to(compute_dtype(x)), dim=[0, *range(2, x.ndim)], correction=0) for x in features]
        own_variance, own_mean = (torch.cat(parts) for parts in zip(*moments, strict=True))
        mean = average(own_mean)
        variance = average(own_variance + (own_mean - mean).square())
        channels = [x.shape[1] for x in features]
        distances = [
            torch.linalg.vector_norm(m - norm.running_mean) + torch.linalg.vector_norm(v - norm.running_var)
            for m, v, norm in zip(mean.split(channels), variance.split(channels), self.norms, strict=True)
        ]
        return torch.stack(distances).sum()
