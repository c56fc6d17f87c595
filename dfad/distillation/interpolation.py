"""Virtual interpolation: mixed images in a student step."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from dfad import functional
from dfad.config import InterpolationConfig
from dfad.distillation.beta import symmetric_beta
from dfad.losses import InterpolatedKLDivLoss
from dfad.models.outputs import as_outputs
from dfad.models.taps import Outputs
from dfad.modes import statistics_kept
from dfad.ranks import ALONE, Ranks


class VirtualInterpolation:
    """The form of virtual interpolation that a configuration selects.

    By the configuration's ``step``, mixed images replace a share of the batch (:meth:`within`), add a term to the loss
    of a student step (:meth:`joint_terms`), or get a separate step (:meth:`own_loss`). The methods of the other forms
    then do nothing.

    Args:
        config: the form; with a weight of 0, nothing is mixed.
        batch_size: images of a student step, of all ranks.
        rng: the random stream of the mixing coefficients; all tensors are on its device.
        student: sees the mixed images of the last two forms.
        teacher: is queried at them, if the configuration says so.
        fused: see :class:`~dfad.losses.InterpolatedKLDivLoss`.
        ranks: which draw the same coefficients; each has the images of its share, and their partners among them.
    """

    def __init__(
        self,
        config: InterpolationConfig,
        batch_size: int,
        rng: torch.Generator,
        student: nn.Module,
        teacher: Callable[[Tensor], Outputs],
        *,
        fused: bool,
        ranks: Ranks = ALONE,
    ) -> None:
        self.config = config
        self.rng = rng
        self.ranks = ranks
        self.student = student
        self.teacher = teacher
        self.divergence = InterpolatedKLDivLoss(config.temperature, fused=fused)
        self.form = config.step if config.weight else None
        replaced = round(config.weight * batch_size) if self.form == "within" else 0
        self.unmixed = ranks.share(torch.arange(batch_size, device=rng.device) < batch_size - replaced)
        shape = (batch_size, 2) if config.coefficient == "sample" else (2,)
        self.concentration = torch.full(shape, config.concentration, device=rng.device)
        one = torch.ones(shape[:-1], device=rng.device)
        self.one = ranks.share(one) if one.ndim else one

    def within(self, images: Tensor) -> Tensor:
        """The images of a student step, the last of them mixed."""
        if self.form != "within":
            return images
        return functional.mix(images, self.sample_coefficient().masked_fill(self.unmixed, 1.0))

    def joint_terms(self, images: Tensor, teacher_logits: Tensor) -> dict[str, Tensor]:
        """The loss term of mixed images, by its name; these are mixed from the images of the step."""
        if self.form != "joint":
            return {}
        return {"interpolation": self._loss(images, teacher_logits, self._divergence_from_teacher)}

    def own_loss(
        self, images: Tensor, teacher_logits: Tensor, imitation: Callable[[Outputs, Outputs], Tensor]
    ) -> Tensor | None:
        """The loss of a separate step on images mixed from those of the step before.

        Args:
            images: to be mixed with those of the reversed batch.
            teacher_logits: of the unmixed images, for interpolated labels.
            imitation: the loss of all other images, used where the teacher is queried at the mixed images.
        """
        return self._loss(images, teacher_logits, imitation) if self.form == "own" else None

    def _loss(self, images: Tensor, teacher_logits: Tensor, imitation: Callable[[Outputs, Outputs], Tensor]) -> Tensor:
        coefficient = self.sample_coefficient()
        mixed = functional.mix(images, coefficient)
        with self._statistics():
            student = as_outputs(self.student(mixed))
        if self.config.labels == "interpolated":
            return self.divergence(student.logits, teacher_logits, coefficient)
        with torch.no_grad():
            teacher = self.teacher(mixed)
        return imitation(student, teacher)

    def _divergence_from_teacher(self, student: Outputs, teacher: Outputs) -> Tensor:
        loss: Tensor = self.divergence(student.logits, teacher.logits, self.one)
        return loss

    def sample_coefficient(self) -> Tensor:
        """Mixing coefficients of shape ``(batch,)`` or ``()``, drawn from the symmetric Beta distribution."""
        drawn = symmetric_beta(self.concentration, self.rng)
        return self.ranks.share(drawn) if drawn.ndim else drawn

    def _statistics(self) -> AbstractContextManager[None]:
        return nullcontext() if self.config.batchnorm == "update" else statistics_kept(self.student)
