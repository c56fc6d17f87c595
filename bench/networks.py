"""What the activation regularizer and the image prior are worth where a teacher has no ReLU, or no BatchNorm: digits.

``python -m bench.networks`` prints the table of docs/networks.md.
"""

import copy
import json
import sys
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev

import torch
from torch import Tensor, nn

from dfad.assembly import build_distiller, build_student, load_teacher
from dfad.config import ActivationConfig, StudentConfig, TeacherConfig
from dfad.data import open_dataset
from dfad.data.evaluation import Evaluator
from dfad.models.model_file import save_model
from dfad.models.outputs import Outputs
from dfad.presets import DIGITS, TrainConfig
from dfad.supervised.recipes import RECIPES, NetworkConfig
from dfad.supervised.teaching import train
from dfad.supervised.trainer import SupervisedTrainer

SEEDS = range(3)

ACTIVATIONS = {"relu": nn.ReLU, "silu": nn.SiLU}


class Network(nn.Module):
    """The digits' network with a choice of activation and norm; a tap per stage, before the activation."""

    def __init__(self, channels: list[int], num_classes: int, in_channels: int, activation: str, norm: str) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]()
        self.stages = nn.ModuleList()
        before = in_channels
        for width in channels:
            normed = nn.GroupNorm(8, width) if norm == "group" else nn.BatchNorm2d(width)
            self.stages.append(nn.Sequential(nn.Conv2d(before, width, 3, padding=1, bias=False), normed))
            before = width
        self.pool = nn.MaxPool2d(2)
        self.linear = nn.Linear(before, num_classes)

    def forward(self, images: Tensor) -> Outputs:
        features, taps = images, []
        for number, stage in enumerate(self.stages):
            taps.append(stage(self.pool(features) if number else features))
            features = self.activation(taps[-1])
        return Outputs(self.linear(features.mean((2, 3))), tuple(taps))


def network(
    channels: list[int], num_classes: int = 10, in_channels: int = 1, activation: str = "relu", norm: str = "batch"
) -> Network:
    """One of these networks."""
    return Network(channels, num_classes, in_channels, activation, norm)


def teacher(folder: Path, activation: str, norm: str) -> Path:
    """The file of a teacher, trained if it is not there."""
    path = folder / f"{activation}-{norm}.safetensors"
    if not path.exists():
        kwargs = {"channels": [32, 64, 128], "activation": activation, "norm": norm}
        recipe = replace(RECIPES["digits"], network=NetworkConfig("bench.networks:network", kwargs))
        trainer = SupervisedTrainer(recipe, open_dataset(recipe.data))
        accuracy = train(trainer, folder=None)
        save_model(path, trainer.result.state_dict(), trainer.manifest(accuracy))
    return path


def arm(activation: str, norm: str, *, boundary: bool = False, statistics: bool = False) -> TrainConfig:
    """The demo's settings with another teacher and student."""
    student = {"channels": [16, 32, 64], "in_channels": 1, "activation": activation, "norm": norm}
    method = replace(
        DIGITS.method,
        activation=ActivationConfig(weight=0.03 if boundary else 0.0),
        regularizers=replace(DIGITS.method.regularizers, batchnorm=0.1 if statistics else 0.0),
    )
    return replace(
        DIGITS, teacher=TeacherConfig(), student=StudentConfig("bench.networks:network", student), method=method
    )


ARMS = {
    "SiLU, BatchNorm: regularizer off": ("silu", "batch", arm("silu", "batch", statistics=True)),
    "SiLU, BatchNorm: sign of the pre-activation": (
        *("silu", "batch"),
        arm("silu", "batch", boundary=True, statistics=True),
    ),
    "ReLU, BatchNorm: statistics matched": ("relu", "batch", arm("relu", "batch", boundary=True, statistics=True)),
    "ReLU, BatchNorm: one-hot and diversity alone": ("relu", "batch", arm("relu", "batch", boundary=True)),
    "ReLU, GroupNorm: one-hot and diversity alone": ("relu", "group", arm("relu", "group", boundary=True)),
}


def accuracies(config: TrainConfig, file: Path) -> tuple[float, list[float]]:
    """Of the teacher, and of the last student of each seed."""
    students = []
    for seed in SEEDS:
        seeded = replace(config, seed=seed, teacher=TeacherConfig(checkpoint=file))
        loaded = load_teacher(seeded.teacher)
        evaluate = Evaluator(seeded.data, torch.device("cpu"), loaded.normalisation)
        result = build_distiller(loaded, build_student(seeded), seeded, evaluate).fit()
        assert result.accuracy is not None
        students.append(result.accuracy)
    return evaluate(copy.deepcopy(loaded.network)), students


def main() -> None:
    """Run all arms."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "build/networks")
    folder.mkdir(parents=True, exist_ok=True)
    for name, (activation, norm, config) in ARMS.items():
        of_teacher, students = accuracies(config, teacher(folder, activation, norm))
        row = {"arm": name, "teacher": of_teacher, "mean": mean(students), "std": stdev(students), "students": students}
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
