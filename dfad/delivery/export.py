"""Exports of a run in one folder; each is loaded back and compared before the folder appears."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from dfad.delivery import huggingface, int8, onnx, program, safetensors, timm
from dfad.delivery import images as image_files
from dfad.delivery.classifier import Delivery, Function, largest_difference
from dfad.delivery.images import GeneratedImages
from dfad.environment import versions
from dfad.errors import ConfigurationError, ExportError, RunFolderError
from dfad.files import whole_folder, write_text
from dfad.metrics import agreement, top_k_accuracy
from dfad.seeds import stream_seed

Format = Literal["safetensors", "program", "onnx", "huggingface", "timm", "int8"]

LabelledImages = Callable[[], Iterator[tuple[Tensor, Tensor]]]
"""A function that goes through batches of normalised images and their labels."""

RECORD = "export.json"

COMPARED = 256
"""Number of generated images for the comparison of the loaded networks with the student."""

INT8_TOLERANCE = 0.1
"""Largest mean difference between the 8-bit network in ONNX and the 8-bit program, in standard deviations of the
logits: runtimes round 8-bit sums differently."""


@dataclass(frozen=True)
class Part:
    """One exported file or folder."""

    path: str
    """Path in the folder."""
    bytes: int
    difference: float
    """Largest difference of a logit, or for images of a probability, after loading it back."""
    of: float
    """Largest absolute logit in that comparison."""


@dataclass(frozen=True)
class Measured:
    """The quality of a network, as far as teacher and data are available."""

    agreement: float | None = None
    """Agreement with the teacher on generated images."""
    accuracy: float | None = None
    """Accuracy on the run's test images."""


@dataclass(frozen=True)
class Exported:
    """The result of an export."""

    parts: dict[str, Part] = field(default_factory=dict)
    before: Measured | None = None
    """Quality of the student, if an 8-bit one was made."""
    after: Measured | None = None
    """Quality of the 8-bit student."""
    same: float | None = None
    """Fraction of generated images to which both give the same class."""


@dataclass(frozen=True)
class Request:
    """What to export, and what to compare it with."""

    formats: Sequence[Format]
    generated: GeneratedImages
    tolerance: float = 1e-4
    """Largest allowed difference of a logit, for logits up to 1; proportionally larger for larger ones."""
    calibration: int = 512
    """Number of generated images to calibrate the 8-bit network with."""
    images: int = 0
    """Number of generated images to write."""
    images_as: Literal["webdataset", "folder"] = "webdataset"
    shard_size: int = 10_000
    teacher: Function | None = None
    """A function from normalised images to logits; needed to write images, and to measure the 8-bit network."""
    test_images: LabelledImages | None = None
    """To measure the 8-bit network."""


def default_formats(delivery: Delivery) -> tuple[list[Format], list[str]]:
    """The formats that this student and machine allow, and a sentence about each other one."""
    formats: list[Format] = ["safetensors", "program", "huggingface"]
    left_out = []
    if missing := onnx.missing():
        left_out.append(f"No ONNX is written: {missing}")
    else:
        formats.append("onnx")
    if timm.of_family(delivery):
        if delivery.normalise:
            left_out.append(f"No timm folder is written: {timm.NORMALISED}")
        else:
            formats.append("timm")
    return formats, left_out


def require_packages(formats: Sequence[Format]) -> None:
    """Check that the packages of the formats are installed.

    Raises:
        ConfigurationError: naming the missing package.
    """
    for name, missing in (("onnx", onnx.missing), ("int8", int8.missing)):
        if name in formats and (sentence := missing()):
            raise ConfigurationError(f"--formats {name} cannot be written: {sentence}")


def export(delivery: Delivery, request: Request, folder: Path, *, overwrite: bool = False) -> Exported:
    """Write everything into a folder, which appears whole or not at all.

    Args:
        delivery: the student.
        request: what to export.
        folder: to be created.
        overwrite: replace it.

    Raises:
        ExportError: if a format cannot be written, or its results differ from the student's.
        RunFolderError: if the folder exists, or cannot be written; one with other files is never replaced.
        ModelError: if the student's file lacks what a format needs.
    """
    require_packages(request.formats)
    if folder.is_dir() and any(folder.iterdir()) and not (folder / RECORD).exists():
        raise RunFolderError(f"{folder} holds files that are not an export's. Choose another --output.")
    with whole_folder(folder, overwrite=overwrite) as new:
        work = _Export(delivery, request, new)
        exported = work.run()
        record = {
            "student": delivery.manifest.get("weights_sha256"),
            "round": delivery.manifest.get("round"),
            "normalise": delivery.normalise,
            "tolerance": request.tolerance,
            "parts": {name: vars(part) for name, part in exported.parts.items()},
            "int8": None if exported.after is None else {
                "calibration": request.calibration, "before": vars(exported.before), "after": vars(exported.after),
                "same_class": exported.same,
            },
            "versions": versions(),
        }  # fmt: skip
        write_text(new / RECORD, json.dumps(record, indent=2) + "\n")
    return exported


class _Export:
    def __init__(self, delivery: Delivery, request: Request, folder: Path) -> None:
        self.delivery = delivery
        self.request = request
        self.folder = folder
        self.original = delivery.classifier
        self.parts: dict[str, Part] = {}

    def run(self) -> Exported:
        formats: dict[str, tuple[str, Any]] = {
            "safetensors": ("student.safetensors", safetensors),
            "program": ("student.pt2", program),
            "onnx": ("student.onnx", onnx),
            "huggingface": ("huggingface", huggingface),
            "timm": ("timm", timm),
        }
        for name, (file, module) in formats.items():
            if name in self.request.formats:
                path = self.folder / file
                module.write(self.delivery, path)
                self.compare(name, path, module.read(path))
        before = after = same = None
        if "int8" in self.request.formats:
            before, after, same = self.quantise()
        if self.request.images:
            self.write_images()
        return Exported(self.parts, before, after, same)

    def batches(self) -> Iterator[Tensor]:
        """Images for the exported network: random ones in batches of several sizes, and generated ones."""
        rng = torch.Generator().manual_seed(stream_seed(self.request.generated.seed, "export"))
        for size in (1, 2, 7):
            yield self.delivery.as_taken(torch.randn(size, *self.delivery.image_shape, generator=rng))
        for images in self.request.generated.batches(COMPARED, "export"):
            yield self.delivery.as_taken(images)

    def compare(self, name: str, path: Path, loaded: Function, original: Function | None = None) -> None:
        """Record the difference between the loaded network and the original.

        Raises:
            ExportError: if it is too large.
        """
        try:
            difference, magnitude = largest_difference(original or self.original, loaded, self.batches())
        except ExportError as error:
            raise ExportError(f"The {name} was written and loaded back, but: {error} Nothing was kept.") from error
        if difference > self.request.tolerance * max(1.0, magnitude):
            raise ExportError(
                f"The results of the {name} differ from the student's: logits of up to {magnitude:.4g} differ by up to "
                f"{difference:.3g}, and --tolerance {self.request.tolerance:g} allows "
                f"{self.request.tolerance * max(1.0, magnitude):.3g}. Nothing was kept."
            )
        self.parts[name] = Part(path.name, _size(path), difference, magnitude)

    def quantise(self) -> tuple[Measured, Measured, float]:
        """Write the 8-bit student as a program and, if possible, in ONNX; measure it and the student."""
        request, delivery = self.request, self.delivery
        calibration = map(delivery.as_taken, request.generated.batches(request.calibration, "calibration"))
        quantised = int8.quantised(delivery, calibration)
        path = self.folder / "student-int8.pt2"
        program.save(quantised, path, delivery)
        in_memory: Any = quantised.module()
        self.compare("int8", path, int8.read(path), in_memory)
        if not onnx.missing():
            self.quantise_onnx(quantised, in_memory)
        images = torch.cat([delivery.as_taken(batch) for batch in request.generated.batches(1024, "measure")])
        with torch.no_grad():
            same = agreement(in_memory(images), self.original(images))
        return self.measured(self.original), self.measured(in_memory), same

    def quantise_onnx(self, quantised: Any, in_memory: Function) -> None:
        path = self.folder / "student-int8.onnx"
        onnx.save(quantised, path)
        loaded = onnx.read(path)
        images = torch.cat([batch for batch in self.batches() if len(batch) > 2])
        with torch.no_grad():
            wanted = in_memory(images)
        gap = (loaded(images) - wanted).abs()
        if not gap.mean() <= INT8_TOLERANCE * wanted.std():
            raise ExportError(
                f"The results of the 8-bit network in ONNX differ from the 8-bit program's: their logits differ by "
                f"{gap.mean():.3g} on average. Nothing was kept."
            )
        self.parts["int8 in ONNX"] = Part(path.name, _size(path), gap.max().item(), wanted.abs().max().item())

    @torch.no_grad()
    def measured(self, network: Function) -> Measured:
        """Measure a network, as far as teacher and data are available."""
        request, delivery = self.request, self.delivery
        agreeing = accuracy = None
        if request.teacher is not None:
            images = torch.cat(list(request.generated.batches(1024, "measure")))
            agreeing = agreement(network(delivery.as_taken(images)), request.teacher(images))
        if request.test_images is not None:
            pairs = [(network(delivery.as_taken(images)), labels) for images, labels in request.test_images()]
            logits, labels = map(torch.cat, zip(*pairs, strict=True))
            accuracy = top_k_accuracy(logits, labels)
        return Measured(agreeing, accuracy)

    def write_images(self) -> None:
        request = self.request
        assert request.teacher is not None, "the caller has seen to it"
        path = self.folder / "images"
        image_files.write(
            path,
            request.generated.batches(request.images, "images"),
            request.teacher,
            (self.delivery.mean, self.delivery.std),
            form=request.images_as,
            shard_size=request.shard_size,
        )
        difference = image_files.check(path, request.teacher)
        if difference > request.tolerance:
            raise ExportError(
                f"The images were written and read back, but the teacher's probabilities differ by up to "
                f"{difference:.3g} from the soft labels; --tolerance allows {request.tolerance:g}. Nothing was "
                "kept."
            )
        self.parts["images"] = Part(path.name, _size(path), difference, 1.0)


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in (path, *path.rglob("*")) if file.is_file())
