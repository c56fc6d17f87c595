"""Pictures, drawn if matplotlib is installed."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from dfad.errors import not_installed
from dfad.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

PNG_DPI = 110


def new_figure(width: float, height: float) -> Figure:
    """A figure of this size in inches; it needs no display."""
    # imported here because it takes half a second, and a run without a folder draws nothing
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save_picture(path: Path, draw: Callable[[], Figure]) -> None:
    """Draw a figure and write it as PNG; without matplotlib, log once that there are no pictures."""
    if can_draw():
        figure = draw()
        write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=PNG_DPI))


@functools.cache
def can_draw() -> bool:
    """Whether matplotlib is installed; the first call logs that it is not."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        log.warning("No pictures are written: %s", not_installed("matplotlib", "demo"))
        return False
    return True
