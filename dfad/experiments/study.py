"""The runs of a comparison, and their results."""

import json
import logging
import math
import multiprocessing
import os
import signal
import statistics
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dfad.assembly import build_distiller, build_student, load_teacher
from dfad.data.evaluation import Evaluator
from dfad.distillation.estimate import count_flops
from dfad.engine import choose_device
from dfad.experiments.comparisons import REAL_DATA, Beats, Claim, Comparison, Reaches
from dfad.files import write_text
from dfad.presets import TrainConfig
from dfad.runs.folder import check_folder
from dfad.runs.recorder import read_history
from dfad.runs.report import RESULT, read_result, write_result
from dfad.runs.settings import SETTINGS_FILE, to_tree
from dfad.supervised.recipes import Recipe
from dfad.supervised.teaching import teach
from dfad.terminal import configure_logging

log = logging.getLogger(__name__)

COST_FILE = "cost.json"


@dataclass(frozen=True)
class Run:
    """One arm with one seed."""

    arm: str
    settings: TrainConfig | Recipe
    folder: Path


def plan(comparison: Comparison, seeds: int, folder: Path) -> list[Run]:
    """All runs of a comparison: every arm with one seed before the next seed."""
    settings: dict[str, TrainConfig | Recipe] = dict(comparison.arms)
    if comparison.ceiling is not None:
        settings[REAL_DATA] = comparison.ceiling
    return [
        Run(arm, replace(of_arm, seed=seed), folder / arm.replace(" ", "-").replace(",", "") / f"seed-{seed}")
        for seed in range(seeds)
        for arm, of_arm in settings.items()
    ]


def execute(runs: Sequence[Run], processes: int) -> list[dict[str, Any]]:
    """The results of the runs, in order; finished runs are only read."""
    if processes == 1:
        return [run_once(run) for run in runs]
    threads = max(1, (os.cpu_count() or 1) // processes)
    context = multiprocessing.get_context("spawn")
    started = (threads, context.Value("i", 0))
    with ProcessPoolExecutor(processes, context, _start_process, started) as pool:
        futures = [pool.submit(_run_of_parent, run) for run in runs]
        # after a failure no new run starts; started ones finish, or write their checkpoint after a signal
        done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        if any(future.exception() for future in done):
            pool.shutdown(cancel_futures=True)
        return [future.result() for future in futures]


def _start_process(threads: int, started: Any) -> None:
    torch.set_num_threads(threads)
    with started.get_lock():
        number = started.value
        started.value += 1
    if torch.cuda.is_available():  # which a device without a number stands for
        torch.cuda.set_device(number % torch.cuda.device_count())
    configure_logging(logging.WARNING)
    threading.Thread(target=_stop_with_parent, daemon=True).start()


def _stop_with_parent() -> None:
    """Once the parent is dead, nobody waits for the run: ask it to write its checkpoint, and stop."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)


def _run_of_parent(run: Run) -> dict[str, Any]:
    try:
        _leave_without_parent()
        return run_once(run)
    finally:
        _leave_without_parent()


def _leave_without_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():
        signal.raise_signal(signal.SIGTERM)  # an exception would only lead to the queue, and to the next run in it


def run_once(run: Run) -> dict[str, Any]:
    """A run's result and curve: started, continued or only read, depending on its folder."""
    started = (run.folder / SETTINGS_FILE).exists()
    if started:
        check_folder(run.folder, run.settings, resume=True)
    if not (run.folder / RESULT).exists():
        log.info("%s, seed %d", run.arm, run.settings.seed)
        if isinstance(run.settings, Recipe):
            _train_on_real_data(run.settings, run.folder, resume=started)
        else:
            _distil(run.settings, run.folder, resume=started)
    result = read_result(run.folder)
    if not isinstance(run.settings, Recipe):
        result["flops"] = _flops(run.settings, run.folder / COST_FILE)
    history = read_history(run.folder)
    curve = [(record.get("round", 0), record["accuracy"]) for record in history if "accuracy" in record]
    return {**result, "seed": run.settings.seed, "curve": curve}


def _distil(config: TrainConfig, folder: Path, *, resume: bool) -> None:
    teacher = load_teacher(config.teacher)
    evaluate = Evaluator(config.data, choose_device(config.device), teacher.normalisation)
    build_distiller(teacher, build_student(config), config, evaluate).fit(folder, resume=resume)


def _flops(config: TrainConfig, path: Path) -> int:
    """FLOPs of a run, counted once."""
    if not path.exists():
        flops, _ = count_flops(build_distiller(load_teacher(config.teacher), build_student(config), config))
        write_text(path, json.dumps({"flops": flops}))
    return int(json.loads(path.read_text(encoding="utf-8"))["flops"])


def _train_on_real_data(recipe: Recipe, folder: Path, *, resume: bool) -> None:
    trainer, accuracy = teach(recipe, folder, resume=resume)
    images = recipe.epochs * trainer.steps_per_epoch * recipe.batch_size
    write_result(folder, {"accuracy": accuracy, "best_accuracy": None, "images": images, "teacher_queries": 0})


def summarise(comparison: Comparison, runs: Sequence[Run], results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The record of all runs: for every arm its accuracies over the seeds, its cost and its curve; and the claims."""
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
        "settings": to_tree(_without_places(config)),
        "arms": arms,
        "claims": [claim for claim in judged if claim is not None],
    }


def _without_places(config: TrainConfig) -> TrainConfig:
    """Settings for a record: without local paths of teacher and data, which are no part of the experiment."""
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
        summary["seconds"] = spread([result["seconds"] for result in results])
        summary["captured"] = all(result.get("captured", False) for result in results)
        method = settings.method
        looks = list(zip(*(result["curve"] for result in results), strict=True))
        rounds = [look[0][0] for look in looks]
        warm_up = method.warm_up * method.batch_size
        summary["student_images"] = method.rounds * method.student_images_per_round
        summary["petaflop"] = results[0]["flops"] / 1e15
        summary["curve"] = {
            "images": [warm_up + done * method.images_per_round for done in rounds],
            "student_images": [done * method.student_images_per_round for done in rounds],
            "mean": [statistics.mean(accuracy for _, accuracy in look) for look in looks],
            "std": [_deviation([accuracy for _, accuracy in look]) for look in looks],
        }
    if arm in comparison.published:
        summary["published"] = comparison.published[arm]
        summary["reproduced"] = summary["accuracy"]["mean"] >= comparison.published[arm] - comparison.tolerance
    return summary


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean, sample standard deviation, and the value of each seed."""
    return {"mean": statistics.mean(values), "std": _deviation(values), "values": list(values)}


def _deviation(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def judge(claim: Claim, arms: Mapping[str, Mapping[str, Any]], teacher_accuracy: float) -> dict[str, Any] | None:
    """Whether a claim holds, and with which figures; None if one of its arms was not run, or only with one seed, which
    gives no standard error.

    Args:
        claim: about the last accuracies of arms.
        arms: the summary of each by :func:`summarise`.
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
