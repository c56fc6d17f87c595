"""Published architectures from inspection to a delivered student: ``make proof`` writes docs/architectures.md.

Each network has random weights whose BatchNorms have seen random images. It is inspected, teaches a network of its own
kind for three rounds, with the engine and in plain PyTorch, is measured on image files, exported and loaded back. A
third run shows what rounding does: plain PyTorch again, with all weights changed in their last bit, and without oneDNN.
"""

import contextlib
import io
import json
import logging
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from dfad import evaluate, export, train
from dfad.config import TeacherConfig
from dfad.inspection import inspection
from dfad.models.outputs import as_outputs
from dfad.models.sources import load

CLASSES, SIZE = 10, 64

ROUNDS = [
    *("--method.rounds=3", "--method.student_steps=1", "--method.batch_size=8", "--method.warm_up=1"),
    *("--generator.width=4", "--generator.noise_dim=8", "--selection.bank_size=4"),
    # networks of random weights enlarge what differs: images of 8 bits turn rounding into whole steps, as Adam does,
    # and each update of weights multiplies it; with small rates and SGD the updates are what the gradients are
    *("--method.image_bank.size=0", "--optimizer.generator.name=sgd", "--optimizer.generator.lr=1e-9"),
    *("--optimizer.student.name=sgd", "--optimizer.student.lr=1e-4", "--optimizer.student.warm_up=0"),
    *("--collapse.response=warn", "--engine.precision=float32", "--device=cpu"),
]

TORCHVISION = (
    *("resnet18", "mobilenet_v2", "mobilenet_v3_small", "shufflenet_v2_x0_5", "squeezenet1_1", "mnasnet0_5"),
    *("regnet_x_400mf", "googlenet", "squeezenet1_0", "alexnet"),
)
TIMM = (
    *("resnet10t", "mobilenetv3_small_050", "lcnet_035", "ghostnet_050", "repghostnet_050", "convnext_atto"),
    *("vit_tiny_patch16_224", "tinynet_e", "regnetx_002"),
)
SMALL_VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
HUGGING_FACE: dict[str, tuple[str, dict[str, Any]]] = {
    "ResNet": ("ResNet", {"hidden_sizes": [16, 32], "depths": [1, 1], "embedding_size": 16}),
    "ViT": ("ViT", {"patch_size": 16, **SMALL_VIT}),
    "DeiT": ("DeiT", {"patch_size": 16, **SMALL_VIT}),
    "MobileNetV2": ("MobileNetV2", {"depth_multiplier": 0.35}),
    "ConvNext": ("ConvNext", {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1]}),
    "ConvNextV2": ("ConvNextV2", {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1]}),
}

LARGEST_ROUNDING = 0.1
"""Of weights; where it does more, two students cannot be compared."""

LARGEST_WEIGHTS, LARGEST_LOGITS, MARGIN = 1e-2, 1e-3, 4.0
"""Differences of two students: that much, or that many times what rounding explains."""


@dataclass(frozen=True)
class Difference:
    """Between two students."""

    weights: float
    """Norm of the difference of what the training changed in their weights, relative to the norm of the change."""
    logits: float
    """Largest difference of their logits, relative to the largest logit."""

    def explained_by(self, rounding: "Difference") -> bool:
        """Whether it is no larger than rounding makes it."""
        weights, logits = max(LARGEST_WEIGHTS, MARGIN * rounding.weights), max(LARGEST_LOGITS, MARGIN * rounding.logits)
        return self.weights <= weights and self.logits <= logits

    def __str__(self) -> str:
        return f"{self.weights:.0e} · {self.logits:.0e}"


@dataclass(frozen=True)
class Row:
    """The result for one architecture."""

    source: str
    parameters: int
    taps: int
    norms: str
    engine: str
    difference: Difference
    """Between the students with and without the engine."""
    rounding: Difference
    """Between the students without it, one with all weights changed in their last bit, and without oneDNN."""
    exported: str
    seconds: float


def sources(folder: Path, packages: tuple[str, ...]) -> list[tuple[str, dict[str, Any]]]:
    """Names of networks and their keyword arguments."""
    found: list[tuple[str, dict[str, Any]]] = []
    if "torchvision" in packages:
        plain = {"googlenet": {"init_weights": False, "aux_logits": False}}
        found += [(f"torchvision:{name}", {"num_classes": CLASSES, **plain.get(name, {})}) for name in TORCHVISION]
    if "timm" in packages:
        sized = {"vit_tiny_patch16_224": {"img_size": SIZE}}
        found += [(f"timm:{name}", {"num_classes": CLASSES, **sized.get(name, {})}) for name in TIMM]
    if "transformers" in packages:
        import transformers

        for name, (kind, options) in HUGGING_FACE.items():
            config = getattr(transformers, f"{kind}Config")(num_labels=CLASSES, image_size=SIZE, **options)
            getattr(transformers, f"{kind}ForImageClassification")(config).save_pretrained(folder / name)
            found.append((f"hf:{folder / name}", {}))
    return found


def prove(source: str, kwargs: dict[str, Any], folder: Path, images: Path) -> Row:
    """One architecture, from inspection to the file that is loaded back.

    Raises:
        Exception: whatever fails on the way.
    """
    started = time.perf_counter()
    starts = _save_networks(source, kwargs, folder)
    config = TeacherConfig(kwargs=kwargs, checkpoint=folder / "teacher.pt", image_size=SIZE)
    found = inspection(source, config, torch.device("cpu"), timed=False)
    arguments = json.dumps(kwargs)
    networks = ["--preset=own", f"--teacher={source}", f"--teacher.kwargs={arguments}", f"--teacher.image_size={SIZE}"]
    networks += [f"--student={source}", f"--student.kwargs={arguments}"]
    batch = torch.randn(8, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    changes, logits = [], []
    for name, switch, which in (
        ("fused", "--fused", ""),
        ("plain", "--no_fused", ""),
        ("nudged", "--no_fused", "-nudged"),
    ):
        weights = [f"--{role}.checkpoint={folder / (role + which)}.pt" for role in ("teacher", "student")]
        with torch.backends.mkldnn.flags(enabled=name != "nudged"):  # or every step would round alike
            train.main([*networks, *weights, *ROUNDS, switch, f"--run_dir={folder / name}"])
        student = load(str(folder / name / "student.safetensors")).network.eval()
        pairs = zip(_weights(student), starts[f"student{which}"], strict=True)
        changes.append([after - before for after, before in pairs])
        with torch.no_grad():
            logits.append(as_outputs(student(batch)).logits)
    fused, plain, nudged = zip(changes, logits, strict=True)
    difference, rounding = _difference(fused, plain), _difference(nudged, plain)
    assert rounding.weights < LARGEST_ROUNDING, f"rounding alone changes the student by {rounding}"
    assert difference.explained_by(rounding), f"fused and plain differ by {difference}, rounding explains {rounding}"
    file = folder / "fused" / "student.safetensors"
    data = ["--data.name=folder", f"--data.root={images}", f"--data.image_size={SIZE}", "--device=cpu"]
    evaluate.main([f"--model={file}", *data, "--json"])
    export.main([str(folder / "fused"), "--weights=last", "--formats", "safetensors", "program", "--json"])
    exported = sorted(path.name for path in (folder / "fused" / "export").iterdir())
    program = next((folder / "fused" / "export").glob("*.pt2"))
    back = load(str(program)).network
    with torch.no_grad():
        torch.testing.assert_close(as_outputs(back(batch)).logits, logits[0], rtol=1e-3, atol=1e-4)
    norms = ", ".join(f"{count} {name}" for name, count in found.norms.items()) or "none"
    parts = [part for part in found.engine_parts if part.startswith(("fold_", "fuse_"))]
    return Row(
        source=short(source),
        parameters=found.parameters,
        taps=len(found.taps),
        norms=norms,
        engine=", ".join(parts) or "–",
        difference=difference,
        rounding=rounding,
        exported=f"{len(exported)} files",
        seconds=time.perf_counter() - started,
    )


def _save_networks(source: str, kwargs: dict[str, Any], folder: Path) -> dict[str, list[torch.Tensor]]:
    """Write a teacher and a student, as they are and nudged; returns the weights of each file by its stem."""
    starts = {}
    for role, seed in (("teacher", 0), ("student", 1)):
        torch.manual_seed(seed)
        network = _seasoned(load(source, kwargs=kwargs, pretrained=False).network, seed)
        for stem, change in ((role, nn.Module.eval), (f"{role}-nudged", _nudged)):
            torch.save(change(network).state_dict(), folder / f"{stem}.pt")
            starts[stem] = _weights(network)
    return starts


def short(source: str) -> str:
    """Without the folder."""
    return f"hf:{Path(source).name}" if source.startswith("hf:") else source


def _weights(network: nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().double() for parameter in network.parameters()]


def _difference(
    one: tuple[list[torch.Tensor], torch.Tensor], other: tuple[list[torch.Tensor], torch.Tensor]
) -> Difference:
    """Between two students, each given by what the training changed its weights by, and its logits."""
    norm = torch.nn.utils.get_total_norm
    apart = norm([x - y for x, y in zip(one[0], other[0], strict=True)])
    logits = (one[1] - other[1]).abs().max() / other[1].abs().max()
    return Difference(float(apart / norm(other[0])), float(logits))


def _nudged(network: nn.Module) -> nn.Module:
    """Each weight is the next number, up or down."""
    with torch.no_grad():
        for parameter in network.parameters():
            up = torch.rand_like(parameter) < 0.5
            parameter.copy_(torch.nextafter(parameter, torch.where(up, torch.inf, -torch.inf).to(parameter)))
    return network


def _seasoned(network: nn.Module, seed: int) -> nn.Module:
    """BatchNorms scale and shift, and hold the statistics of random images."""
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    torch.manual_seed(seed)
    with torch.no_grad():
        for norm in norms:
            norm.momentum = None  # statistics are averages over all that it has seen
            if norm.affine:
                norm.weight.uniform_(0.7, 1.3)
                norm.bias.normal_(0, 0.1)
        network.train()
        for _ in range(3):
            network(torch.randn(16, 3, SIZE, SIZE))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return network.eval()


def make_images(folder: Path) -> Path:
    """Two random images of each class, as train and as test."""
    generator = torch.Generator().manual_seed(2)
    for split in ("train", "test"):
        for label in range(CLASSES):
            (folder / split / f"class{label}").mkdir(parents=True)
            for number in range(2):
                pixels = torch.randint(0, 256, (SIZE, SIZE, 3), generator=generator, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(folder / split / f"class{label}" / f"{number}.png")
    return folder


def page(rows: list[Row | tuple[str, str]], packages: tuple[str, ...]) -> str:
    """The page as Markdown."""
    there = ", ".join(f"{name} {version(name)}" for name in ("torch", *packages))
    lines = [
        "# Architectures that were tried",
        "",
        "<!-- written by make proof -->",
        f"Written by `make proof` with {there}, on a CPU.",
        "Each network has random weights, and its BatchNorms hold the statistics of random images. It is inspected,",
        f"teaches a network of its own kind for three rounds at {SIZE}×{SIZE} pixels, with the engine and in plain",
        "PyTorch, is measured on image files, exported as safetensors and as a `torch.export` program, and loaded",
        "back.",
        "",
        "*Fused against plain* compares the two students: the norm of the difference of what the training changed in",
        "their weights, relative to the norm of the change; and the largest difference of their logits, relative to",
        "the largest logit. *Rounding* is the same of two runs in plain PyTorch, of which one starts with all weights",
        "of the teacher and the student changed in their last bit, and computes without oneDNN. A network passes",
        f"where the first number is below {LARGEST_WEIGHTS:g} and the second below {LARGEST_LOGITS:g}, or where they",
        f"are below {MARGIN:g} times those of rounding. Networks of random weights enlarge rounding, some by orders of",
        "magnitude: a value near zero changes its side of a ReLU, and a BatchNorm of few values divides by a small",
        "deviation. So the learning rates are small, and no image is rounded to 8 bits. Where rounding alone changes",
        f"more than {LARGEST_ROUNDING:g} of the weights' change, nothing can be compared, and the network counts as",
        "failed.",
        "",
        "| network | parameters | norms | taps | rewritten by the engine | fused against plain | rounding | loaded |",
        "| --- | ---: | --- | ---: | --- | ---: | ---: | --- |",
    ]
    for row in rows:
        if isinstance(row, Row):
            cells = row.source, f"{row.parameters:,}", row.norms, str(row.taps), row.engine
            lines.append(f"| {' | '.join(cells)} | {row.difference} | {row.rounding} | {row.exported} |")
        else:
            lines.append(f"| {row[0]} | | | | | | | failed: {row[1]} |")
    return "\n".join(lines) + "\n"


def quietly(work: Callable[[], Row]) -> Row:
    """Call a function without the output of the commands."""
    with contextlib.redirect_stdout(io.StringIO()):
        return work()


def main() -> None:
    """Try all of them, or those whose names begin with an argument, and write the page."""
    packages = ("torchvision", "timm", "transformers")
    chosen = tuple(sys.argv[2:])
    rows: list[Row | tuple[str, str]] = []
    failed = False
    with tempfile.TemporaryDirectory() as base:
        images = make_images(Path(base) / "images")
        for number, (source, kwargs) in enumerate(sources(Path(base), packages)):
            if chosen and not short(source).startswith(chosen):
                continue
            folder = Path(base) / str(number)
            folder.mkdir()
            try:
                rows.append(quietly(partial(prove, source, kwargs, folder, images)))
            except Exception as error:  # one of many
                failed = True
                logging.getLogger(__name__).exception("%s", source)
                rows.append((short(source), f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"))
            print(rows[-1], file=sys.stderr, flush=True)
            Path(sys.argv[1]).write_text(page(rows, packages), encoding="utf-8")
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
