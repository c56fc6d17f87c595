"""Shared code of all benchmarks: races between contenders, the table of ratios, the record.

``pytest bench`` runs a representative part in minutes, ``pytest bench --full`` everything. Races are timed here;
results of pytest-benchmark are added to the same record.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from bench import records
from bench.device import ON_GPU
from bench.race import Contender, Outcome, Rules, Run, hold
from dfad.experiments.provenance import device_name, file_name, machine

OURS = "ours"

COLUMNS = {
    "published": ("published", "published, TF32"),
    "by hand": ("repaired", "reference", "PyTorch", "unfused", "DistributedDataParallel"),
    "compiled": ("torch.compile", "repaired + torch.compile"),
    "least": ("floor", "copy"),
}
"""Columns of the last table, each with the contenders whose fastest is shown."""

MEASURED = pytest.StashKey[list[dict[str, Any]]]()

ROOT = Path(__file__).parents[1]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="run every benchmark and contender, not a representative part")
    parser.addoption("--contenders", default="", help="names of the contenders in their order, separated by semicolons")
    parser.addoption(
        "--missing", action="store_true", help=f"run contenders without a result, and {OURS!r} beside them"
    )
    parser.addoption("--seconds", type=float, default=0.5, help="seconds for which each operator is measured")
    parser.addoption("--record", action="store_true", help=f"write to {records.RESULTS.relative_to(ROOT)}")
    parser.addoption("--results", type=Path, help="folder for the JSON; by default runs/bench, see --record")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[MEASURED] = []


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--full"):
        return
    left_out = [item for item in items if item.get_closest_marker("full")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info.clear()
    machine_info.update(machine())


@pytest.fixture
def race(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Runs a race and records each outcome as soon as it is complete; fails at the end if a contender failed."""

    def run(
        group: str,
        entrants: Mapping[str, Callable[[], Contender | Run]],
        rules: Rules,
        details: Callable[[Mapping[str, Outcome], str], Mapping[str, Any]] = lambda outcomes, name: {},
    ) -> None:
        config = request.config
        chosen = config.getoption("--contenders")
        wanted = [name for name in chosen.split(";") if name in entrants] if chosen else list(entrants)
        if config.getoption("--missing"):
            wanted = missing(wanted, group, config)

        reporter, capture = map(config.pluginmanager.get_plugin, ("terminalreporter", "capturemanager"))
        started = time.monotonic()

        def keep(outcomes: Mapping[str, Outcome]) -> None:
            timed = {name: outcome for name, outcome in outcomes.items() if outcome.error is None}
            rows = [{**outcome.row(group, name), **details(timed, name)} for name, outcome in timed.items()]
            config.stash[MEASURED].extend(rows)
            write(rows, config)
            with capture.global_and_fixture_disabled():
                reporter.write_line(f"{group}: {', '.join(outcomes)} after {time.monotonic() - started:.0f} s")

        outcomes = hold({name: entrants[name] for name in wanted}, rules, keep)
        errors = {name: outcome.error for name, outcome in outcomes.items() if outcome.error is not None}
        if errors:
            words = "; ".join(f"{name}: {type(error).__name__}: {error}" for name, error in errors.items())
            pytest.fail(f"{group}: {words}")

    return run


@pytest.fixture
def keep_profile(request: pytest.FixtureRequest) -> Callable[[dict[str, Any]], None]:
    """Writes where the time of a round goes."""

    def keep(profile: dict[str, Any]) -> None:
        write([], request.config, [{**profile, "machine": machine()}])

    if request.config.getoption("--record") and not ON_GPU:
        pytest.skip("of a CPU it shows PyTorch's operations alone, which no record needs")
    if request.config.getoption("--missing"):
        _, kept = results(request.config)
        if any(
            profile["round"] == request.node.callspec.id and profile.get("machine") == machine()
            for profile in kept.get("profiles", [])
        ):
            pytest.skip("it was measured")
    return keep


@pytest.hookimpl(trylast=True)  # after the table of pytest-benchmark
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """All times, followed by one table of ratios."""
    session = getattr(config, "_benchmarksession", None)
    alone = [entry(benchmark) for benchmark in session.benchmarks if benchmark] if session else []
    measured = config.stash[MEASURED] + alone
    if not measured:
        return
    path = write(alone, config)
    for title, lines in {"all times": times(measured), "ratios": ratios(measured)}.items():
        terminalreporter.section(f"{title}, {device_name()}")
        for line in lines:
            terminalreporter.write_line(line)
    terminalreporter.write_line(f"All of it is in {path}.")


def entry(benchmark: Any) -> dict[str, Any]:
    """Results of pytest-benchmark in the form of the record; times in seconds."""
    stats = benchmark.stats
    return {
        "group": benchmark.group,
        "contender": benchmark.extra_info.get("contender", benchmark.name),
        "seconds": stats.min,
        "median": stats.median,
        "rounds": stats.rounds,
        **{key: value for key, value in benchmark.extra_info.items() if key != "contender"},
    }


def by_group(measured: Iterable[dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Rows by group and contender."""
    groups: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    for row in measured:
        groups[row["group"]][row["contender"]] = row
    return groups


def times(measured: Iterable[dict[str, Any]]) -> Iterable[str]:
    """For each group its contenders, the slowest first: time, bandwidth, and whether it ran as a CUDA graph."""
    for group, rows in by_group(measured).items():
        yield group
        for name, row in sorted(rows.items(), key=lambda item: -item[1]["seconds"]):
            width = f"{row['bytes'] / row['seconds'] / 1e9:8.1f} GB/s" if "bytes" in row else ""
            graph = "as a CUDA graph" if row.get("captured") else ""
            sent = (
                f"{row['share_in_collectives']:.0%} of it in {row['collectives']} collectives"
                if "collectives" in row
                else ""
            )
            yield f"  {name:<48}{row['seconds'] * 1e3:11.3f} ms {width} {graph}{sent}".rstrip()


def ratios(measured: Iterable[dict[str, Any]]) -> Iterable[str]:
    """One line for each task with a contender of this project."""
    yield "Time of others for the same work, as multiples of ours: above 1, ours is faster. 'published' is what"
    yield "papers publish; 'by hand' careful plain PyTorch; 'compiled' the same with torch.compile; 'least' what every"
    yield "program needs: only a round's convolutions and matrix products, or a copy of as many bytes."
    yield f"{'task':<66}{'ours, ms':>10}" + "".join(f"{column:>11}" for column in COLUMNS)
    for group, rows in by_group(measured).items():
        if OURS not in rows:
            continue
        ours = rows[OURS]["seconds"]
        cells = []
        for names in COLUMNS.values():
            found = [rows[name]["seconds"] / ours for name in names if name in rows]
            cells.append(f"{min(found):9.2f} ×" if found else "")
        yield f"{group:<66}{ours * 1e3:10.3f}{''.join(f'{cell:>11}' for cell in cells)}".rstrip()


def missing(names: Sequence[str], group: str, config: pytest.Config) -> list[str]:
    """The contenders without a result by this code on this machine; beside them ours, with which they are compared."""
    _, kept = results(config)
    here = machine()
    measured = {row["contender"] for row in kept["benchmarks"] if (row["group"], row["machine"]) == (group, here)}
    return [name for name in names if name not in measured or name == OURS] if set(names) - measured else []


def results(config: pytest.Config) -> tuple[Path, records.Record]:
    """The machine's file, and what it holds."""
    chosen = config.getoption("--results")
    folder = chosen or (records.RESULTS if config.getoption("--record") else ROOT / "runs" / "bench")
    path: Path = folder / file_name()
    return path, {"benchmarks": [], **(records.load(path) if path.exists() else {})}


def write(measured: list[dict[str, Any]], config: pytest.Config, profiles: Sequence[dict[str, Any]] = ()) -> Path:
    """Add to the machine's file; what was measured again is replaced."""
    path, kept = results(config)
    again = {(row["group"], row["contender"]) for row in measured}
    rows = [row for row in kept["benchmarks"] if (row["group"], row["contender"]) not in again]
    rows += [{**row, "machine": machine()} for row in measured]
    found = {profile["round"]: profile for profile in (*kept.get("profiles", []), *profiles)}
    profiled = {"profiles": list(found.values())} if found else {}
    records.save(path, {**kept, "device": device_name(), **profiled, "benchmarks": rows})
    return path
