"""``python -m dfad.train``: distil a student from a frozen teacher without any data."""

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from rich.console import Console
from rich.table import Table
from torch import nn

from dfad import cli
from dfad.assembly import build_distiller, build_student, load_teacher
from dfad.config import StudentConfig
from dfad.data.evaluation import Evaluator
from dfad.distillation.distiller import Result
from dfad.distillation.estimate import Estimate, estimate
from dfad.engine import choose_device
from dfad.metrics import agreement, top_k_accuracy
from dfad.models.inheritance import suits
from dfad.models.probing import parameter_count
from dfad.models.sources import file_of
from dfad.presets import PRESETS, TrainConfig
from dfad.ranks import current_ranks, joined
from dfad.runs.recorder import read_history
from dfad.runs.run_page import REPORT
from dfad.runs.settings import GROWING
from dfad.runs.trend import improves, verdict
from dfad.supervised.recipes import RECIPES
from dfad.terminal import configure_logging

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Train(cli.Command):
    """Distil a small network from a trained one without any data.

    Exit codes: 0 done; 2 option or configuration; 3 teacher, student or checkpoint; 4 run folder; 5 losses became NaN
    or infinite; 6 evaluation data; 8 another process of the run has ended or hangs; 130 and 143 stopped by Ctrl-C or
    SIGTERM, with a checkpoint.
    """

    settings: Annotated[TrainConfig, cli.Settings] = TrainConfig()

    preset: str = "digits"
    """Settings to start from: digits; mnist, cifar10 or cifar100, which need --teacher.checkpoint; or own, for your own
    networks."""

    dry_run: cli.Action = False
    """Print parameters, FLOPs, peak memory and seconds, measured on a few rounds, and stop."""


@joined()
def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the arguments, run the distillation, print its result."""
    command = cli.parse(Train(), PRESETS, arguments)
    configure_logging()
    config = command.settings
    if not config.evaluate and config.data != PRESETS[command.preset].data:
        log.warning("The data set %s is not used: --evaluate measures the student on it.", config.data.name)
    run_dir = command.folder()
    device = choose_device(config.device)
    teacher = load_teacher(config.teacher, recipe=command.preset if command.preset in RECIPES else "")
    student = build_student(config)
    evaluate = Evaluator(config.data, device, teacher.normalisation) if config.evaluate else None
    distiller = build_distiller(teacher, student, config, evaluate)
    if not command.resumes(run_dir):
        _propose_weights(teacher.network, student, config.student)
    if command.dry_run:
        Console().print(estimate_table(estimate(distiller)))
        return
    result = distiller.fit(run_dir, resume=command.resumes(run_dir), overwrite=command.overwrite)
    measured = measure(evaluate, teacher.network.to(device), student, distiller.best) if evaluate else {}
    Console().print(result_table(result, teacher.network, student, measured))
    if not current_ranks().first:
        return
    history = read_history(run_dir)
    log.info(verdict(history))
    if improves(history):
        log.info(
            "To go on: dfad train --resume %s --%s %d (see docs/usage.md).", run_dir, GROWING, 2 * config.method.rounds
        )
    log.info("Everything is in %s; %s shows it.", run_dir, run_dir / REPORT)


def _propose_weights(teacher: nn.Module, student: nn.Module, config: StudentConfig) -> None:
    """Say so where random weights of a student could be its teacher's."""
    random = config.initial_weights == "random" and config.checkpoint is None and file_of(config.factory or "") is None
    if random and suits(student, teacher):
        log.info(
            "The teacher has the student's layers: --student.initial_weights teacher starts from their weights, which "
            "takes fewer rounds (docs/experiments.md)."
        )


def estimate_table(cost: Estimate) -> Table:
    """The cost of a run as a table."""
    table = Table("", "", title="What this run will cost", show_header=False)
    table.add_row("teacher parameters", f"{cost.teacher_parameters:,}")
    table.add_row("student parameters", f"{cost.student_parameters:,}")
    table.add_row("generator parameters", f"{cost.generator_parameters:,}")
    table.add_row("GFLOP per round", f"{cost.flops_per_round / 1e9:,.2f}")
    table.add_row("PFLOP in all", f"{cost.total_flops / 1e15:,.4g}")
    table.add_row("peak memory of a round, MB", f"{cost.peak_memory / 1e6:,.1f}")
    table.add_row("seconds per round", f"{cost.seconds_per_round:.4g}")
    table.add_row("seconds in all", f"{cost.total_seconds:,.1f}")
    return table


def measure(
    evaluate: Evaluator, teacher: nn.Module, student: nn.Module, best: Mapping[str, Any]
) -> dict[str, Sequence[float | None]]:
    """Accuracy and agreement with the teacher on the test images: of the teacher, the last and the best student."""
    networks = [teacher, student]
    if best:
        networks.append(copy.deepcopy(student))
        networks[-1].load_state_dict(best["state"])
    (teacher_logits, labels), *others = [evaluate.predict(network) for network in networks]
    students = [logits for logits, _ in others]
    return {
        "accuracy": [top_k_accuracy(logits, labels) for logits in (teacher_logits, *students)],
        "agreement on test images": [None, *(agreement(logits, teacher_logits) for logits in students)],
    }


def result_table(
    result: Result, teacher: nn.Module, student: nn.Module, measured: Mapping[str, Sequence[float | None]]
) -> Table:
    """The result of a run as a table."""

    def parameters(network: nn.Module) -> str:
        return f"{parameter_count(network):,}"

    def percent(value: float | None) -> str:
        return "" if value is None else f"{value:.2%}"

    table = Table("", "teacher", "student: last", "best", title="Distilled without data")
    for name, values in measured.items():
        table.add_row(name, *map(percent, values))
    table.add_row("agreement on generated images", "", percent(result.agreement), percent(result.best_agreement))
    table.add_row("after round", "", str(result.rounds), str(result.best_round or ""))
    table.add_row("parameters", parameters(teacher), parameters(student), parameters(student))
    table.add_row("images generated", "", f"{result.images:,}")
    table.add_row("images that the student was shown", "", f"{result.student_images:,}")
    table.add_row("rounds per second", "", f"{result.rounds_per_second:.2f}")
    table.add_row("seconds", "", f"{result.seconds:.1f}")
    return table


if __name__ == "__main__":
    cli.run(main)
