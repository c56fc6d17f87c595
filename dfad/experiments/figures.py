"""Pictures of comparisons."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dfad.runs.pictures import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def comparison_figure(record: Mapping[str, Any]) -> Figure:
    """Accuracy over images for every arm of a comparison: the mean over the seeds, and a standard deviation to either
    side. Images are student-images; in older records, which do not count these, generated images.

    Args:
        record: what :mod:`dfad.reproduce` writes.
    """
    figure = new_figure(9, 5)
    axes = figure.subplots()
    curves = [arm["curve"] for arm in record["arms"].values() if "curve" in arm]
    counted = all("student_images" in curve for curve in curves)
    axis, label = ("student_images", "images that the student was shown") if counted else ("images", "generated images")
    for number, (name, arm) in enumerate(record["arms"].items()):
        colour = f"C{number % 10}"
        if "curve" not in arm:
            axes.axhline(arm["accuracy"]["mean"], color=colour, linestyle=":", label=name)
            continue
        images, mean, std = (arm["curve"][key] for key in (axis, "mean", "std"))
        axes.plot(images, mean, color=colour, label=name)
        low, high = ([m + sign * d for m, d in zip(mean, std, strict=True)] for sign in (-1, 1))
        axes.fill_between(images, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.axhline(record["teacher_accuracy"], color="black", linestyle="--", linewidth=1, label="teacher")
    axes.set(title=record["comparison"], xlabel=label, ylabel="accuracy on real images")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="lower right")
    return figure
