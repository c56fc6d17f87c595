"""``python -m bench.accuracy``: a preset's accuracy over seeds, as data."""

import dataclasses
import json
import statistics
from dataclasses import dataclass
from pathlib import Path

import tyro

from bench.machine import machine
from dfad import cli
from dfad.engine import choose_device
from dfad.evaluation import Evaluator
from dfad.presets import PRESETS
from dfad.terminal import configure_logging
from dfad.train import build_student, load_teacher
from dfad.trainer import Distiller


@dataclass(frozen=True)
class Accuracy:
    """Distil over several seeds and write what came out."""

    output: Path
    """JSON file."""

    preset: str = "digits"
    """Of dfad.train; it must evaluate."""

    seeds: int = 5
    """Seeds 0 to this, less one."""


def main() -> None:
    """The command."""
    command = tyro.cli(Accuracy, use_underscores=True)
    configure_logging()
    base = PRESETS[command.preset]
    device = choose_device(base.device)
    evaluate = Evaluator(base.data, device)
    teacher = load_teacher(base.teacher)
    runs = []
    for seed in range(command.seeds):
        config = dataclasses.replace(base, seed=seed)
        distiller = Distiller(
            teacher.network,
            build_student(config),
            config,
            image_shape=teacher.image_shape,
            normalisation=teacher.normalisation,
            evaluate=evaluate,
        )
        runs.append({"seed": seed, **dataclasses.asdict(distiller.fit())})
    record = {
        "preset": command.preset,
        "settings": cli.to_tree(base),
        "machine": machine(),
        "test_images": len(evaluate.dataset.test),
        "teacher_accuracy": evaluate(teacher.network.to(device)),
        **{name: summary([run[name] for run in runs]) for name in ("accuracy", "best_accuracy", "seconds")},
        "runs": runs,
    }
    command.output.parent.mkdir(parents=True, exist_ok=True)
    command.output.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps({name: record[name] for name in ("teacher_accuracy", "accuracy", "best_accuracy", "seconds")}))


def summary(values: list[float]) -> dict[str, float]:
    """Mean, standard deviation of the sample, least and greatest."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.mean(values), "std": deviation, "min": min(values), "max": max(values)}


if __name__ == "__main__":
    cli.run(main)
