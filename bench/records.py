"""The records in ``bench/results``: JSON files, one per machine or experiment.

In a file, each row of ``benchmarks`` names its machine by its place in the list ``machines``, which rows share.
"""

import json
from pathlib import Path
from typing import Any

from dfad.files import write_text

RESULTS = Path(__file__).parent / "results"

Record = dict[str, Any]


def load(path: Path) -> Record:
    """A record, each row of its benchmarks with its own ``machine``."""
    content: Record = json.loads(path.read_text(encoding="utf-8"))
    machines = content.pop("machines", [])
    for row in content.get("benchmarks", []):
        if isinstance(row.get("machine"), int):
            row["machine"] = machines[row["machine"]]
    return content


def save(path: Path, content: Record) -> None:
    """Write a record that :func:`load` returned, atomically: a benchmark may be stopped at any moment."""
    machines: list[Any] = []
    rows = []
    for row in content.get("benchmarks", []):
        if row["machine"] not in machines:
            machines.append(row["machine"])
        rows.append({**row, "machine": machines.index(row["machine"])})
    shared = {"machines": machines, "benchmarks": rows} if rows else {}
    write_text(path, json.dumps({**content, **shared}, indent=1) + "\n")


def load_all(folder: Path = RESULTS) -> dict[str, Record]:
    """All records by the names of their files."""
    return {path.name: load(path) for path in sorted(folder.glob("*.json"))}
