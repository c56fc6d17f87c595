"""Comparison of runs: differences of settings and results, and overlaid curves."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from dfad.errors import RunFolderError
from dfad.runs.page import chart, page, percent, table
from dfad.runs.recorder import read_history
from dfad.runs.report import read_result
from dfad.runs.run_page import PANELS, REPORT, curve, plain
from dfad.runs.settings import SETTINGS_FILE, read_yaml

RESULTS = {
    "best_agreement": percent, "agreement": percent, "best_accuracy": percent, "accuracy": percent,
    "rounds": "{:,}".format, "images": "{:,}".format, "student_images": "{:,}".format, "teacher_queries": "{:,}".format,
    "seconds": "{:,.1f}".format, "rounds_per_second": "{:.3g}".format,
}  # fmt: skip
"""Figures of ``result.json``, in this order, and their format."""


@dataclass(frozen=True)
class Run:
    """The content of a run's folder."""

    name: str
    folder: Path
    settings: Mapping[str, Any]
    """Settings by the names of their flags."""
    history: Sequence[Mapping[str, float]]
    result: Mapping[str, Any]
    """Result; empty if the run is not finished."""


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs in folders, each named by the distinguishing part of its path.

    Raises:
        RunFolderError: if a folder holds no run, or a file in it cannot be read.
    """
    return [_read(folder, name) for folder, name in zip(folders, names_of(folders), strict=True)]


def names_of(folders: Sequence[Path]) -> list[str]:
    """The last parts of the folders' paths, as many as are needed to distinguish them."""
    parts = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{index + 1}: {folder}" for index, folder in enumerate(folders)]


def differences(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Settings in which runs differ: a value per run, a dash where a run has no such setting."""
    names = dict.fromkeys(name for run in runs for name in run.settings)
    rows = {name: [_text(run.settings.get(name, _MISSING)) for run in runs] for name in names}
    return {name: values for name, values in rows.items() if len(set(values)) > 1}


def results(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Figures of the results: a text per run, a dash where a run has none."""
    rows = {}
    for name, show in RESULTS.items():
        values = [run.result.get(name) for run in runs]
        if any(value is not None for value in values):
            rows[plain(name)] = ["–" if value is None else show(value) for value in values]
    return rows


def comparison_page(runs: Sequence[Run]) -> str:
    """The page that compares two or more runs, as HTML."""
    return page(f"{len(runs)} runs · dfad", _page(runs))


def _page(runs: Sequence[Run]) -> Iterator[str]:
    names = [_linked(run) for run in runs]
    yield f"<h1>{len(runs)} runs compared</h1>"
    unfinished = [run.name for run in runs if not run.result]
    if unfinished:
        yield f'<p class="quiet">Not finished: {escape(", ".join(unfinished))}.</p>'
    yield "<h2>Results</h2>"
    yield table("At the end of each run", _rows(results(runs)), ["", *names], numbers=True)
    yield "<h2>Settings that differ</h2>"
    found = differences(runs)
    if found:
        rows = ([f"<code>{escape(name)}</code>", *map(escape, values)] for name, values in found.items())
        yield table("Settings, by the names of their flags", rows, ["", *names])
    else:
        yield "<p>None: all settings are the same.</p>"
    yield "<h2>Curves</h2>"
    yield '<p class="quiet">Point at a curve, or move along it with the arrow keys, to read its values.</p>'
    metrics = dict.fromkeys(name for names in PANELS.values() for name in names)
    drawn = (chart(plain(name), {run.name: curve(run.history, name) for run in runs}) for name in metrics)
    yield f'<div class="charts">{"".join(drawn)}</div>'


def _rows(values: Mapping[str, Sequence[str]]) -> Iterator[Sequence[str]]:
    for name, cells in values.items():
        yield [escape(name), *map(escape, cells)]


def _linked(run: Run) -> str:
    report = run.folder / REPORT
    if not report.exists():
        return escape(run.name)
    return f'<a href="{escape(report.absolute().as_uri())}">{escape(run.name)}</a>'


def _read(folder: Path, name: str) -> Run:
    if not (folder / SETTINGS_FILE).is_file():
        raise RunFolderError(f"{folder} holds no {SETTINGS_FILE}, so it is not a run's folder.")
    settings = dict(_flat(read_yaml(folder / SETTINGS_FILE)))
    # an epoch of a teacher's run is a round here
    history = [{"round": record.get("epoch", 0), **record} for record in read_history(folder)]
    return Run(name, folder, settings, history, read_result(folder))


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        # empty mappings and keyword arguments count as values
        if isinstance(value, Mapping) and value and not name.endswith("kwargs"):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


_MISSING = object()


def _text(value: Any) -> str:
    if value is _MISSING:
        return "–"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
