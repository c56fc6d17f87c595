"""The results of a finished run: networks, pictures and figures."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dfad.config import DistillConfig, StudentConfig
from dfad.errors import RunFolderError
from dfad.files import write_text
from dfad.models.factory import path_of
from dfad.models.model_file import save_model
from dfad.models.sources import architecture_of
from dfad.runs.pictures import new_figure, save_picture

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RESULT = "result.json"

SAMPLES = 32
"""Number of images in ``samples.png``."""

Normalisation = tuple[Sequence[float], Sequence[float]]


@dataclass(frozen=True)
class Samples:
    """Generated images with the teacher's predictions, on the CPU."""

    images: Tensor
    """``(B, channels, height, width)``, normalised as for the teacher."""
    labels: Tensor
    """``(B,)``."""
    confidences: Tensor
    """Probability of each label, ``(B,)``."""


def write_networks(
    folder: Path,
    config: DistillConfig,
    image_shape: tuple[int, int, int],
    normalisation: Normalisation,
    *,
    architecture: Mapping[str, Any],
    student: Mapping[str, Tensor],
    best: Mapping[str, Any],
    generator: Mapping[str, Tensor],
    rounds: int,
) -> None:
    """Write ``student.safetensors``, ``student_best.safetensors`` and ``generator.safetensors``.

    Args:
        folder: of the run.
        config: of the distillation.
        image_shape: ``(channels, height, width)`` of the generated images.
        normalisation: mean and standard deviation per channel of the student's images.
        architecture: how the student is built, see :func:`student_architecture`.
        student: weights after the last round.
        best: ``round``, ``agreement`` and weights (``state``) of the best student; empty where none was chosen.
        generator: weights after the last round.
        rounds: number of rounds that were run.
    """
    mean, std = normalisation
    of_student = {"architecture": architecture, "image_shape": image_shape, "mean": list(mean), "std": list(std)}
    save_model(folder / "student.safetensors", student, {**of_student, "round": rounds})
    if best:
        chosen = {"round": best["round"], "agreement": best["agreement"]}
        save_model(folder / "student_best.safetensors", best["state"], {**of_student, **chosen})
    kwargs = {"image_shape": image_shape, **dataclasses.asdict(config.generator)}
    of_generator = {"factory": "dfad.models.generator:Generator", "kwargs": kwargs}
    save_model(folder / "generator.safetensors", generator, {"architecture": of_generator})


def write_result(folder: Path, result: Mapping[str, Any]) -> None:
    """Write ``result.json``."""
    write_text(folder / RESULT, json.dumps(result, indent=2) + "\n")


def read_result(folder: Path) -> dict[str, Any]:
    """The content of ``result.json``; empty where there is none.

    Raises:
        RunFolderError: if it cannot be read.
    """
    path = folder / RESULT
    if not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise RunFolderError(f"{path} cannot be read: {error}.") from None


def write_pictures(
    folder: Path, samples: Samples, normalisation: Normalisation, history: Sequence[Mapping[str, float]]
) -> None:
    """Write ``samples.png`` and ``curves.png``, where matplotlib is installed.

    Args:
        folder: of the run.
        samples: for ``samples.png``.
        normalisation: mean and standard deviation per channel, to be undone; empty if unknown.
        history: the records of ``metrics.jsonl``.
    """
    save_picture(folder / "samples.png", lambda: samples_figure(samples, normalisation))
    save_picture(folder / "curves.png", lambda: curves_figure(history))


def student_architecture(student: nn.Module, config: StudentConfig) -> dict[str, Any]:
    """How a student is built: its factory or, without one, the name of its class for readers."""
    if config.factory:
        return architecture_of(config.factory, config.kwargs, config.taps)
    return {"factory": None, "class": path_of(type(student))}


def samples_figure(samples: Samples, normalisation: Normalisation) -> Figure:
    """Generated images, each titled with the teacher's label and its confidence."""
    pixels = to_pixels(samples.images, *normalisation)
    columns = 8
    rows = math.ceil(len(pixels) / columns)
    figure = new_figure(columns * 1.05, rows * 1.25)
    grid: Any = figure.subplots(rows, columns, squeeze=False)
    titles = zip(samples.labels.tolist(), samples.confidences.tolist(), strict=True)
    for axes, image, (label, confidence) in zip(grid.flat, pixels, titles, strict=False):
        axes.imshow(image, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        axes.set_title(f"{label}  {confidence:.0%}", fontsize=8)
    for axes in grid.flat:
        axes.axis("off")
    return figure


def to_pixels(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Any:
    """Images for display: an array ``(B, height, width[, 3])`` in 0–1.

    Args:
        images: ``(B, channels, height, width)``, normalised as for the teacher.
        mean: per channel, to be undone; without it, each image is stretched to its own range.
        std: likewise.
    """
    if mean:
        pixels = images * torch.tensor(std).view(-1, 1, 1) + torch.tensor(mean).view(-1, 1, 1)
    else:
        low, high = images.amin(dim=(1, 2, 3), keepdim=True), images.amax(dim=(1, 2, 3), keepdim=True)
        pixels = (images - low) / (high - low).clamp_min(1e-12)
    pixels = pixels.nan_to_num().clamp(0, 1)  # of a generator that has diverged
    # only one or three channels can be shown as they are
    return (pixels.permute(0, 2, 3, 1) if pixels.shape[1] == 3 else pixels.mean(dim=1)).numpy()


def curves_figure(history: Sequence[Mapping[str, float]]) -> Figure:
    """Losses, agreement and diversity of the generated images over the rounds."""
    panels = {
        "Losses": ("student_loss", "generator_loss"),
        "Student": ("agreement", "accuracy"),
        "Generated images": ("class_entropy", "teacher_confidence", "pairwise_diversity"),
    }
    figure = new_figure(12, 3.4)
    for axes, (title, names) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for name in names:
            points = [(record["round"], record[name]) for record in history if name in record]
            if points:
                axes.plot(
                    *zip(*points, strict=True),
                    label=name.replace("_", " "),
                    marker="." if len(points) < 30 else "",
                )
        axes.set(title=title, xlabel="round")
        axes.grid(alpha=0.3)
        if axes.has_data():
            axes.legend()
    return figure
