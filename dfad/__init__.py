"""Data-free adversarial distillation with activation regularization and virtual interpolation."""

import os
from typing import TYPE_CHECKING, Any

# How long idle threads of PyTorch's CPU kernels spin before they sleep; docs/engine.md has the measurements. Has no
# effect where torch was imported before.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

if TYPE_CHECKING:
    from dfad.config import DistillConfig
    from dfad.distillation.distiller import Distiller, Result, distill
    from dfad.models.sources import load_network

    __version__: str

__all__ = ["DistillConfig", "Distiller", "Result", "distill", "load_network"]


def __getattr__(name: str) -> Any:
    # on first use, so that `import dfad.losses` loads the losses alone
    if name == "__version__":
        from dfad.environment import version

        return version()
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from dfad import config
    from dfad.distillation import distiller
    from dfad.models import sources

    homes = {"DistillConfig": config, "load_network": sources}
    return getattr(homes.get(name, distiller), name)
