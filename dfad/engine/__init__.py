"""How a round runs on the machine at hand; one file per switch, named as the switch."""

from dfad.engine.engine import Engine, choose_device, wait_for
from dfad.engine.precision import has_bfloat16

__all__ = ["Engine", "choose_device", "has_bfloat16", "wait_for"]
