"""``python -m dfad.evaluate``: measure a network on real data, alone and against its teacher."""

import dataclasses
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from dfad import cli
from dfad.assembly import load_teacher
from dfad.cli import Action
from dfad.config import Keywords
from dfad.data import DataConfig, Dataset, batch_source, open_dataset
from dfad.data.evaluation import predict
from dfad.engine import choose_device
from dfad.errors import ConfigurationError, ModelError, name_of
from dfad.files import write_text
from dfad.metrics import agreement, confusion_matrix, expected_calibration_error, teacher_divergence, top_k_accuracy
from dfad.models.probing import Images, images_taken, require_same_classes
from dfad.models.sources import Loaded, load, load_trained
from dfad.presets import TrainConfig
from dfad.ranks import current_ranks, joined
from dfad.runs.pictures import new_figure, save_picture
from dfad.runs.settings import SETTINGS_FILE, override, saved_settings
from dfad.terminal import configure_logging

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

JSON_FILE, PICTURE_FILE = "evaluation.json", "confusion.png"

OF_MODEL = "of-model"
"""Stands for the data set that the model's file names."""


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Measure a network on real data, alone and against its teacher.

    Exit codes: 0 done; 2 option; 3 model; 4 output folder; 6 data; 8 another process has ended or hangs.
    """

    model: str
    """The network: timm:NAME, torchvision:NAME, hf:FOLDER-or-NAME, a file that holds one, or a file of its weights.
    Given first, it needs no flag."""

    factory: str | None = None
    """Callable that builds it, if its file does not say: package.module:callable, a bare name of dfad.models, or one of
    the names above."""

    kwargs: Keywords = field(default_factory=dict)
    """Keyword arguments of the factory."""

    checkpoint_key: str | None = None
    """Entry of a larger checkpoint that holds the weights, such as ema; detected by default."""

    mean: tuple[float, ...] = ()
    """Mean per channel that its images are normalised with (pixels in 0–1); by default its file's or the data set's."""

    std: tuple[float, ...] = ()
    """Standard deviation per channel, with the same default."""

    teacher: str | None = None
    """Teacher to compare with, named like the model; or the folder of a run, for its teacher."""

    data: DataConfig = DataConfig(name=OF_MODEL)

    split: Literal["train", "test"] = "test"
    """Split of the data set to measure on."""

    device: str = "auto"
    """cpu, cuda or cuda:N; auto takes a GPU where there is one."""

    output: Path | None = None
    """Folder for evaluation.json and confusion.png; by default neither is written."""

    json: Action = False
    """Print JSON instead of a table."""

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std):
            raise ValueError(f"mean {self.mean} and std {self.std} must be given together, one value per channel")


@joined()
def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the arguments, measure the network, print the figures."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments and not arguments[0].startswith("-"):
        arguments.insert(0, "--model")
    command = cli.parse_flags(Evaluate, arguments)
    configure_logging()
    device = choose_device(command.device)
    loaded = _load(command)
    dataset = open_dataset(_data_config(command, loaded.manifest))
    _warn_about_images(command, loaded, dataset)
    normalised = _normalised(dataset, command.model, Images(None, command.mean, command.std), loaded.images)
    logits, labels = _predictions(command, loaded.network, normalised, device)
    teacher_logits = None
    if command.teacher is not None:
        teacher, images = _load_teacher(command.teacher)
        normalised = _normalised(dataset, command.teacher, images, Images(None, command.mean, command.std))
        teacher_logits, _ = _predictions(command, teacher, normalised, device)
    figures = measure(logits, labels, dataset.classes, teacher_logits)
    about = {
        "model": command.model,
        "data": dataset.name,
        "split": command.split,
        "fingerprint": dataset.fingerprint,
        "images": len(labels),
        "skipped": list(dataset.skipped),
    }
    text = json.dumps({**about, **figures}, indent=2, ensure_ascii=False)
    if command.output is not None and current_ranks().first:
        write_text(command.output / JSON_FILE, text)
        confusion = torch.tensor(figures["confusion"])
        save_picture(command.output / PICTURE_FILE, lambda: confusion_figure(confusion, dataset.classes))
    if command.json:
        print(text)
    else:
        Console().print(summary_table(about, figures))
        Console().print(class_table(figures))


def _load(command: Evaluate) -> Loaded:
    if command.factory is None:
        return load_trained(command.model)
    return load(command.factory, command.model, checkpoint_key=command.checkpoint_key, kwargs=command.kwargs)


def _load_teacher(source: str) -> tuple[nn.Module, Images]:
    """The teacher, of a run if a run's folder is named, and its images."""
    if not (Path(source) / SETTINGS_FILE).is_file():
        loaded = load_trained(source)
        return loaded.network, loaded.images
    teacher = load_teacher(saved_settings(Path(source), TrainConfig()).teacher)
    mean, std = teacher.normalisation or ((), ())
    return teacher.network, Images(None, tuple(mean), tuple(std))


def _data_config(command: Evaluate, manifest: Mapping[str, Any]) -> DataConfig:
    if command.data.name != OF_MODEL:
        return command.data
    recorded = manifest.get("recipe", {}).get("data")
    if recorded is None:
        raise ConfigurationError(
            f"{command.model} does not say which data it was trained on. Give --data.name and, for data sets "
            "in files, --data.root."
        )
    named = override(DataConfig(), recorded, source=str(command.model))
    given = {
        spec.name: getattr(command.data, spec.name)
        for spec in dataclasses.fields(DataConfig)
        if spec.name != "name" and getattr(command.data, spec.name) != spec.default
    }
    return dataclasses.replace(named, **given)


def _warn_about_images(command: Evaluate, loaded: Loaded, dataset: Dataset) -> None:
    """Log in what the images differ from those that the model was trained on."""
    recorded = loaded.manifest.get("data", {})
    if recorded.get("fingerprint") not in (None, dataset.fingerprint) and dataset.name == recorded["name"]:
        log.warning("This is not the data that the model was trained on: the fingerprints differ.")
    size = loaded.image_shape[1:] if loaded.image_shape else loaded.images.size
    if size and tuple(size) != dataset.image_shape[1:]:
        log.warning(
            "The images of %s have %d×%d pixels, those of %s %d×%d. Image files are resized by --data.image_size.",
            *(dataset.name, *dataset.image_shape[1:], command.model, *size),
        )


def _normalised(dataset: Dataset, source: str, *known: Images) -> Dataset:
    """The data set, normalised as the first of what is known says, else with its own statistics."""
    mean, std = next(((images.mean, images.std) for images in known if images.mean), (dataset.mean, dataset.std))
    if not any(images.mean for images in known):
        log.warning(
            "%s does not say how its images are normalised. Mean %s and standard deviation %s of %s are taken; if it "
            "was trained with others, give --mean and --std.",
            source,
            *(", ".join(f"{value:.4g}" for value in values) for values in (mean, std)),
            dataset.name,
        )
    if len(mean) != dataset.image_shape[0]:
        raise ModelError(
            f"The model's images have {len(mean)} channels, those of {dataset.name} {dataset.image_shape[0]}. Choose "
            "other data, or give --mean and --std with one value per channel."
        )
    return dataclasses.replace(dataset, mean=mean, std=std)


def _predictions(
    command: Evaluate, network: nn.Module, dataset: Dataset, device: torch.device
) -> tuple[Tensor, Tensor]:
    split = getattr(dataset, command.split)
    source = batch_source(dataset, split, command.data.backend, device)
    remedy = "Choose other data, or --data.image_size for image files."
    with images_taken(name_of(network), f"the images of {dataset.name}", dataset.image_shape, remedy):
        logits, labels = predict(network.to(device), source, len(split))
    remedy = "Choose the data that it was trained for."
    require_same_classes(network, logits.shape[1], dataset.name, len(dataset.classes), remedy)
    return logits, labels


def measure(
    logits: Tensor, labels: Tensor, classes: Sequence[str], teacher_logits: Tensor | None = None
) -> dict[str, Any]:
    """All figures, as JSON values.

    Args:
        logits: ``(B, classes)``.
        labels: ``(B,)``.
        classes: their names.
        teacher_logits: of the same images.
    """
    confusion = confusion_matrix(logits, labels)
    counts = confusion.sum(dim=1)
    figures: dict[str, Any] = {"top1": top_k_accuracy(logits, labels)}
    if len(classes) > 5:
        figures["top5"] = top_k_accuracy(logits, labels, k=5)
    figures["expected_calibration_error"] = expected_calibration_error(logits, labels)
    if teacher_logits is not None:
        figures["teacher"] = {
            "top1": top_k_accuracy(teacher_logits, labels),
            "agreement": agreement(logits, teacher_logits),
            "kl_divergence": teacher_divergence(logits, teacher_logits),
        }
    figures["per_class"] = {
        name: {"images": int(count), "accuracy": int(right) / int(count) if count else None}
        for name, count, right in zip(classes, counts, confusion.diagonal(), strict=True)
    }
    return {**figures, "confusion": confusion.tolist()}


def summary_table(about: Mapping[str, Any], figures: Mapping[str, Any]) -> Table:
    """The figures over all classes."""
    table = Table(
        "", "value", title=f"{about['model']} on {about['data']} ({about['split']}, {about['images']} images)"
    )
    table.add_row("top-1 accuracy", f"{figures['top1']:.4f}")
    if "top5" in figures:
        table.add_row("top-5 accuracy", f"{figures['top5']:.4f}")
    table.add_row("expected calibration error", f"{figures['expected_calibration_error']:.4f}")
    if "teacher" in figures:
        teacher = figures["teacher"]
        table.add_row("teacher's top-1 accuracy", f"{teacher['top1']:.4f}")
        table.add_row("agreement with the teacher", f"{teacher['agreement']:.4f}")
        table.add_row("KL(teacher ‖ student), nats", f"{teacher['kl_divergence']:.4f}")
    if about["skipped"]:
        table.add_row("corrupt files skipped", str(len(about["skipped"])))
    return table


def class_table(figures: Mapping[str, Any]) -> Table:
    """The figures of each class."""
    table = Table("class", "images", "accuracy")
    for name, row in figures["per_class"].items():
        table.add_row(name, str(row["images"]), "–" if row["accuracy"] is None else f"{row['accuracy']:.4f}")
    return table


def confusion_figure(confusion: Tensor, classes: Sequence[str]) -> "Figure":
    """The confusion matrix as a picture; each row is normalised by the images of its class."""
    shares = confusion / confusion.sum(dim=1, keepdim=True).clamp_min(1)
    side = max(4.0, min(16.0, 0.45 * len(classes) + 2))
    figure = new_figure(side, side)
    axes = figure.subplots()
    axes.imshow(shares.numpy(), vmin=0, vmax=1, cmap="Blues")
    axes.set(xlabel="taken for", ylabel="class", title="Confusion, in parts of the class")
    if len(classes) <= 30:  # with more classes the numbers are not readable
        places = range(len(classes))
        axes.set_xticks(places, classes, rotation=90)
        axes.set_yticks(places, classes)
        for row in places:
            for column in places:
                if confusion[row, column]:
                    shade = "white" if shares[row, column] > 0.5 else "black"
                    text = str(int(confusion[row, column]))
                    axes.text(column, row, text, ha="center", va="center", color=shade, fontsize=7)
    return figure


if __name__ == "__main__":
    cli.run(main)
