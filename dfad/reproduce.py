"""``python -m dfad.reproduce COMPARISON``: the arms of a comparison over several seeds, and what they show."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console
from rich.table import Table

from dfad import cli
from dfad.errors import ConfigurationError, unknown
from dfad.experiments.comparisons import COMPARISONS, REAL_DATA, Comparison
from dfad.experiments.figures import comparison_figure
from dfad.experiments.provenance import machine
from dfad.experiments.study import execute, plan, summarise
from dfad.files import write_text
from dfad.presets import TrainConfig
from dfad.ranks import require_alone
from dfad.runs.pictures import save_picture
from dfad.supervised.cache import cached_teacher
from dfad.terminal import configure_logging
from dfad.validation import positive

log = logging.getLogger(__name__)

RECORD_FILE, CURVES_FILE = "comparison.json", "curves.png"


@dataclass(frozen=True, kw_only=True)
class Reproduce:
    """Run the arms of a comparison over several seeds, and report what they show.

    Finished runs are not repeated, and a stopped one continues from its last checkpoint: call the command again
    with the same --run_dir.

    Exit codes: 0 done; 2 option; 3 teacher; 4 run folder; 5 losses became NaN or infinite; 6 data; 130 and 143 stopped
    by Ctrl-C or SIGTERM, with checkpoints.
    """

    comparison: Annotated[str, cli.Positional]
    """Name of the comparison: demo, digits, mnist, mnist-whole, mnist-random-fields; or, with --teacher,
    cifar10-resnet20, cifar10-resnet20-parts, cifar10-resnet32, cifar10-smaller, cifar10-inherited or
    cifar10-resnet32-inherited."""

    seeds: int = 5
    """Number of seeds of every arm, from 0 on."""

    arms: tuple[str, ...] = ()
    """Run and show only these arms."""

    teacher: Path | None = None
    """Weights of the teacher; by default it is trained once and kept in the cache folder."""

    root: Path | None = None
    """Folder or archive of the data, for data sets in files."""

    workers: Annotated[int, cli.also("--processes")] = 1
    """Number of runs at a time, each in a process of its own; they share the processor's cores and the GPUs."""

    device: str = "auto"
    """cpu, cuda or cuda:N; auto takes a GPU where there is one."""

    run_dir: Path | None = None
    """Folder of the runs; by default runs/reproduce-COMPARISON."""

    output: Path | None = None
    """Further file for the record, such as bench/results/reproduce-digits.json."""

    def __post_init__(self) -> None:
        positive(seeds=self.seeds, workers=self.workers)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the arguments, run the comparison, print what it shows."""
    command = cli.parse_flags(Reproduce, arguments)
    require_alone("dfad.reproduce", "Start one process; its --workers spreads runs over cores and GPUs.")
    configure_logging()
    comparison = located(command)
    folder = command.run_dir or Path("runs") / f"reproduce-{command.comparison}"
    runs = plan(comparison, command.seeds, folder)
    measured_with = machine()  # now, because the checkout may change during the hours of a run
    results = execute(runs, command.workers)
    record = {"comparison": command.comparison, **summarise(comparison, runs, results), "machine": measured_with}
    text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
    for path in filter(None, (folder / RECORD_FILE, command.output)):
        write_text(path, text)
    save_picture(folder / CURVES_FILE, lambda: comparison_figure(record))
    Console().print(table(record))
    for claim in record["claims"]:
        Console().print(f"{'holds' if claim['holds'] else 'does not hold'}: {claim['text']}")
    log.info("Everything is in %s.", folder)


def located(command: Reproduce) -> Comparison:
    """The comparison that a command names, with its teacher, data and device.

    Raises:
        ConfigurationError: if there is none of that name or no such arm, or its teacher must be given.
    """
    if command.comparison not in COMPARISONS:
        raise ConfigurationError(unknown("comparison", command.comparison, COMPARISONS))
    comparison = COMPARISONS[command.comparison]
    known = [*comparison.arms, *([REAL_DATA] if comparison.ceiling else [])]
    for arm in command.arms:
        if arm not in known:
            raise ConfigurationError(unknown("arm", arm, known))
    chosen = command.arms or known
    data = replace(next(iter(comparison.arms.values())).data, root=command.root)
    checkpoint_path = command.teacher
    if checkpoint_path is None:
        if comparison.teacher is None:
            raise ConfigurationError(
                f"The comparison {command.comparison} trains no teacher of its own. Give --teacher FILE."
            )
        checkpoint_path = cached_teacher(comparison.teacher, command.root)

    def local(arm: TrainConfig) -> TrainConfig:
        teacher = replace(arm.teacher, recipe=None, checkpoint=checkpoint_path)
        return replace(arm, teacher=teacher, data=data, evaluate=True, device=command.device)

    ceiling = comparison.ceiling
    if ceiling is not None:
        ceiling = replace(ceiling, data=data, device=command.device) if REAL_DATA in chosen else None
    arms = {name: local(arm) for name, arm in comparison.arms.items() if name in chosen}
    return replace(comparison, arms=arms, ceiling=ceiling)


def table(record: Mapping[str, Any]) -> Table:
    """The arms of a record as a table."""
    title = f"{record['comparison']}: accuracy on {record['test_images']:,} test images; teacher "
    result = Table(
        "arm", "last", "best without labels", "images", "teacher queries", "seconds", "published", "",
        title=title + f"{record['teacher_accuracy']:.2%}",
    )  # fmt: skip
    for name, arm in record["arms"].items():
        published = f"{arm['published']:.2%}" if "published" in arm else ""
        verdict = {True: "reproduced", False: "missed"}.get(arm.get("reproduced"), "")
        result.add_row(
            name,
            *(_percent(arm[key]) if key in arm else "" for key in ("accuracy", "best_accuracy")),
            f"{arm['images']:,}",
            f"{arm['teacher_queries']:,}",
            f"{arm['seconds']['mean']:.0f}" if "seconds" in arm else "",
            published,
            verdict,
        )
    return result


def _percent(values: Mapping[str, Any]) -> str:
    return f"{values['mean']:.2%} ± {100 * values['std']:.2f}"


if __name__ == "__main__":
    cli.run(main)
