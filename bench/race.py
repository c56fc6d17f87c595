"""Contenders timed in turns: what slows a machine down for a while slows all of them, and leaves their ratios alone.

pytest-benchmark times one test to its end, and then the next one. So the first test of a race times all of them, and
each is given back its own times by a clock that tells nothing else.
"""

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest

Run = Callable[[], object]


@dataclass(frozen=True)
class Rules:
    """How a race is held."""

    rounds: Callable[[Run], int]
    """How often a contender is timed."""

    timer: Callable[[], float]
    """Seconds, when the device has done what it was given."""

    turns: int
    """How often the contenders alternate; with one turn each leaves its memory to the next."""

    warm_up: int
    """Untimed runs before the first turn. Before each further one there is one, where it is of more than one round."""

    prepare: Run = lambda: None
    """What precedes each run, untimed."""

    inspect: Callable[[Run], Mapping[str, Any]] = lambda run: {}
    """What else is to be told of a contender."""


@dataclass
class Outcome:
    """What became of a contender."""

    seconds: list[float] = field(default_factory=list)
    details: Mapping[str, Any] = field(default_factory=dict)
    error: Exception | None = None


def hold(entrants: Mapping[str, Callable[[], Run]], rules: Rules) -> dict[str, Outcome]:
    """Time contenders; one that cannot enter, or fails, is out of the race.

    Args:
        entrants: by name, what builds and checks each.
        rules: how they are timed.
    """
    outcomes = {name: Outcome() for name in entrants}
    runs: dict[str, Run] = {}
    rounds: dict[str, int] = {}

    def attempt(name: str, step: Callable[[], None]) -> None:
        try:
            step()
        except Exception as error:  # it is raised again in the contender's own test
            outcomes[name].error = error
            runs.pop(name, None)

    def enter(name: str) -> None:
        run = entrants[name]()
        for _ in range(rules.warm_up):
            run()
        rounds[name] = rules.rounds(run)
        runs[name] = run

    def take_turn(name: str, turn: int) -> None:
        first, last = (rounds[name] * k // rules.turns for k in (turn, turn + 1))
        if turn and last - first > 1:
            runs[name]()  # the others have emptied the caches
        for _ in range(first, last):
            rules.prepare()
            started = rules.timer()
            runs[name]()
            outcomes[name].seconds.append(rules.timer() - started)

    for name in entrants:
        attempt(name, partial(enter, name))
    gc.collect()
    gc.disable()
    try:
        for turn in range(rules.turns):
            for name in list(runs):
                attempt(name, partial(take_turn, name, turn))
    finally:
        gc.enable()
    for name, run in list(runs.items()):
        outcomes[name].details = rules.inspect(run)
    return outcomes


class _Clock:
    now = 0.0

    def advance(self, seconds: float) -> None:
        self.now += seconds


_CLOCK = _Clock()


def replayed() -> float:
    """The timer of a test whose times are known."""
    return _CLOCK.now


@pytest.fixture(scope="session")
def outcomes() -> dict[Any, dict[str, Outcome]]:
    """Of the races that were held."""
    return {}


@pytest.fixture
def race(
    request: pytest.FixtureRequest, outcomes: dict[Any, dict[str, Outcome]], benchmark: Any
) -> Callable[..., dict[str, Outcome]]:
    """Reports a test's ``contender`` in a group, after a race against all that this test is to run in that group."""

    def run(group: str, enter: Callable[[str], Run], rules: Rules, always: tuple[str, ...] = ()) -> dict[str, Outcome]:
        own = request.node.callspec.params["contender"]
        key = (group, own) if rules.turns == 1 else group
        if key not in outcomes:
            names = [own] if rules.turns == 1 else _rivals(request)
            outcomes[key] = hold({name: partial(enter, name) for name in dict.fromkeys((*names, *always))}, rules)
        outcome = outcomes[key][own]
        if outcome.error is not None:
            raise outcome.error
        benchmark.group = group
        benchmark.extra_info |= {"contender": own, **outcome.details}
        times = iter(outcome.seconds)
        benchmark.pedantic(_CLOCK.advance, setup=lambda: ((next(times),), {}), rounds=len(outcome.seconds))
        return outcomes[key]

    return run


def _rivals(request: pytest.FixtureRequest) -> list[str]:
    """Contenders of the tests that were chosen and differ in nothing else."""

    def others(item: Any) -> Any:
        return item.function, {name: value for name, value in item.callspec.params.items() if name != "contender"}

    return [
        item.callspec.params["contender"]
        for item in request.session.items
        if hasattr(item, "callspec") and others(item) == others(request.node)
    ]
