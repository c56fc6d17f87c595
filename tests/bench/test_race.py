"""Contenders that are timed in turns."""

from collections.abc import Callable

import pytest

from bench.race import Rules, hold

pytest_plugins = "pytester"


class World:
    """A clock that only contenders move, and what they did."""

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

    def rules(self, rounds: int, **options) -> Rules:
        return Rules(rounds=lambda run: rounds, timer=lambda: self.now, **{"turns": 2, "warm_up": 1, **options})


def test_contenders_alternate_and_keep_their_own_times():
    world = World()
    outcomes = hold({"a": world.entrant("a", 1.0), "b": world.entrant("b", 2.0)}, world.rules(4))
    assert outcomes["a"].seconds == [1.0] * 4
    assert outcomes["b"].seconds == [2.0] * 4
    assert "".join(world.log) == "a" + "b" + "aabb" + "aaabbb"  # warm-up, first turn, second turn behind an untimed run


def test_a_turn_of_one_round_is_not_warmed_up_again():
    world = World()
    hold({"a": world.entrant("a", 1.0), "b": world.entrant("b", 1.0)}, world.rules(3, turns=3))
    assert "".join(world.log) == "ab" + "ab" * 3


def test_rounds_that_turns_do_not_divide_are_all_run():
    world = World()
    assert len(hold({"a": world.entrant("a", 1.0)}, world.rules(7, turns=3))["a"].seconds) == 7


def test_what_prepares_is_not_timed():
    world = World()

    def prepare() -> None:
        world.now += 100

    outcomes = hold({"a": world.entrant("a", 1.0)}, world.rules(4, prepare=prepare))
    assert outcomes["a"].seconds == [1.0] * 4


@pytest.mark.parametrize("fails_at", [1, 3])
def test_who_fails_is_out_and_the_others_go_on(fails_at):
    world = World()
    entrants = {"a": world.entrant("a", 1.0, fails_at), "b": world.entrant("b", 1.0)}
    outcomes = hold(entrants, world.rules(4, inspect=lambda run: {"inspected": True}))
    assert str(outcomes["a"].error) == "a fell"
    assert world.log.count("a") == fails_at
    assert outcomes["b"].seconds == [1.0] * 4
    assert outcomes["b"].details == {"inspected": True}
    assert not outcomes["a"].details


def test_each_test_reports_its_own(pytester, monkeypatch):
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # pytest-benchmark times nothing in a worker
    pytester.makeconftest("from bench.race import outcomes, race")
    pytester.makepyfile("""
        import pytest
        from bench.race import Rules, replayed

        NOW = [0.0]
        BUILT = []
        RULES = Rules(rounds=lambda run: 4, timer=lambda: NOW[0], turns=2, warm_up=0)

        @pytest.mark.benchmark(timer=replayed)
        @pytest.mark.parametrize("size", [1, 2])
        @pytest.mark.parametrize("contender", ["slow", "fast", "broken"])
        def test_round(size, contender, race, benchmark):
            def enter(name):
                BUILT.append((size, name))
                assert name != "broken"
                def run():
                    NOW[0] += {"slow": 8.0, "fast": 1.0}[name] * size
                return run
            race(f"size {size}", enter, RULES)
            assert benchmark.stats.stats.min == pytest.approx({"slow": 8.0, "fast": 1.0}[contender] * size)
            assert benchmark.stats.stats.rounds == 4
            assert benchmark.extra_info["contender"] == contender
            assert benchmark.group == f"size {size}"

        def test_each_was_built_once():
            assert sorted(BUILT) == [(s, n) for s in (1, 2) for n in ("broken", "fast", "slow")]
    """)
    pytester.runpytest("-p", "no:xdist", "-p", "no:cacheprovider").assert_outcomes(passed=5, failed=2)
    result = pytester.runpytest("-p", "no:xdist", "-p", "no:cacheprovider", "-k", "fast or once")
    result.assert_outcomes(passed=2, failed=1, deselected=4)  # of what was not chosen nothing is built
