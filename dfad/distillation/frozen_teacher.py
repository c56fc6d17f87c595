"""The teacher as distilling needs it: frozen, in eval mode, and no slower than its convolutions."""

import copy
import logging

import torch
from torch import Tensor, nn

from dfad.engine import Engine
from dfad.engine.fold_batchnorm import fold_batchnorm
from dfad.errors import ModelError
from dfad.models.probing import as_outputs, parameter_count
from dfad.models.taps import BatchNormTaps, Outputs, has_batchnorm
from dfad.modes import BatchNorm

log = logging.getLogger(__name__)


class FrozenTeacher:
    """A teacher that never learns: eval mode always, no parameter gradients, on copies of its own.

    Args:
        teacher: copied, so that the caller's network is left as it was.
        engine: where and how it runs.
    """

    def __init__(self, teacher: nn.Module, engine: Engine) -> None:
        teacher = copy.deepcopy(teacher).eval().requires_grad_(False)
        self.parameter_count = parameter_count(teacher)
        self.norms: list[BatchNorm] = []
        """Its BatchNorms, in the order of what :meth:`with_statistics` returns of them."""
        self.measured: BatchNormTaps | None = None
        if has_batchnorm(teacher):
            # of the network as it is: through a folded one, statistics would be divided by the BatchNorms' scales,
            # which trained networks bring to zero
            self.measured = BatchNormTaps(copy.deepcopy(teacher))
            self.norms = self.measured.norms
            _place(self.measured, engine)
        if engine.fold_batchnorm:
            try:
                teacher = fold_batchnorm(teacher)
            except ModelError as reason:
                if engine.config.fold_batchnorm == "on":
                    raise
                log.info("Without engine.fold_batchnorm: %s", reason)
        self.network = _place(teacher.requires_grad_(False), engine)

    def __call__(self, images: Tensor) -> Outputs:
        """Logits and taps."""
        return as_outputs(self.network(images))

    @torch.no_grad()
    def without_gradient(self, images: Tensor) -> Outputs:
        """Logits and taps that no gradient flows back from."""
        return self(images)

    def with_statistics(self, images: Tensor) -> tuple[Outputs, tuple[Tensor, ...]]:
        """Logits, taps and what reached each BatchNorm; nothing of the latter where there is none."""
        if self.measured is None:
            return self(images), ()
        outputs, features = self.measured(images)
        return as_outputs(outputs), features


def _place(network: nn.Module, engine: Engine) -> nn.Module:
    if engine.dtype != torch.float32:
        # cast once; autocast would cast the weights again at each step
        for module in network.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                module.to(engine.dtype)
    return engine.place(network)
