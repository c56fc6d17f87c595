"""The loop that all runs share: rounds or epochs that are recorded, saved, and stopped by a signal."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dfad.errors import Interrupted
from dfad.ranks import ALONE, Ranks
from dfad.runs import checkpoint
from dfad.runs.interruption import StopRequest, stop_requests
from dfad.runs.recorder import Metrics, Recorder


@dataclass
class RunLoop:
    """The remaining rounds of a run; created by :func:`run_loop`.

    .. code-block:: python

        with run_loop(folder, rounds, position, state_dict, checkpoint_every) as loop:
            for _ in loop:
                ...  # the next round: afterwards position() is one more
                loop.record(metrics)
    """

    folder: Path | None
    rounds: int
    position: Callable[[], int]
    state_dict: Callable[[], dict[str, Any]]
    checkpoint_every: int
    unit: str
    first: int
    _recorder: Recorder
    _stop: StopRequest
    _ranks: Ranks
    _signal: int | None = None

    def __iter__(self) -> Iterator[None]:
        while self.position() < self.rounds:
            self._signal = None
            yield
            if self.folder is not None and self.saving:
                state = self.state_dict()
                if self._ranks.first:
                    checkpoint.save(self.folder, state)
            if self.stopping:
                self._ranks.largest(0)  # no rank leaves before the checkpoint is written: its end would end the others
                raise Interrupted(self._stopped(), self._agreed_signal())

    @property
    def stopping(self) -> bool:
        """Whether the run ends after this round."""
        return self._agreed_signal() != 0

    def _agreed_signal(self) -> int:
        # decided once per round, for all ranks: if a signal arrives, the checkpoint of that round must be written
        if self._signal is None:
            self._signal = self._ranks.largest(self._stop.signal_number)
        return self._signal

    @property
    def saving(self) -> bool:
        """Whether a checkpoint is written after this round; it must not be one of a diverged run."""
        return self.folder is not None and (self.due(self.checkpoint_every) or self.stopping)

    def due(self, every: int) -> bool:
        """Whether an action with this interval, which is also due after the last round, is due after this one."""
        return self.position() % every == 0 or self.position() == self.rounds

    def record(self, metrics: Metrics) -> None:
        """Record metrics after this round."""
        self._recorder.write(self.position(), metrics)

    @property
    def history(self) -> list[dict[str, float]]:
        """All records of the run, including those of earlier processes."""
        return self._recorder.history

    def _stopped(self) -> str:
        where = (
            f"Continue with --resume {self.folder}." if self.folder else "Nothing was written: no run_dir was given."
        )
        done, rounds, of_what = self.position(), self.rounds, ""
        if done < 0:
            done, rounds, of_what = done - self.first, -self.first, " of the warm-up"
        return f"Stopped after {self.unit} {done} of {rounds}{of_what}. {where}"


@contextmanager
def run_loop(
    folder: Path | None,
    rounds: int,
    position: Callable[[], int],
    state_dict: Callable[[], dict[str, Any]],
    checkpoint_every: int,
    *,
    task: str = "Distilling",
    unit: str = "round",
    first: int = 0,
    ranks: Ranks = ALONE,
) -> Iterator[RunLoop]:
    """The loop over the remaining rounds of a run. Inside it, SIGINT and SIGTERM ask the run to stop.

    Args:
        folder: of the run, already opened; without one, nothing is written.
        rounds: total number.
        position: how many of them are done.
        state_dict: everything that the next round depends on.
        checkpoint_every: rounds from one checkpoint to the next.
        task: name of the activity, for the terminal.
        unit: name of a round in records and messages.
        first: position at which the run begins; below 0 where it warms up before its first round.
        ranks: which share the run; the first one writes, and a signal to one of them stops all after the same round.

    Raises:
        Interrupted: after a signal, when the checkpoint is written.
    """
    with (
        stop_requests() as stop,
        Recorder(folder if ranks.first else None, rounds, position(), first=first, task=task, unit=unit) as recorder,
    ):
        yield RunLoop(folder, rounds, position, state_dict, checkpoint_every, unit, first, recorder, stop, ranks)
