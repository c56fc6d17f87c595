"""Contenders timed in turns: what slows a machine down for a while slows all of them, and leaves their ratios alone."""

import gc
import statistics
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from bench.device import seconds_of

Run = Callable[[], object]


@dataclass(frozen=True)
class Contender:
    """A way to do a task."""

    run: Run

    running: Callable[[], AbstractContextManager[object]] = nullcontext
    """What it changes in the process for as long as it runs."""

    details: Callable[[], Mapping[str, Any]] = dict
    """What is known about it when it has run."""


@dataclass(frozen=True)
class Rules:
    """How a race is held."""

    rounds: Callable[[float], int]
    """How often a contender is timed, of the seconds that one more run takes before."""

    turns: int
    """How often the contenders alternate; with one turn each leaves its memory to the next."""

    warm_up: int
    """Untimed runs before the first turn, inspection aside. Before each further turn there is one."""

    prepare: Run = lambda: None
    """What precedes each run, untimed."""

    inspect: Callable[[Run], Mapping[str, Any]] | None = None
    """Runs a contender once after its first run, in which its state is allocated, and tells something about it."""

    clock: Callable[[Run], float] = seconds_of
    """Seconds of one run."""


@dataclass
class Outcome:
    """What became of a contender."""

    seconds: list[float] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)
    error: Exception | None = None

    @property
    def fastest(self) -> float:
        """Seconds of the run that nothing disturbed."""
        return min(self.seconds)

    def row(self, group: str, contender: str) -> dict[str, Any]:
        """As it is recorded; times in seconds."""
        median = statistics.median(self.seconds)
        row = {"group": group, "contender": contender, "seconds": self.fastest, "median": median}
        return {**row, "rounds": len(self.seconds), **self.details}


def hold(entrants: Mapping[str, Callable[[], Contender | Run]], rules: Rules) -> dict[str, Outcome]:
    """Time contenders; one that cannot enter, or fails, is out of the race.

    Args:
        entrants: by name, what builds and checks each.
        rules: how they are timed.
    """
    lanes = {name: _Lane(enter, rules) for name, enter in entrants.items()}
    together = [list(lanes.values())] if rules.turns > 1 else [[lane] for lane in lanes.values()]
    for group in together:
        for lane in group:
            lane.attempt(lane.enter)
        gc.collect()
        gc.disable()
        try:
            for turn in range(rules.turns):
                for lane in group:
                    lane.attempt(lambda lane=lane, turn=turn: lane.take(turn))  # type: ignore[misc]
        finally:
            gc.enable()
        for lane in group:
            lane.contender = None
    return {name: lane.outcome for name, lane in lanes.items()}


class _Lane:
    def __init__(self, build: Callable[[], Contender | Run], rules: Rules) -> None:
        self.build = build
        self.rules = rules
        self.outcome = Outcome()
        self.contender: Contender | None = None
        self.rounds = 0

    def attempt(self, step: Run) -> None:
        if self.outcome.error is None:
            try:
                step()
            except Exception as error:
                self.outcome.error = error
                self.contender = None

    def enter(self) -> None:
        built = self.build()
        self.contender = built if isinstance(built, Contender) else Contender(built)

    def take(self, turn: int) -> None:
        rules, contender = self.rules, self.contender
        assert contender is not None
        with contender.running():
            if turn == 0:
                self.warm_up(contender)
            else:
                contender.run()  # the others have emptied the caches
            for _ in range(self.rounds * turn // rules.turns, self.rounds * (turn + 1) // rules.turns):
                rules.prepare()
                self.outcome.seconds.append(rules.clock(contender.run))
            self.outcome.details |= contender.details()

    def warm_up(self, contender: Contender) -> None:
        rules = self.rules
        contender.run()
        if rules.inspect is not None:
            self.outcome.details |= rules.inspect(contender.run)
        for _ in range(rules.warm_up - 1):
            contender.run()
        rules.prepare()
        self.rounds = rules.rounds(rules.clock(contender.run))
