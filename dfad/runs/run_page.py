"""``report.html``: description, results and use of a run, for readers who have only its folder."""

import math
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dfad.environment import processor, versions
from dfad.files import write_text
from dfad.metrics import confusion_matrix
from dfad.runs.page import chart, image, page, percent, scrolled, table, tiles
from dfad.runs.settings import leaves, to_tree
from dfad.runs.snapshots import Snapshot
from dfad.runs.trend import verdict

REPORT = "report.html"

IMAGE_BYTES = 450_000
"""Bytes of all images of a page before compression."""

LISTED = 20
"""Largest number of classes with a full confusion matrix, and number of listed confusions for more classes."""

PANELS: dict[str, Sequence[str]] = {
    "Agreement and accuracy": ("agreement", "accuracy"),
    "Losses": ("student_loss", "generator_loss"),
    "Generated images": ("class_entropy", "teacher_confidence", "pairwise_diversity"),
    "Distance of BatchNorm statistics": ("batchnorm_distance",),
    "Rounds per second": ("rounds_per_second",),
}
"""Curves of metrics by the titles of their charts."""


@dataclass(frozen=True)
class RunFacts:
    """The content of the page."""

    config: Any
    """A dataclass of settings."""
    result: Mapping[str, Any]
    history: Sequence[Mapping[str, float]]
    snapshots: Sequence[Snapshot]
    teacher_logits: Tensor
    """The teacher's logits for generated images, ``(B, classes)``, on the CPU."""
    student_logits: Tensor
    """The last student's logits for the same images."""
    parameters: Mapping[str, int]
    """Parameter counts of teacher, student and generator."""
    teacher_hash: str
    """SHA-256 of its weights."""
    architecture: Mapping[str, Any]
    """How the student is built, see :func:`dfad.runs.report.student_architecture`."""
    image_shape: tuple[int, int, int]
    normalisation: tuple[Sequence[float], Sequence[float]]
    device: str


def write_page(folder: Path, facts: RunFacts) -> None:
    """Write ``report.html`` into a run's folder."""
    write_text(folder / REPORT, page(f"{_title(facts)} · dfad", run_page(facts, folder)))


def drawn_at_random(share: float) -> str:
    """What a sentence that says a student learned on generated images goes on with where random fields replace some."""
    return f", but for {share:.0%} of them, which were strokes and blobs drawn at random" if share else ""


def run_page(facts: RunFacts, folder: Path) -> Iterator[str]:
    """The page's parts, as HTML.

    Args:
        facts: of the run.
        folder: of the run, for commands to copy.
    """
    result, parameters = facts.result, facts.parameters
    best = result.get("best_agreement") if result.get("best_agreement") is not None else result.get("agreement")
    yield f"<h1>{escape(_title(facts))}</h1>"
    yield (
        f'<p class="quiet">A student of {parameters["student"]:,} parameters learned from a teacher of '
        f"{parameters['teacher']:,} parameters on generated images"
        f"{drawn_at_random(facts.config.method.random_fields.share)}, without any data.</p>"
    )
    figures = {"agreement with the teacher on generated images": percent(best)}
    if result.get("accuracy") is not None:
        figures["accuracy on test images, not used for selection"] = percent(
            result.get("best_accuracy") if result.get("best_accuracy") is not None else result["accuracy"]
        )
    figures |= {
        "size of the student relative to the teacher": f"{parameters['student'] / max(1, parameters['teacher']):.1%}",
        "rounds": f"{result['rounds']:,}",
        "images generated": f"{result['images']:,}",
        "seconds": f"{result['seconds']:,.0f}",
    }
    yield tiles(figures)
    yield "<h2>What was distilled into what</h2>"
    yield table("Networks", _networks(facts))
    yield "<h2>Curves</h2>"
    yield '<p class="quiet">Point at a curve, or move along it with the arrow keys, to read its values.</p>'
    yield f'<div class="charts">{"".join(charts(facts.history))}</div>'
    yield f"<p>{escape(verdict(facts.history))}</p>"
    yield "<h2>Generated images</h2>"
    yield from _images(facts)
    yield "<h2>Classes of the generated images</h2>"
    yield from _classes(facts.teacher_logits)
    yield "<h2>Teacher and student on generated images</h2>"
    yield from _confusion(facts.teacher_logits, facts.student_logits)
    yield "<h2>Use the student</h2>"
    yield from _usage(facts, folder)
    yield "<h2>Cost</h2>"
    yield table("What the run took", _cost(result), numbers=True)
    yield "<h2>Environment</h2>"
    yield table("Where it ran", ((escape(name), escape(value)) for name, value in environment(facts.device).items()))
    yield "<h2>Settings</h2>"
    yield from _settings(facts.config)


def charts(history: Sequence[Mapping[str, float]]) -> Iterator[str]:
    """The charts of a history of metrics, including the terms of the losses."""
    names = {name for record in history for name in record}
    panels = dict(PANELS)
    for network in ("student", "generator"):
        panels[f"Terms of the {network}'s loss"] = sorted(n for n in names if n.startswith(f"{network}/"))
    for title, metrics in panels.items():
        yield chart(title, {plain(name): curve(history, name) for name in metrics})


def curve(history: Iterable[Mapping[str, float]], name: str) -> list[tuple[float, float]]:
    """A metric over the rounds."""
    return [(record["round"], record[name]) for record in history if name in record]


def plain(name: str) -> str:
    """A metric's readable name."""
    return name.rpartition("/")[2].replace("_", " ")


def environment(device: str) -> dict[str, str]:
    """A description of the machine of a run."""
    found = {"device": device, "processor": f"{processor()}, {torch.get_num_threads()} threads"}
    if device.startswith("cuda"):
        found["GPU"] = torch.cuda.get_device_name(device)
    return found | {"system": platform.platform(terse=True)} | versions()


def _title(facts: RunFacts) -> str:
    architecture = facts.architecture
    student = architecture.get("factory") or architecture.get("class") or "a network of its own"
    return f"{str(student).rpartition(':')[2]}, distilled from {_teacher(facts)}"


def _teacher(facts: RunFacts) -> str:
    teacher = facts.config.teacher
    if teacher.factory:
        return str(teacher.factory).rpartition(":")[2]
    if teacher.checkpoint:
        return Path(teacher.checkpoint).name
    return f"the teacher of {teacher.recipe}" if teacher.recipe else "a network given in Python"


def _networks(facts: RunFacts) -> Iterator[Sequence[str]]:
    channels, height, width = facts.image_shape
    mean, std = facts.normalisation
    known = f", normalised with mean {per_channel(mean)} and standard deviation {per_channel(std)}" if mean else ""
    images = f"images of {channels}×{height}×{width}{known}"
    student = facts.architecture.get("factory") or facts.architecture.get("class") or "given in Python"
    given = facts.architecture.get("kwargs") or {}
    generator = facts.config.generator
    described = {
        "teacher": (_teacher(facts), images, f"SHA-256 of its weights {facts.teacher_hash[:16]}…"),
        "student": (str(student), *([f"arguments {given}"] if given else [])),
        "generator": (f"noise of {generator.noise_dim} numbers", f"width {generator.width}"),
    }
    for name, (first, *others) in described.items():
        yield name, "<br>".join(map(escape, [first, f"{facts.parameters[name]:,} parameters", *others]))


def per_channel(values: Sequence[float]) -> str:
    """Numbers per channel, for people."""
    return "(" + ", ".join(f"{value:.4g}" for value in values) + ")"


def _images(facts: RunFacts) -> Iterator[str]:
    if not facts.snapshots:
        yield '<p class="quiet">None were kept.</p>'
        return
    yield (
        '<p class="quiet">Images of the same noise at several moments of the run; below each is the class that the '
        "teacher takes it for, and its confidence.</p>"
    )
    total = sum(len(snapshot.pixels) for snapshot in facts.snapshots)
    for snapshot in facts.snapshots:
        yield f"<h3>After round {snapshot.round:,}</h3>"
        shown = shrunk(snapshot.pixels, IMAGE_BYTES // total)
        figures = (
            f'<figure><img src="{image(pixels)}" alt="generated image, class {label}"><figcaption>{label} · '
            f"{confidence:.0%}</figcaption></figure>"
            for pixels, label, confidence in zip(shown, snapshot.labels, snapshot.confidences, strict=True)
        )
        yield f'<div class="images">{"".join(figures)}</div>'


def shrunk(pixels: Any, limit: int) -> Any:
    """Images ``uint8 (B, height, width[, 3])``, averaged down to at most this number of bytes each."""
    _, height, width, *channels = pixels.shape
    size = height * width * math.prod(channels)
    if size <= limit:
        return pixels
    scale = math.sqrt(limit / size)
    images = torch.from_numpy(pixels).float().reshape(len(pixels), height, width, -1).permute(0, 3, 1, 2)
    smaller = F.interpolate(images, size=(max(1, int(height * scale)), max(1, int(width * scale))), mode="area")
    result = smaller.round().to(torch.uint8).permute(0, 2, 3, 1)
    return (result if channels else result[..., 0]).contiguous().numpy()


def _classes(teacher_logits: Tensor) -> Iterator[str]:
    classes = teacher_logits.shape[1]
    counts = torch.bincount(teacher_logits.argmax(dim=1), minlength=classes)
    made, total = int((counts > 0).sum()), len(teacher_logits)
    yield f"<p>The teacher finds {made:,} of its {classes:,} classes in {total:,} images.</p>"
    order = list(range(classes))
    if classes > 2 * LISTED:
        order = counts.argsort(descending=True)[: 2 * LISTED].tolist()
        yield f'<p class="quiet">The most frequent {2 * LISTED}:</p>'
    most = max(1, int(counts.max()))
    rows = (
        f'<span>{label}</span><i style="--share:{int(counts[label]) / most:.4f}"></i>'
        f"<span>{int(counts[label]) / total:.1%}</span>"
        for label in order
    )
    yield f'<div class="bars" role="group" aria-label="Share of each class">{"".join(rows)}</div>'


def _confusion(teacher_logits: Tensor, student_logits: Tensor) -> Iterator[str]:
    confusion = confusion_matrix(student_logits, teacher_logits.argmax(dim=1))
    total, same = int(confusion.sum()), int(confusion.diagonal().sum())
    yield (
        f"<p>The last student gives {same / total:.2%} of {total:,} generated images the class that the teacher gives "
        "them. These images are made to be hard for the student: on real ones it usually agrees more.</p>"
    )
    if len(confusion) <= LISTED:
        yield _matrix(confusion)
    wrong = confusion - torch.diag(confusion.diagonal())
    counts, places = wrong.flatten().topk(min(LISTED, wrong.numel()))
    listed = [
        (f"{int(place) // len(confusion)}", f"{int(place) % len(confusion)}", f"{int(count)}")
        for count, place in zip(counts, places, strict=True)
        if count
    ][: LISTED if len(confusion) > LISTED else 8]
    if listed:
        yield table("Most frequent disagreements", listed, ("teacher", "student", "images"), numbers=True)


def _matrix(confusion: Tensor) -> str:
    shares = confusion / confusion.sum(dim=1, keepdim=True).clamp_min(1)
    head = "".join(f'<th scope="col">{label}</th>' for label in range(len(confusion)))
    rows = []
    for label, (counts, parts) in enumerate(zip(confusion.tolist(), shares.tolist(), strict=True)):
        pairs = zip(counts, parts, strict=True)
        cells = "".join(f'<td style="--share:{share:.3f}">{count or ""}</td>' for count, share in pairs)
        rows.append(f'<tr><th scope="row">{label}</th>{cells}</tr>')
    caption = "Images by the teacher’s class (rows) and the student’s (columns)"
    head = f"<caption>{caption}</caption><thead><tr><td></td>{head}</tr></thead>"
    return scrolled(caption, f'<table class="matrix">{head}{"".join(rows)}</table>')


def _usage(facts: RunFacts, folder: Path) -> Iterator[str]:
    name = "student_best.safetensors" if facts.result.get("best_round") is not None else "student.safetensors"
    mean, std = facts.normalisation
    if facts.architecture.get("factory"):
        load = f'student, about = load_model(Path("{folder / name}"))'
        imports = "from dfad.models.model_file import load_model"
    else:
        load = f'student = …  # as you built it\nload_weights(student, Path("{folder / name}"))\nstudent.eval()'
        imports = "from dfad.models.weights import load_weights"
    images = f"(batch, {', '.join(map(str, facts.image_shape))})"
    normalised = f", (pixels in 0–1 − mean) / std with mean {list(mean)}, std {list(std)}" if mean else ", normalised"
    code = (
        f"from pathlib import Path\n{imports}\nfrom dfad.models.outputs import as_outputs\n\n{load}\n"
        f"logits = as_outputs(student(images)).logits  # images {images}{normalised}"
    )
    yield f"<pre><code>{escape(code)}</code></pre>"
    yield "<p>For other programs: a torch.export program, ONNX, a Hugging Face folder, 8 bits.</p>"
    yield f"<pre><code>{escape(f'dfad export {folder}')}</code></pre>"


def _cost(result: Mapping[str, Any]) -> Iterator[Sequence[str]]:
    yield "rounds", f"{result['rounds']:,}"
    yield "images generated", f"{result['images']:,}"
    yield "images that the student was shown", f"{result['student_images']:,}"
    yield "images that the teacher was asked about", f"{result['teacher_queries']:,}"
    yield "seconds", f"{result['seconds']:,.1f}"
    yield "rounds per second", f"{result['rounds_per_second']:.3g}"


def _settings(config: Any) -> Iterator[str]:
    defaults = dict(leaves(type(config)()))
    rows, changed = [], 0
    for name, value in leaves(config):
        differs = defaults[name] != value
        changed += differs
        shown = escape(str(to_tree(value)))
        rows.append((f"<code>{escape(name)}</code>", f'<span class="changed">{shown}</span>' if differs else shown))
    yield f'<p class="quiet">{changed} of {len(rows)} differ from the default; they are bold.</p>'
    yield f"<details><summary>All settings</summary>{table('Settings, by the names of their flags', rows)}</details>"
