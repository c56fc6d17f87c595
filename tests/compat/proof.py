"""Architectures of others from inspection to a delivered student: ``make proof`` writes docs/architectures.md.

Each network has random weights whose BatchNorms have seen random images. It is inspected, teaches a network of its own
kind for three rounds, with the engine and in plain PyTorch, is measured on image files, exported and loaded back.
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
    *("--method.rounds=3", "--method.student_steps=1", "--method.batch_size=4", "--method.warm_up=1"),
    *("--method.image_bank.size=4", "--generator.width=4", "--generator.noise_dim=8", "--selection.bank_size=4"),
    # SGD, for Adam turns the rounding of a small gradient into a whole step
    *("--optimizer.student.name=sgd", "--optimizer.student.lr=0.01", "--optimizer.student.warm_up=0"),
    *("--optimizer.generator.name=sgd", "--optimizer.generator.lr=1e-5"),
    *("--collapse.response=warn", "--engine.precision=float32", "--device=cpu"),
]

TORCHVISION = (
    *("resnet18", "mobilenet_v2", "mobilenet_v3_small", "shufflenet_v2_x0_5", "squeezenet1_1", "mnasnet0_5"),
    *("regnet_x_400mf", "googlenet"),
)
TIMM = (
    *("resnet10t", "mobilenetv3_small_050", "lcnet_035", "ghostnet_050", "repghostnet_050", "convnext_atto"),
    *("vit_tiny_patch16_224", "efficientnet_lite0"),
)
SMALL_VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
HUGGING_FACE: dict[str, tuple[str, dict[str, Any]]] = {
    "ResNet": ("ResNet", {"hidden_sizes": [16, 32], "depths": [1, 1], "embedding_size": 16}),
    "ViT": ("ViT", {"patch_size": 16, **SMALL_VIT}),
    "MobileNetV2": ("MobileNetV2", {"depth_multiplier": 0.35}),
    "ConvNext": ("ConvNext", {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1]}),
}

LARGEST_DIFFERENCE = 2e-2
"""Of the logits of the two students, relative to the largest: float32 rounding, carried through three rounds."""


@dataclass(frozen=True)
class Row:
    """What one architecture came to."""

    source: str
    parameters: int
    taps: int
    norms: str
    engine: str
    difference: float
    """Between the logits of the students of both runs, relative to the largest logit."""
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
    weights = folder / "weights.pt"
    torch.save(_seasoned(load(source, kwargs=kwargs, pretrained=False).network).state_dict(), weights)
    config = TeacherConfig(kwargs=kwargs, checkpoint=weights, image_size=SIZE)
    found = inspection(source, config, torch.device("cpu"), timed=False)
    arguments = json.dumps(kwargs)
    networks = ["--preset=own", f"--teacher={source}", f"--teacher.kwargs={arguments}", f"--teacher.image_size={SIZE}"]
    networks += [f"--teacher.checkpoint={weights}", f"--student={source}", f"--student.kwargs={arguments}"]
    students = []
    for name, switch in (("fused", "--fused"), ("plain", "--no_fused")):
        run = folder / name
        train.main([*networks, *ROUNDS, switch, f"--run_dir={run}"])
        students.append(load(str(run / "student.safetensors")).network.eval())
    batch = torch.randn(8, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        one, other = (as_outputs(student(batch)).logits for student in students)
    difference = float((one - other).abs().max() / other.abs().max())
    assert difference < LARGEST_DIFFERENCE, f"fused and plain differ by {difference:.2g}"
    file = folder / "fused" / "student.safetensors"
    data = ["--data.name=folder", f"--data.root={images}", f"--data.image_size={SIZE}", "--device=cpu"]
    evaluate.main([f"--model={file}", *data, "--json"])
    export.main([str(folder / "fused"), "--weights=last", "--formats", "safetensors", "program", "--json"])
    exported = sorted(path.name for path in (folder / "fused" / "export").iterdir())
    program = next((folder / "fused" / "export").glob("*.pt2"))
    back = load(str(program)).network
    with torch.no_grad():
        torch.testing.assert_close(as_outputs(back(batch)).logits, one, rtol=1e-3, atol=1e-4)
    norms = ", ".join(f"{count} {name}" for name, count in found.norms.items()) or "none"
    parts = [part for part in found.engine_parts if part.startswith(("fold_", "fuse_"))]
    return Row(
        source=source if not source.startswith("hf:") else f"hf:{Path(source).name}",
        parameters=found.parameters,
        taps=len(found.taps),
        norms=norms,
        engine=", ".join(parts) or "–",
        difference=difference,
        exported=f"{len(exported)} files",
        seconds=time.perf_counter() - started,
    )


def _seasoned(network: nn.Module) -> nn.Module:
    """BatchNorms have seen random images, and scale and shift."""
    torch.manual_seed(0)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d) and module.affine:
                module.weight.uniform_(0.7, 1.3)
                module.bias.normal_(0, 0.1)
        network.train()
        for _ in range(3):
            network(torch.randn(8, 3, SIZE, SIZE))
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
    """The document."""
    there = ", ".join(f"{name} {version(name)}" for name in ("torch", *packages))
    lines = [
        "# Architectures that were tried",
        "",
        "<!-- written by make proof -->",
        f"Written by `make proof` with {there}. Each network has random weights, teaches a network of its own kind for",
        f"three rounds at {SIZE}×{SIZE} pixels, with the engine and in plain PyTorch, is measured on image files, and",
        "exported and loaded back. The difference is that of the two students' logits, relative to the largest.",
        "",
        "| network | parameters | norms | taps | rewritten by the engine | fused against plain | loaded back |",
        "| --- | ---: | --- | ---: | --- | ---: | --- |",
    ]
    for row in rows:
        if isinstance(row, Row):
            cells = (row.source, f"{row.parameters:,}", row.norms, str(row.taps), row.engine, f"{row.difference:.1e}")
            lines.append(f"| {' | '.join(cells)} | {row.exported} |")
        else:
            lines.append(f"| {row[0]} | | | | | | failed: {row[1]} |")
    return "\n".join(lines) + "\n"


def quietly(work: Callable[[], Row]) -> Row:
    """Without what the commands print."""
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
            if chosen and not source.startswith(chosen):
                continue
            folder = Path(base) / str(number)
            folder.mkdir()
            try:
                rows.append(quietly(partial(prove, source, kwargs, folder, images)))
            except Exception as error:  # one of many
                failed = True
                logging.getLogger(__name__).exception("%s", source)
                rows.append((source, f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"))
            print(rows[-1], file=sys.stderr, flush=True)
            Path(sys.argv[1]).write_text(page(rows, packages), encoding="utf-8")
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
