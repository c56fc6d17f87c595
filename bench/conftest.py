"""What all benchmarks share: the machine they ran on, the table of ratios, the record in ``bench/results``.

A group holds contenders for one task. Ratios are between the fastest rounds of a run, those that nothing disturbed.
"""

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from bench import records
from bench.race import outcomes, race
from dfad.experiments.provenance import device_name, file_name, machine

__all__ = ["outcomes", "race"]

OURS = "ours"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seconds", type=float, default=1.5, help="how long each operator is measured")
    parser.addoption("--record", action="store_true", help="write what was measured to <results>/<machine>.json")
    parser.addoption(
        "--results", type=Path, default=records.RESULTS, help="folder of the records; bench/results by default"
    )


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info.clear()
    machine_info.update(machine())


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """One table of ratios, and the record."""
    session = getattr(config, "_benchmarksession", None)
    measured = [entry(benchmark) for benchmark in session.benchmarks if benchmark] if session else []
    if not measured:
        return
    terminalreporter.section(f"ratios on {device_name()}")
    for line in table(measured):
        terminalreporter.write_line(line)
    if config.getoption("--record"):
        terminalreporter.write_line(f"written to {record(measured, config.getoption('--results'))}")


def entry(benchmark: Any) -> dict[str, Any]:
    """A benchmark as it is recorded; times in seconds."""
    stats = benchmark.stats
    return {
        "group": benchmark.group,
        "contender": benchmark.extra_info.get("contender", benchmark.name),
        "seconds": stats.min,
        "median": stats.median,
        "rounds": stats.rounds,
        **{key: value for key, value in benchmark.extra_info.items() if key != "contender"},
    }


def table(measured: Iterable[dict[str, Any]]) -> Iterable[str]:
    """For each group its contenders: time, time over ours, bandwidth and its share of a copy's."""
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in measured:
        groups[row["group"]].append(row)
    for group, rows in groups.items():
        ours = next((row["seconds"] for row in rows if row["contender"] == OURS), None)
        copy = next((row["seconds"] for row in rows if row["contender"] == "copy"), None)
        yield f"{group}"
        for row in sorted(rows, key=lambda row: -row["seconds"]):
            ratio = f"{row['seconds'] / ours:8.2f} ×" if ours else " " * 10
            width = f"{row['bytes'] / row['seconds'] / 1e9:8.1f} GB/s" if "bytes" in row else ""
            share = f"{copy / row['seconds']:6.0%} of a copy" if copy else ""
            yield f"  {row['contender']:<22}{row['seconds'] * 1e3:11.3f} ms {ratio} {width} {share}"


def record(measured: list[dict[str, Any]], results: Path) -> Path:
    """Adds to the machine's file; groups that were measured again are replaced."""
    path = results / file_name()
    kept = records.load(path) if path.exists() else {"benchmarks": []}
    again = {row["group"] for row in measured}
    rows = [row for row in kept["benchmarks"] if row["group"] not in again]
    rows += [{**row, "machine": machine()} for row in measured]
    records.save(path, {**kept, "device": device_name(), "benchmarks": rows})
    return path
