"""Contenders timed in turns, so that a temporary slowdown of the machine affects all of them, and not their ratios."""

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
    """One implementation of a task."""

    run: Run

    running: Callable[[], AbstractContextManager[object]] = nullcontext
    """Context with its changes to the process, active while it runs."""

    details: Callable[[], Mapping[str, Any]] = dict
    """Further facts, known after it has run."""


@dataclass(frozen=True)
class Rules:
    """The rules of a race."""

    rounds: Callable[[float], int]
    """Number of timed runs, from the seconds of a previous run."""

    turns: int
    """Number of turns of each contender; with a single turn, its memory is freed for the next one."""

    warm_up: int
    """Number of untimed runs before the first turn, without inspection; one before each further turn."""

    prepare: Run = lambda: None
    """Called before each run, untimed."""

    inspect: Callable[[Run], Mapping[str, Any]] | None = None
    """Runs a contender once after its first run, which allocates its state, and returns facts about it."""

    clock: Callable[[Run], float] = seconds_of
    """Seconds of one run."""


@dataclass
class Outcome:
    """The result of a contender."""

    seconds: list[float] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)
    error: Exception | None = None

    @property
    def fastest(self) -> float:
        """Seconds of the fastest run, which was disturbed least."""
        return min(self.seconds)

    def row(self, group: str, contender: str) -> dict[str, Any]:
        """The result as a row of a record; times in seconds."""
        median = statistics.median(self.seconds)
        row = {"group": group, "contender": contender, "seconds": self.fastest, "median": median}
        return {**row, "rounds": len(self.seconds), **self.details}


def hold(
    entrants: Mapping[str, Callable[[], Contender | Run]],
    rules: Rules,
    finished: Callable[[Mapping[str, Outcome]], object] = lambda outcomes: None,
) -> dict[str, Outcome]:
    """Time contenders; one that cannot start, or fails, is left out.

    Args:
        entrants: by name, functions that build and check a contender.
        rules: of the race.
        finished: is given outcomes as soon as they are complete: with a single turn one after the other, otherwise all
            of them.
    """
    lanes = {name: _Lane(enter, rules) for name, enter in entrants.items()}
    together = [lanes] if rules.turns > 1 else [{name: lane} for name, lane in lanes.items()]
    for group in together:
        gc.collect()  # of the contenders before: to free a graph would break the capture of another
        for lane in group.values():
            lane.attempt(lane.enter)
        gc.collect()
        gc.disable()
        try:
            for turn in range(rules.turns):
                for lane in group.values():
                    lane.attempt(lambda lane=lane, turn=turn: lane.take(turn))  # type: ignore[misc]
        finally:
            gc.enable()
        for lane in group.values():
            lane.contender = None
        finished({name: lane.outcome for name, lane in group.items()})
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
                contender.run()  # the others have replaced the content of the caches
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
