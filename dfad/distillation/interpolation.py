"""Virtual interpolation: how images mixed with one another enter a student step."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from dfad import functional
from dfad.config import InterpolationConfig
from dfad.losses import InterpolatedKLDivLoss
from dfad.modes import statistics_kept


class VirtualInterpolation:
    """The form that a configuration asks for.

    Mixed images join the loss of a student step with a term of their own, are learned in an optimizer step of their
    own, or take the place of a share of the batch; the ``step`` of the configuration.

    Args:
        config: the form; of weight 0, nothing is mixed.
        batch_size: images of a student step.
        rng: the random stream of the mixing coefficients; all are on its device.
        fused: see :class:`~dfad.losses.InterpolatedKLDivLoss`.
    """

    def __init__(self, config: InterpolationConfig, batch_size: int, rng: torch.Generator, *, fused: bool) -> None:
        self.config = config
        self.rng = rng
        self.joins_the_loss = config.weight > 0 and config.step == "joint"
        self.has_own_step = config.weight > 0 and config.step == "own"
        self.asks_the_teacher = config.labels == "teacher"
        self.divergence = InterpolatedKLDivLoss(config.temperature, fused=fused)
        """Of a student from interpolated labels; from those of one image where the coefficient is 1."""
        replaced = round(config.weight * batch_size) if config.step == "within" else 0
        self.unmixed = torch.arange(batch_size, device=rng.device) < batch_size - replaced if replaced else None
        shape = (batch_size, 2) if config.coefficient == "sample" else (2,)
        self.concentration = torch.full(shape, config.concentration, device=rng.device)

    def sample_coefficient(self) -> Tensor:
        """Mixing coefficients of shape ``(batch,)`` or ``()``, drawn from the symmetric Beta distribution."""
        # the first of two Dirichlet components is Beta distributed; the public samplers take no generator
        return torch._sample_dirichlet(self.concentration, self.rng)[..., 0]

    def within(self, images: Tensor) -> Tensor:
        """The images of a student step, the last of them mixed where the form is to mix a share of the batch."""
        if self.unmixed is None:
            return images
        return functional.mix(images, self.sample_coefficient().masked_fill(self.unmixed, 1.0))

    def statistics(self, student: nn.Module) -> AbstractContextManager[None]:
        """Whether mixed images move the running statistics of the student's BatchNorms."""
        return nullcontext() if self.config.batchnorm == "update" else statistics_kept(student)
