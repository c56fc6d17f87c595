"""The records that a run writes during its rounds."""

import json
import logging
import time
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from dfad.errors import not_installed
from dfad.files import write_text, writing
from dfad.runs.trend import direction, duration, recent_change
from dfad.terminal import console

log = logging.getLogger(__name__)

METRICS, EVENTS = "metrics.jsonl", "tensorboard"

Metrics = Mapping[str, float]


class MetricBuffer:
    """Metrics of the rounds since the last logging interval, kept on the device so that no round waits for the host."""

    def __init__(self) -> None:
        self._names: tuple[str, ...] = ()
        self._rows: list[Tensor] = []
        self._since = time.perf_counter()

    def add(self, terms: Mapping[str, Tensor]) -> None:
        """Add the metrics of one round: scalars with the same names each time."""
        self._names = tuple(terms)
        self._rows.append(torch.stack([term.detach().float() for term in terms.values()]))

    def read(self) -> dict[str, float]:
        """Means since the last call, and the rounds per second; waits for the device."""
        means = torch.stack(self._rows).mean(dim=0).tolist()
        now = time.perf_counter()
        rate = len(self._rows) / (now - self._since)
        self._rows.clear()
        self._since = now
        return {**dict(zip(self._names, means, strict=True)), "rounds_per_second": rate}


class Recorder:
    """Metrics to ``metrics.jsonl``, the terminal and, where it is installed, TensorBoard.

    Args:
        folder: the run's; without one, metrics go only to the terminal and :attr:`history`.
        rounds: total number of the run.
        start: rounds done before (a resumed run); later records of an interrupted run are dropped.
        first: position at which the run begins; below 0 if it has a warm-up.
        task: name of the activity, for the terminal.
        unit: name of a round in records and log lines.
    """

    def __init__(
        self,
        folder: Path | None,
        rounds: int,
        start: int = 0,
        *,
        first: int = 0,
        task: str = "Distilling",
        unit: str = "round",
    ) -> None:
        self.folder = folder
        self.rounds = rounds
        self.first = first
        self.unit = unit
        self.history: list[dict[str, float]] = []
        self._file = self._events = None
        if folder is not None:
            self.history = [record for record in read_history(folder) if record[unit] <= start]
            write_text(folder / METRICS, "".join(json.dumps(record) + "\n" for record in self.history))
            with self._writing():
                self._file = (folder / METRICS).open("a", encoding="utf-8")
                self._events = _event_writer(folder, purge_step=start + 1 if start > first else None)
        self._progress = (
            Progress(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
                TextColumn("{task.fields[status]}"), TimeRemainingColumn(), console=console,
            )
            if console.is_terminal and log.isEnabledFor(logging.INFO)
            else None
        )  # fmt: skip
        if self._progress:
            self._task = self._progress.add_task(task, total=rounds - first, completed=start - first, status="")

    def _writing(self) -> AbstractContextManager[None]:
        return writing(self.folder / METRICS) if self.folder is not None else nullcontext()

    def __enter__(self) -> "Recorder":
        if self._progress:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress:
            self._progress.stop()
        # a failure to write is raised, unless another error is on its way
        with self._writing() if error is None else suppress(OSError):
            if self._file:
                self._file.close()
            if self._events:
                self._events.close()

    def write(self, round_index: int, metrics: Metrics) -> None:
        """Record metrics after this number of rounds."""
        record = {self.unit: round_index, **metrics}
        self.history.append(record)
        with self._writing():
            if self._file:
                self._file.write(json.dumps(record) + "\n")
                self._file.flush()
            if self._events:
                for name, value in metrics.items():
                    self._events.add_scalar(name, value, round_index)
        status = self._status(round_index, metrics)
        if self._progress:
            self._progress.update(self._task, completed=round_index - self.first, status=status)
        elif round_index < 0:
            log.info("Warm-up %d/%d  %s", round_index - self.first, -self.first, status)
        else:
            log.info("%s %d/%d  %s", self.unit.capitalize(), round_index, self.rounds, status)

    def _status(self, round_index: int, metrics: Metrics) -> str:
        """What matters to a person first: how good the student is, whether it gets better, how long it takes."""
        shown = ("agreement", "accuracy", "student_loss", "generator_loss", "loss", "rounds_per_second")
        warming_up = self.first < 0 and round_index <= 0
        names = {"student_loss": "student", "generator_loss": "generator"}
        names["rounds_per_second"] = "steps/s" if warming_up else f"{self.unit}s/s"
        parts = [f"{names.get(name, name)} {metrics[name]:.4g}" for name in shown if name in metrics]
        change = recent_change(self.history) if "agreement" in metrics else None
        if change is not None:
            parts[0] += f" ({direction(change[0])}, {change[0]:+.3f} in {change[1]} rounds)"
        left = (0 if warming_up else self.rounds) - round_index
        if metrics.get("rounds_per_second") and left:
            of_what = " of the warm-up" if warming_up else ""
            parts.append(f"{duration(left / metrics['rounds_per_second'])}{of_what} left")
        return "  ".join(parts)


def _event_writer(folder: Path, purge_step: int | None) -> Any:
    try:
        # imported here because it takes a second, and a run without a folder does not need it
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        log.warning("No TensorBoard events are written: %s", not_installed("tensorboard", "demo"))
        return None
    return SummaryWriter(str(folder / EVENTS), purge_step=purge_step)


def read_history(folder: Path) -> list[dict[str, Any]]:
    """The records in a run's folder; what a kill has cut, or a run that goes on is writing, is left out."""
    path = folder / METRICS
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            break
        if not isinstance(record, dict):
            break
        records.append(record)
    return records


def seconds_until(position: int, history: Iterable[Metrics], first: int) -> float:
    """Seconds that the rounds up to a position took, by the records of these rounds.

    Args:
        position: number of rounds; negative in the warm-up.
        history: records of rounds, the earliest first; where one has no rate, that of the next counts.
        first: position at which the run began.
    """
    seconds = 0.0
    for record in history:
        rate = record.get("rounds_per_second")
        if rate and record["round"] <= position:
            seconds += (record["round"] - first) / rate
            first = int(record["round"])
    return seconds
