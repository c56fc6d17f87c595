"""Races: contenders timed in turns."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench import records
from bench.conftest import by_group, ratios, times, write
from bench.race import Contender, Rules, hold

ROOT = Path(__file__).parents[2]


class World:
    """A clock that only contenders advance, and a log of their calls."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

    def entrant(self, name: str, seconds: float, fails_at: int | None = None) -> Callable[[], Callable[[], object]]:
        def run() -> None:
            self.log.append(name)
            if self.log.count(name) == fails_at:
                raise RuntimeError(f"{name} fell")
            self.now += seconds

        return lambda: run

    def clock(self, run: Callable[[], object]) -> float:
        started = self.now
        run()
        return self.now - started

    def rules(self, rounds: int, **options) -> Rules:
        return Rules(rounds=lambda seconds: rounds, clock=self.clock, **{"turns": 2, "warm_up": 1, **options})


def test_contenders_alternate_and_keep_their_own_times():
    world = World()
    outcomes = hold({"a": world.entrant("a", 1.0), "b": world.entrant("b", 2.0)}, world.rules(4))
    assert outcomes["a"].seconds == [1.0] * 4
    assert outcomes["b"].seconds == [2.0] * 4
    # a warm-up, a run that decides how many follow, and two; then an untimed run, and two
    assert "".join(world.log) == "aaaa" + "bbbb" + "aaa" + "bbb"


def test_rounds_that_turns_do_not_divide_are_all_run():
    world = World()
    assert len(hold({"a": world.entrant("a", 1.0)}, world.rules(7, turns=3))["a"].seconds) == 7


def test_how_many_rounds_depends_on_how_long_they_take():
    world = World()
    rules = Rules(rounds=lambda seconds: int(10 / seconds), clock=world.clock, turns=1, warm_up=1)
    outcomes = hold({"slow": world.entrant("slow", 5.0), "fast": world.entrant("fast", 1.0)}, rules)
    assert {name: len(outcome.seconds) for name, outcome in outcomes.items()} == {"slow": 2, "fast": 10}


def test_what_prepares_is_not_timed():
    world = World()

    def prepare() -> None:
        world.now += 100

    outcomes = hold({"a": world.entrant("a", 1.0)}, world.rules(4, prepare=prepare))
    assert outcomes["a"].seconds == [1.0] * 4


@pytest.mark.parametrize("turns", [1, 2])
def test_each_runs_in_its_own_surroundings_and_is_asked_about_them_there(turns):
    world = World()
    around: list[str] = []

    @contextmanager
    def running(name: str) -> Iterator[None]:
        around.append(name)
        yield
        around.remove(name)

    def enter(name: str) -> Contender:
        def run() -> None:
            assert around == [name]
            world.now += 1.0

        return Contender(run, lambda: running(name), lambda: {"around": list(around)})

    outcomes = hold({name: lambda name=name: enter(name) for name in "ab"}, world.rules(4, turns=turns))
    assert outcomes["a"].error is None
    assert outcomes["b"].details == {"around": ["b"]}
    assert outcomes["b"].row("group", "b") == {
        "group": "group",
        "contender": "b",
        "seconds": 1.0,
        "median": 1.0,
        "rounds": 4,
        "around": ["b"],
    }


def test_with_one_turn_each_is_built_when_the_one_before_is_gone():
    world = World()
    alive: list[object] = []

    class Memory:
        def __init__(self) -> None:
            alive.append(self)

        def __call__(self) -> None:
            world.now += 1.0

        def __del__(self) -> None:
            built.append(len(alive))

    built: list[int] = []

    def enter() -> Memory:
        alive.clear()
        return Memory()

    hold({"a": enter, "b": enter}, world.rules(2, turns=1))
    assert built
    assert built[0] <= 1


def test_the_inspected_run_is_the_second(monkeypatch):
    world = World()
    seen: list[int] = []

    def inspect(run):
        seen.append(len(world.log))
        run()
        return {"inspected": True}

    outcomes = hold({"a": world.entrant("a", 1.0)}, world.rules(4, warm_up=3, inspect=inspect, turns=1))
    assert seen == [1]
    assert outcomes["a"].details == {"inspected": True}
    assert len(world.log) == 3 + 1 + 1 + 4


@pytest.mark.parametrize("fails_at", [1, 3, 5])
def test_who_fails_is_out_and_the_others_go_on(fails_at):
    world = World()
    outcomes = hold({"a": world.entrant("a", 1.0, fails_at), "b": world.entrant("b", 1.0)}, world.rules(4))
    assert str(outcomes["a"].error) == "a fell"
    assert world.log.count("a") == fails_at
    assert outcomes["b"].seconds == [1.0] * 4


@pytest.mark.parametrize(("turns", "expected"), [(1, [{"a": 4}, {"b": 0}, {"c": 4}]), (2, [{"a": 4, "b": 0, "c": 4}])])
def test_outcomes_are_handed_over_as_soon_as_they_are_complete(turns, expected):
    world = World()
    seen: list[dict[str, int]] = []
    entrants = {name: world.entrant(name, 1.0, 1 if name == "b" else None) for name in "abc"}
    hold(
        entrants,
        world.rules(4, turns=turns),
        lambda outcomes: seen.append({name: len(outcome.seconds) for name, outcome in outcomes.items()}),
    )
    assert seen == expected


def test_who_cannot_be_built_is_out():
    world = World()

    def enter():
        raise ValueError("not here")

    outcomes = hold({"a": enter, "b": world.entrant("b", 1.0)}, world.rules(4))
    assert str(outcomes["a"].error) == "not here"
    assert outcomes["b"].error is None


SUITE = """
import pytest
from bench.race import Rules

NOW = [0.0]

def clock(run):
    before = NOW[0]
    run()
    return NOW[0] - before

RULES = Rules(rounds=lambda seconds: 4, clock=clock, turns=2, warm_up=1)

@pytest.mark.full
@pytest.mark.parametrize("case", ["pair"])
def test_kernels(case, keep_profile):
    keep_profile({"round": case, "milliseconds": 2.0})

@pytest.mark.parametrize("size", [1, pytest.param(2, marks=pytest.mark.full)])
def test_round(size, race):
    def enter(name):
        assert name != "broken", "not here"
        def run():
            NOW[0] += {"published": 8.0, "ours": 1.0, "floor": 0.5}[name] * size
        return run
    names = ("published", "ours", "broken", "floor")
    entrants = {name: lambda name=name: enter(name) for name in names}
    race(f"size {size}", entrants, RULES, lambda outcomes, name: {"of": len(outcomes)})

def test_alone(benchmark):
    benchmark.group = "alone"
    benchmark.extra_info["contender"] = "native"
    benchmark.pedantic(lambda: None, rounds=3)
"""


def test_pytest_bench(tmp_path):
    """Benchmarks of a small file: a representative part, then chosen contenders of all."""
    (tmp_path / "bench_suite.py").write_text(SUITE)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    command = [sys.executable, "-m", "pytest", "-p", "bench.conftest", "-p", "no:cacheprovider", "--rootdir=."]
    command += [str(tmp_path / "bench_suite.py"), f"--results={tmp_path / 'results'}"]

    def run(*flags: str) -> tuple[str, dict[str, dict[str, dict[str, object]]]]:
        done = subprocess.run([*command, *flags], cwd=ROOT, env=environment, capture_output=True, text=True)
        (record,) = records.load_all(tmp_path / "results").values()
        return done.stdout, by_group(record["benchmarks"])

    told, found = run()
    assert "1 failed, 1 passed, 2 deselected" in told
    assert "size 1: broken: AssertionError: not here" in told
    assert {group: set(rows) for group, rows in found.items()} == {
        "size 1": {"published", "ours", "floor"},
        "alone": {"native"},
    }
    assert found["size 1"]["published"]["seconds"] == 8
    assert found["size 1"]["ours"]["of"] == 3
    assert found["size 1"]["ours"]["machine"]["commit"]
    table = told.partition(" ratios, ")[2].splitlines()
    (line,) = [line for line in table if line.startswith("size 1 ")]
    assert line.split() == ["size", "1", "1000.000", "8.00", "×", "0.50", "×"]
    assert "Name (time in" in told.partition(" ratios, ")[0]  # pytest-benchmark's own table comes before

    told, found = run("--full", "--contenders=floor;ours")
    assert "4 passed" in told
    assert list(found["size 2"]) == ["floor", "ours"]  # in the order that was given
    assert "size 2: floor, ours after " in told.partition(" all times, ")[0]  # printed at once
    assert set(found["size 2"]) == {"ours", "floor"}
    assert set(found["size 1"]) == {"published", "ours", "floor"}  # what was measured before stays

    told, found = run("--full", "--contenders=ours;floor;published", "--missing", "-k", "test_round")
    assert list(found["size 2"]) == ["floor", "ours", "published"]  # ours beside what was missing
    told, found = run("--full", "--contenders=ours;floor;published", "--missing", "-k", "test_round")
    assert "all times" not in told  # nothing is measured twice
    told, found = run("--full", "--missing", "-k", "test_kernels")
    assert "1 skipped" in told
    (record,) = records.load_all(tmp_path / "results").values()
    here = found["size 1"]["ours"]["machine"]
    assert record["profiles"] == [{"round": "pair", "milliseconds": 2.0, "machine": here}]


def test_a_profile_without_contenders_is_kept_beside_what_follows(tmp_path):
    config = SimpleNamespace(getoption={"--results": tmp_path}.__getitem__)
    write([], config, [{"round": "pair"}])
    path = write([{"group": "a", "contender": "ours", "seconds": 1.0}], config)
    assert [row["contender"] for row in records.load(path)["benchmarks"]] == ["ours"]
    assert records.load(path)["profiles"] == [{"round": "pair"}]


def test_the_table_takes_the_fastest_of_a_kind():
    measured = [
        {"group": "round x", "contender": name, "seconds": seconds, "captured": name == "ours"}
        for name, seconds in (("ours", 2.0), ("torch.compile", 8.0), ("repaired + torch.compile", 6.0), ("copy", 1.0))
    ]
    measured.append({"group": "without us", "contender": "native", "seconds": 1.0})
    *_, head, line = ratios(measured)
    assert head.split() == ["task", "ours,", "ms", "published", "by", "hand", "compiled", "least"]
    assert line.split() == ["round", "x", "2000.000", "3.00", "×", "0.50", "×"]
    assert any(line.split()[0] == "ours" and line.endswith("as a CUDA graph") for line in times(measured))
