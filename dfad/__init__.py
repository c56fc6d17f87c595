"""Data-free adversarial distillation with activation regularization and virtual interpolation."""

import os
from typing import TYPE_CHECKING, Any

# Idle threads of PyTorch's CPU kernels spin by default. On cores that anyone else uses too, a round was seen to take
# twenty times as long so; a thread that sleeps costs microseconds. Has no effect where torch was imported before.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

if TYPE_CHECKING:
    from dfad.config import DistillConfig
    from dfad.trainer import Distiller, Result, distill

__all__ = ["DistillConfig", "Distiller", "Result", "distill"]


def __getattr__(name: str) -> Any:
    # on first use, so that `import dfad.losses` loads the losses alone
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from dfad import config, trainer

    return getattr(config if name == "DistillConfig" else trainer, name)
