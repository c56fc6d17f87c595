"""``python -m dfad.reproduce COMPARISON``: the arms of a comparison over several seeds, and what they show."""

import json
import logging
import math
import multiprocessing
import os
import statistics
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from rich.console import Console
from rich.table import Table

from dfad import cli, report
from dfad.comparisons import COMPARISONS, REAL_DATA, Beats, Claim, Comparison, Reaches
from dfad.engine import choose_device
from dfad.errors import ConfigurationError, nearest
from dfad.evaluation import Evaluator
from dfad.files import write_atomically
from dfad.machine import machine
from dfad.presets import TrainConfig
from dfad.recipes import Recipe
from dfad.recorder import METRICS
from dfad.teacher import cached_teacher, teach
from dfad.terminal import configure_logging
from dfad.train import build_distiller, build_student, load_teacher

log = logging.getLogger(__name__)

RESULT_FILE, RECORD_FILE, CURVES_FILE = "result.json", "comparison.json", "curves.png"


@dataclass(frozen=True, kw_only=True)
class Reproduce:
    """Run the arms of a comparison over several seeds, and tell what they show.

    Runs that are finished are not run again, and one that was stopped goes on from its last checkpoint: call it again
    with the same --run_dir.

    Exit codes: 0 done; 2 option; 3 teacher; 4 run folder; 5 losses became NaN or infinite; 6 data; 130 and 143 stopped
    by Ctrl-C or SIGTERM, with checkpoints.
    """

    comparison: Annotated[str, tyro.conf.Positional]
    """Which: demo, digits, mnist, mnist-whole, or cifar10-resnet20, which needs --teacher."""

    seeds: int = 5
    """Seeds 0 to this, less one, of every arm."""

    arms: tuple[str, ...] = ()
    """Run and show these arms alone."""

    teacher: Path | None = None
    """Weights of the teacher; else it is trained once, and kept in the cache folder."""

    root: Path | None = None
    """Folder or archive of the data, for data sets in files."""

    processes: int = 1
    """How many runs go on at once; they share the processor's cores."""

    device: str = "auto"
    """cpu, cuda or cuda:N; auto takes a GPU where there is one."""

    run_dir: Path | None = None
    """Folder of the runs; runs/reproduce-COMPARISON where not given."""

    output: Path | None = None
    """File for the record besides the one in the runs' folder, such as bench/results/reproduce-digits.json."""

    def __post_init__(self) -> None:
        for name in ("seeds", "processes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 1 or more")


@dataclass(frozen=True)
class Run:
    """One arm with one seed."""

    arm: str
    settings: TrainConfig | Recipe
    folder: Path


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    command = tyro.cli(Reproduce, args=arguments, use_underscores=True)
    configure_logging()
    comparison = located(command)
    folder = command.run_dir or Path("runs") / f"reproduce-{command.comparison}"
    runs = plan(comparison, command.seeds, folder)
    measured_with = machine()  # before hours in which the checkout may move on
    results = execute(runs, command.processes)
    record = {"comparison": command.comparison, **summarise(comparison, runs, results), "machine": measured_with}
    text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
    for path in filter(None, (folder / RECORD_FILE, command.output)):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda file: file.write(text.encode()))
    report.save(report.comparison_figure(record), folder / CURVES_FILE)
    Console().print(table(record))
    for claim in record["claims"]:
        Console().print(f"{'holds' if claim['holds'] else 'does not hold'}: {claim['text']}")
    log.info("Everything is in %s.", folder)


def located(command: Reproduce) -> Comparison:
    """The comparison that a command names, told where teacher, data and device are.

    Raises:
        ConfigurationError: if there is none of that name or no such arm, or its teacher must be given.
    """
    if command.comparison not in COMPARISONS:
        raise ConfigurationError(
            f"There is no comparison {command.comparison!r}.{nearest(command.comparison, COMPARISONS)} Choose one of: "
            f"{', '.join(COMPARISONS)}."
        )
    comparison = COMPARISONS[command.comparison]
    known = [*comparison.arms, *([REAL_DATA] if comparison.ceiling else [])]
    for arm in command.arms:
        if arm not in known:
            raise ConfigurationError(f"There is no arm {arm!r}.{nearest(arm, known)} Choose among: {', '.join(known)}.")
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


def plan(comparison: Comparison, seeds: int, folder: Path) -> list[Run]:
    """Every run of a comparison, a seed of every arm before the next seed."""
    settings: dict[str, TrainConfig | Recipe] = dict(comparison.arms)
    if comparison.ceiling is not None:
        settings[REAL_DATA] = comparison.ceiling
    return [
        Run(arm, replace(of_arm, seed=seed), folder / arm.replace(" ", "-").replace(",", "") / f"seed-{seed}")
        for seed in range(seeds)
        for arm, of_arm in settings.items()
    ]


def execute(runs: Sequence[Run], processes: int) -> list[dict[str, Any]]:
    """The results of the runs, in their order; what is finished already is only read."""
    if processes == 1:
        return [run_once(run) for run in runs]
    threads = max(1, (os.cpu_count() or 1) // processes)
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _start_process, (threads,)) as pool:
        futures = [pool.submit(run_once, run) for run in runs]
        # after a failure nothing new is begun; what has begun comes to its end, or to its checkpoint after a signal
        done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        if any(future.exception() for future in done):
            pool.shutdown(cancel_futures=True)
        return [future.result() for future in futures]


def _start_process(threads: int) -> None:
    torch.set_num_threads(threads)
    configure_logging(logging.WARNING)


def run_once(run: Run) -> dict[str, Any]:
    """A run's result and curve: begun, continued or only read, whatever its folder holds."""
    started = (run.folder / cli.SETTINGS_FILE).exists()
    if started:
        saved = cli.saved_settings(run.folder, type(run.settings)())
        cli.require_unchanged(run.folder, saved, run.settings)
    if not (run.folder / RESULT_FILE).exists():
        log.info("%s, seed %d", run.arm, run.settings.seed)
        if isinstance(run.settings, Recipe):
            _train_on_real_data(run.settings, run.folder, resume=started)
        else:
            _distil(run.settings, run.folder, resume=started)
    result: dict[str, Any] = json.loads((run.folder / RESULT_FILE).read_text(encoding="utf-8"))
    records = map(json.loads, (run.folder / METRICS).read_text(encoding="utf-8").splitlines())
    curve = [(record.get("round", 0), record["accuracy"]) for record in records if "accuracy" in record]
    return {**result, "seed": run.settings.seed, "curve": curve}


def _distil(config: TrainConfig, folder: Path, *, resume: bool) -> None:
    teacher = load_teacher(config.teacher)
    evaluate = Evaluator(config.data, choose_device(config.device), teacher.normalisation)
    build_distiller(teacher, build_student(config), config, evaluate).fit(folder, resume=resume)


def _train_on_real_data(recipe: Recipe, folder: Path, *, resume: bool) -> None:
    trainer, accuracy = teach(recipe, folder, resume=resume)
    images = recipe.epochs * trainer.steps_per_epoch * recipe.batch_size
    text = json.dumps({"accuracy": accuracy, "best_accuracy": None, "images": images, "teacher_queries": 0})
    write_atomically(folder / RESULT_FILE, lambda file: file.write(text.encode()))


def summarise(comparison: Comparison, runs: Sequence[Run], results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What all runs come to: for every arm its accuracies over the seeds, its cost and its curve; and the claims."""
    config = next(iter(comparison.arms.values()))
    teacher = load_teacher(config.teacher)
    device = choose_device(config.device)
    evaluate = Evaluator(config.data, device, teacher.normalisation)
    teacher_accuracy = evaluate(teacher.network.to(device))
    of_arms: dict[str, Any] = {}
    for run, result in zip(runs, results, strict=True):
        of_arms.setdefault(run.arm, []).append((run.settings, result))
    arms = {arm: _summary(arm, seeds, comparison) for arm, seeds in of_arms.items()}
    judged = [judge(claim, arms, teacher_accuracy) for claim in comparison.claims]
    return {
        "teacher_accuracy": teacher_accuracy,
        "test_images": len(evaluate.dataset.test),
        "settings": cli.to_tree(_without_places(config)),
        "arms": arms,
        "claims": [claim for claim in judged if claim is not None],
    }


def _without_places(config: TrainConfig) -> TrainConfig:
    """Settings for a record that others read: where teacher and data lie here is no part of the experiment."""
    return replace(config, teacher=replace(config.teacher, checkpoint=None), data=replace(config.data, root=None))


def _summary(
    arm: str, seeds: Sequence[tuple[TrainConfig | Recipe, Mapping[str, Any]]], comparison: Comparison
) -> dict[str, Any]:
    settings, results = seeds[0][0], [result for _, result in seeds]
    summary: dict[str, Any] = {
        "accuracy": spread([result["accuracy"] for result in results]),
        "images": results[0]["images"],
        "teacher_queries": results[0]["teacher_queries"],
    }
    if not isinstance(settings, Recipe):
        summary["best_accuracy"] = spread([result["best_accuracy"] for result in results])
        # the rate of a resumed run's last process stands for all of it
        summary["seconds"] = spread([result["rounds"] / result["rounds_per_second"] for result in results])
        looks = list(zip(*(result["curve"] for result in results), strict=True))
        summary["curve"] = {
            "images": [look[0][0] * settings.method.images_per_round for look in looks],
            "mean": [statistics.mean(accuracy for _, accuracy in look) for look in looks],
            "std": [_deviation([accuracy for _, accuracy in look]) for look in looks],
        }
    if arm in comparison.published:
        summary["published"] = comparison.published[arm]
        summary["reproduced"] = summary["accuracy"]["mean"] >= comparison.published[arm] - comparison.tolerance
    return summary


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean, standard deviation of the sample, and the values, one for each seed."""
    return {"mean": statistics.mean(values), "std": _deviation(values), "values": list(values)}


def _deviation(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def judge(claim: Claim, arms: Mapping[str, Mapping[str, Any]], teacher_accuracy: float) -> dict[str, Any] | None:
    """Whether a claim holds, and with which figures; None where an arm of it was not run, or one seed alone, which has
    no standard error.

    Args:
        claim: about the last accuracies of arms.
        arms: what :func:`summarise` tells of each.
        teacher_accuracy: of their teacher.
    """
    names = [claim.arm] if isinstance(claim, Reaches) else [claim.arm, claim.other]
    if any(name not in arms for name in names):
        return None
    ours, *others = (arms[name]["accuracy"] for name in names)
    if isinstance(claim, Reaches):
        least = max(claim.accuracy, claim.share_of_teacher * teacher_accuracy)
        text = f"{claim.arm} ends at {ours['mean']:.2%}; at least {least:.2%} was to be reached"
        return {"text": text, "holds": ours["mean"] >= least}
    (theirs,) = others
    if isinstance(claim, Beats):
        if min(len(ours["values"]), len(theirs["values"])) < 2:
            return None
        difference = ours["mean"] - theirs["mean"]
        error = math.sqrt(sum(arm["std"] ** 2 / len(arm["values"]) for arm in (ours, theirs)))
        text = (
            f"{claim.arm} ends {100 * difference:+.2f} points from {claim.other}; the standard error of the difference "
            f"is {100 * error:.2f}"
        )
        return {"text": text, "holds": difference > error}
    curve, images = arms[claim.arm]["curve"], arms[claim.other]["images"]
    reached = [n for n, mean in zip(curve["images"], curve["mean"], strict=True) if mean >= theirs["mean"]]
    needed = f"with {reached[0] / images:.0%} of its images" if reached else "not at all"
    text = (
        f"{claim.arm} reaches the last accuracy of {claim.other}, {theirs['mean']:.2%}, {needed}; to be reached "
        f"with {claim.share:.0%}"
    )
    return {"text": text, "holds": bool(reached) and reached[0] <= claim.share * images}


def table(record: Mapping[str, Any]) -> Table:
    """The arms of a record, for people."""
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
