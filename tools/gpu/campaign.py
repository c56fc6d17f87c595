"""``python -m tools.gpu.campaign``: CIFAR-10 on a GPU, each network within a given time.

``teacher`` trains a ResNet-34 on an archive of JPEGs; ``student`` distils it, or another trained network, by one of the
arms. The number of epochs or rounds that fit into the time is measured first. A stopped run continues when the command
is called again.
"""

import argparse
import dataclasses
import json
import re
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dfad import cli
from dfad.assembly import Teacher, build_distiller, build_student, load_teacher
from dfad.config import (
    GeneratorConfig,
    ImageBankConfig,
    RecordingConfig,
    SelectionConfig,
    StudentConfig,
    TeacherConfig,
)
from dfad.data import DataConfig, Dataset, open_dataset
from dfad.data.evaluation import Evaluator
from dfad.distillation.estimate import Estimate, estimate
from dfad.engine import choose_device
from dfad.experiments.comparisons import CIFAR10_RESNET20, INHERITED, RECIPE_FULL, inheriting, recipe_arms
from dfad.experiments.provenance import machine
from dfad.models.model_file import save_model
from dfad.presets import PRESETS, TrainConfig
from dfad.runs import checkpoint
from dfad.runs.recorder import METRICS
from dfad.runs.settings import saved_settings, to_tree
from dfad.supervised.recipes import RECIPES, NetworkConfig, Recipe
from dfad.supervised.teaching import teach
from dfad.supervised.trainer import SupervisedTrainer
from dfad.terminal import configure_logging

PROBE_BATCHES = 30
"""Number of timed steps of the teacher, to estimate the time of an epoch."""


@dataclass(frozen=True)
class Scale:
    """What is trained: the real networks, or a rehearsal of seconds on a CPU."""

    recipe: Recipe
    base: TrainConfig
    """Settings of the students, by the recipe."""

    thin: TrainConfig
    """Settings of the student of a trained ResNet-20."""

    looks: int
    """Number of measurements of a student's accuracy over its run."""


def _rehearsed(base: TrainConfig) -> TrainConfig:
    """The rehearsal: the same with small networks."""
    return replace(
        base,
        generator=GeneratorConfig(noise_dim=16, width=4),
        method=replace(base.method, student_steps=2, batch_size=16, warm_up=2, image_bank=ImageBankConfig(size=64)),
        selection=SelectionConfig(bank_size=32),
    )


SCALES = {
    # more epochs than fit into three minutes: on an H200 the recipe's own 40 took 69 s, to 91.3 % of the JPEGs
    "gpu": Scale(replace(RECIPES["cifar10-fast"], epochs=120), PRESETS["cifar10"], CIFAR10_RESNET20, looks=12),
    "rehearsal": Scale(
        replace(
            RECIPES["cifar10-fast"],
            network=NetworkConfig("convnet", {"channels": [8, 16, 32]}),
            batch_size=32,
            lr=0.1,
            evaluate_every=10,
        ),
        replace(_rehearsed(PRESETS["cifar10"]), student=StudentConfig("convnet", {"channels": [4, 8, 16]})),
        _rehearsed(CIFAR10_RESNET20),
        looks=2,
    ),
}


def arms(base: TrainConfig) -> dict[str, TrainConfig]:
    """The recipe with and without its parts, and the recipe from the teacher's weights."""
    return {**recipe_arms(base), RECIPE_FULL + INHERITED: inheriting(base)}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tools.gpu.campaign", description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=("teacher", "student"))
    parser.add_argument("--scale", choices=SCALES, default="gpu")
    parser.add_argument(
        "--data", type=Path, required=True, help="archive of JPEGs; with --network, of CIFAR-10's records"
    )
    parser.add_argument("--network", type=Path, help="weights of a ResNet-20 to distil instead of the teacher")
    parser.add_argument("--arm", choices=arms(SCALES["gpu"].base), default=RECIPE_FULL)
    parser.add_argument("--seconds", type=float, required=True, help="that training takes, about")
    parser.add_argument("--kept", type=Path, required=True, help="folder of the teacher's file")
    parser.add_argument("--work", type=Path, required=True, help="folder of checkpoints")
    parser.add_argument("--result", type=Path, required=True, help="JSON file of what came out")
    command = parser.parse_args(arguments)
    configure_logging()
    command.work.mkdir(parents=True, exist_ok=True)
    result = (train_teacher if command.what == "teacher" else distil)(command)
    command.result.write_text(json.dumps({**result, "machine": machine()}, indent=1) + "\n")


class Stopwatch:
    """Seconds that a run has taken over all its calls, kept in a file beside its folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.facts: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"seconds": 0.0}

    def time(self, run: Callable[[], Any]) -> Any:
        """Run, and save the time even if the run is stopped."""
        started = time.perf_counter()
        try:
            return run()
        finally:
            self.facts["seconds"] += time.perf_counter() - started
            self.path.write_text(json.dumps(self.facts))


def teacher_file(kept: Path) -> Path:
    """File of the trained teacher."""
    return kept / "teacher.safetensors"


def train_teacher(command: argparse.Namespace) -> dict[str, Any]:
    """Train it, round its larger weights to bfloat16, which halves its file, and measure the result."""
    folder = command.work / "teacher"
    stopwatch = Stopwatch(command.work / "teacher.json")
    recipe = replace(SCALES[command.scale].recipe, data=DataConfig("folder", command.data))
    resumable = checkpoint.exists(folder)
    if resumable:
        recipe = saved_settings(folder, Recipe())
    else:
        stopwatch.facts = {"seconds": 0.0}
        recipe = replace(recipe, epochs=fitting_epochs(recipe, open_dataset(recipe.data), command.seconds))
    trainer, trained = stopwatch.time(lambda: teach(recipe, folder, resume=resumable, overwrite=not resumable))
    rounded = {name: x.bfloat16() if x.ndim > 1 else x for name, x in trainer.result.state_dict().items()}
    trainer.result.load_state_dict(rounded)
    accuracy = trainer.accuracy()
    save_model(teacher_file(command.kept), rounded, trainer.manifest(accuracy))
    seconds = stopwatch.facts["seconds"]
    shutil.rmtree(folder)
    return {
        "name": f"{command.data.name.partition('.')[0]}: {recipe.network.factory}",
        "epochs": recipe.epochs,
        "accuracy": accuracy,
        "accuracy_before_rounding": trained,
        "seconds": seconds,
        "images_per_second": recipe.epochs * trainer.steps_per_epoch * recipe.batch_size / seconds,
        "test_images": len(trainer.dataset.test),
        # the place of the data on this machine is no part of the experiment
        "settings": to_tree(replace(recipe, data=replace(recipe.data, root=None))),
    }


def fitting_epochs(recipe: Recipe, dataset: Dataset, seconds: float) -> int:
    """Number of the recipe's epochs that fit into the time, at least one."""
    count = min(len(dataset.train), PROBE_BATCHES * recipe.batch_size)
    probe = SupervisedTrainer(recipe, replace(dataset, train=dataset.train.subset(range(count))))
    probe.train_epoch()  # this call captures and chooses algorithms
    epoch = timed(probe.train_epoch) * len(dataset.train) / count
    look = timed(probe.accuracy)
    each = epoch + look / recipe.evaluate_every
    return max(1, min(recipe.epochs, int(seconds / each)))


def timed(run: Callable[[], object]) -> float:
    """Seconds of a function that waits for the device itself."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def distil(command: argparse.Namespace) -> dict[str, Any]:
    """Distil a student within the time, without data; its accuracy is measured on the test images."""
    scale = SCALES[command.scale]
    base, device = scale.base, choose_device("auto")
    if command.network:
        teacher = load_teacher(replace(CIFAR10_RESNET20.teacher, checkpoint=command.network))
        base = scale.thin
        data = DataConfig("cifar10", command.data)
    else:
        teacher = load_teacher(TeacherConfig(checkpoint=teacher_file(command.kept)))
        data = DataConfig("folder", command.data)
    evaluate = Evaluator(data, device, teacher.normalisation)
    config = replace(arms(base)[command.arm], device=str(device))
    name = f"{command.data.name.partition('.')[0]}: {config.student.factory}, {command.arm}, {command.seconds:.0f} s"
    folder = command.work / re.sub(r"[^a-z0-9]+", "-", name.lower())
    stopwatch = Stopwatch(command.work / f"{folder.name}.json")
    resumable = checkpoint.exists(folder)
    if resumable:
        config = saved_settings(folder, TrainConfig())
    else:
        config, cost = fitting_rounds(config, teacher, evaluate, command.seconds, scale.looks)
        stopwatch.facts = {"seconds": 0.0, "cost": dataclasses.asdict(cost)}
    run = build_distiller(teacher, build_student(config), config, evaluate)
    result = stopwatch.time(lambda: run.fit(folder, resume=resumable, overwrite=not resumable))
    seconds, measured = stopwatch.facts["seconds"], stopwatch.facts["cost"]
    looks = curve(folder / METRICS, seconds / result.rounds)
    shutil.copy(folder / "samples.png", command.kept / f"{folder.name}.png")
    shutil.rmtree(folder)
    return {
        "name": name,
        "teacher_accuracy": evaluate(teacher.network.to(device)),
        "accuracy": result.accuracy,
        "best_accuracy": result.best_accuracy,
        "agreement": result.agreement,
        "seconds": seconds,
        "rounds": result.rounds,
        "images": result.images,
        "captured": run.engine.captured,
        "test_images": len(evaluate.dataset.test),
        "teraflop_per_second": measured["flops_per_round"] / measured["seconds_per_round"] / 1e12,
        "cost": measured,
        "curve": looks,
        "runs": [{"seed": config.seed, "accuracy": result.accuracy, "best_accuracy": result.best_accuracy}],
        "settings": to_tree(config),
    }


def fitting_rounds(
    config: TrainConfig, teacher: Teacher, evaluate: Evaluator, seconds: float, looks: int
) -> tuple[TrainConfig, Estimate]:
    """The configuration with the number of rounds that fit into the time, at least one per evaluation; and the cost of
    a round."""
    probe = build_distiller(teacher, build_student(config), config, evaluate)
    look = min(timed(lambda: evaluate(probe.student)) for _ in range(2))  # the first round chooses algorithms
    cost = estimate(probe)
    warm_up = cost.total_seconds - config.method.rounds * cost.seconds_per_round
    rounds = max(looks, int((seconds - warm_up - (looks + 1) * look) / cost.seconds_per_round))
    fitted = replace(
        config,
        method=replace(config.method, rounds=rounds),
        selection=replace(config.selection, every=-(-rounds // looks)),
        recording=RecordingConfig(log_every=-(-rounds // 60), checkpoint_every=-(-rounds // 2)),
    )
    return fitted, cost


def curve(metrics: Path, seconds_per_round: float) -> list[dict[str, float]]:
    """Seconds, accuracy and, if known, agreement at every evaluation."""
    looks = [json.loads(line) for line in metrics.read_text().splitlines()]
    names = ("round", "accuracy", "agreement")
    return [
        {"seconds": look["round"] * seconds_per_round, **{name: look[name] for name in names if name in look}}
        for look in looks
        if "accuracy" in look
    ]


if __name__ == "__main__":
    cli.run(main)
