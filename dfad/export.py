"""``python -m dfad.export RUN``: write a run's student in common formats, each compared with it."""

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dfad import cli
from dfad.assembly import Teacher, load_teacher
from dfad.config import Keywords
from dfad.data import in_order
from dfad.data.evaluation import BATCH_SIZE, Evaluator
from dfad.delivery.classifier import Classifier, Delivery
from dfad.delivery.export import (
    Exported,
    Format,
    LabelledImages,
    Measured,
    Request,
    default_formats,
    export,
    require_packages,
)
from dfad.delivery.images import GeneratedImages
from dfad.errors import DfadError, ModelError
from dfad.models.factory import build
from dfad.models.model_file import load_model, read_manifest
from dfad.models.weights import load_weights
from dfad.modes import set_mode
from dfad.presets import TrainConfig
from dfad.ranks import require_alone
from dfad.runs.folder import EXPORTS
from dfad.runs.report import RESULT, read_result
from dfad.runs.settings import saved_settings, to_tree
from dfad.terminal import configure_logging
from dfad.validation import not_negative, positive

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write a run's student in common formats: safetensors, a torch.export program, ONNX, a Hugging Face folder, and
    timm's format if it is a network of timm; on request also in 8 bits, and generated images.

    Each is loaded back and compared with the student on random and on generated images. If one differs, nothing is
    kept.

    Exit codes: 0 done; 2 option or run; 3 student, generator or teacher; 4 folder; 6 data; 7 an export that differs
    from the student, or cannot be made of it.
    """

    run: Annotated[Path, cli.Positional]
    """Folder of a finished run."""

    formats: tuple[Format, ...] = ()
    """Formats to write; by default all but int8 that this machine and the student allow."""

    weights: Literal["best", "last"] = "best"
    """The student that agreed most with the teacher on generated images, or the last one."""

    normalise: cli.Action = False
    """Build in the normalisation: exported networks take pixels in 0–1."""

    images: int = 0
    """Number of generated images to write, with the teacher's soft labels."""

    images_as: Literal["webdataset", "folder"] = "webdataset"
    """Tar shards, or a folder per class."""

    shard_size: int = 10_000
    """Images per shard."""

    calibration: int = 512
    """Number of generated images to calibrate the 8-bit student with."""

    tolerance: float = 1e-4
    """Largest allowed difference of a logit; proportionally larger if logits exceed 1."""

    factory: str | None = None
    """Callable that builds the student, if its file does not say: package.module:callable."""

    kwargs: Keywords = field(default_factory=dict)
    """Its keyword arguments."""

    output: Path | None = None
    """Folder to create; by default export in the run's folder."""

    overwrite: cli.Action = False
    """Replace that folder."""

    json: cli.Action = False
    """Print JSON instead of a table."""

    def __post_init__(self) -> None:
        not_negative(images=self.images)
        positive(shard_size=self.shard_size, calibration=self.calibration, tolerance=self.tolerance)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the arguments, export, print the files and their differences from the student."""
    command = cli.parse_flags(Export, arguments)
    require_alone("dfad.export", "Start one process.")
    configure_logging()
    settings = saved_settings(command.run, TrainConfig())
    require_packages(command.formats)
    delivery = load_student(command, settings)
    generator, _ = load_model(_file_of(command.run, "generator"))
    formats: Sequence[Format] = command.formats
    if not formats:
        formats, left_out = default_formats(delivery)
        for sentence in left_out:
            log.warning(sentence)
    teacher = test_images = None
    if command.images or "int8" in formats:
        teacher = find_teacher(settings, required=command.images > 0)
        test_images = find_test_images(settings, teacher)
    request = Request(
        formats,
        GeneratedImages(generator, settings.seed),
        tolerance=command.tolerance,
        calibration=command.calibration,
        images=command.images,
        images_as=command.images_as,
        shard_size=command.shard_size,
        teacher=Classifier(teacher.network) if teacher else None,
        test_images=test_images,
    )
    folder = command.output or command.run / EXPORTS
    exported = export(delivery, request, folder, overwrite=command.overwrite)
    if command.json:
        print(json.dumps({"folder": str(folder), **asdict(exported)}, indent=2))
        return
    Console().print(parts_table(exported, folder))
    if exported.before is not None and exported.after is not None:
        Console().print(int8_table(exported.before, exported.after, exported.same))
    log.info("Everything is in %s.", folder)


def load_student(command: Export, settings: TrainConfig) -> Delivery:
    """The student of a finished run, without its taps.

    Raises:
        ModelError: if the run is not finished, or the student's file does not say how it is built.
    """
    path = _file_of(command.run, "student")
    best = command.run / "student_best.safetensors"
    if command.weights == "best" and best.exists():
        path = best
    if command.factory:
        manifest = read_manifest(path)
        network = build(command.factory, command.kwargs)
        load_weights(network, path)
        manifest["architecture"] = {"factory": command.factory, "kwargs": command.kwargs}
    else:
        network, manifest = load_model(path, taps=())
    about = {"config": to_tree(settings), "result": read_result(command.run)}
    return Delivery(network.eval(), manifest, normalise=command.normalise, about=about)


def _file_of(run: Path, name: str) -> Path:
    path = run / f"{name}.safetensors"
    if not path.exists() or not (run / RESULT).exists():
        raise ModelError(f"{run} holds no finished run: there is no {path.name} in it. Finish it with --resume {run}.")
    return path


def find_teacher(settings: TrainConfig, *, required: bool) -> Teacher | None:
    """The run's teacher, in eval mode; None, with a line in the log, if it is missing and not required.

    Raises:
        ModelError: if it is required, but missing.
    """
    try:
        teacher = load_teacher(settings.teacher)
    except DfadError as error:
        if required:
            raise
        log.warning("Agreement with the teacher is not measured: %s", error)
        return None
    set_mode(teacher.network, training=False)
    return teacher


def find_test_images(settings: TrainConfig, teacher: Teacher | None) -> LabelledImages | None:
    """What goes through the test images of the run; None, with a line in the log, without them."""
    if not settings.evaluate:
        return None
    try:
        evaluate = Evaluator(settings.data, torch.device("cpu"), teacher.normalisation if teacher else None)
    except DfadError as error:
        log.warning("Accuracy is not measured: %s", error)
        return None

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        order = in_order(len(evaluate.dataset.test))
        for images, labels in evaluate.source.batches(order, BATCH_SIZE, drop_last=False):
            yield images.float(), labels

    return batches


def parts_table(exported: Exported, folder: Path) -> Table:
    """The written files as a table."""
    table = Table("", "", "MB", "difference", "logits", title=f"{folder}: largest difference from the student")
    for name, part in exported.parts.items():
        table.add_row(name, part.path, f"{part.bytes / 1e6:.3f}", f"{part.difference:.2e}", f"{part.of:.4g}")
    return table


def int8_table(before: Measured, after: Measured, same: float | None) -> Table:
    """The quality of the 8-bit student as a table."""

    def percent(value: float | None) -> str:
        return "not measured" if value is None else f"{value:.2%}"

    table = Table("", "student", "in 8 bits", title="Quantised")
    table.add_row("accuracy", percent(before.accuracy), percent(after.accuracy))
    table.add_row("agreement with the teacher on generated images", percent(before.agreement), percent(after.agreement))
    table.add_row("same class as the student", "", percent(same))
    return table


if __name__ == "__main__":
    cli.run(main)
