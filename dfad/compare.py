"""``python -m dfad.compare RUN RUN``: list differences of settings and results, and overlay the curves of runs."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from rich.console import Console
from rich.table import Table

from dfad import cli
from dfad.errors import ConfigurationError, RunFolderError
from dfad.files import write_text
from dfad.ranks import require_alone
from dfad.runs.compare import Run, comparison_page, differences, read_runs, results
from dfad.terminal import configure_logging

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Compare:
    """List differences of settings and results of runs; with --output, also write a page with their curves.

    Exit codes: 0 done; 2 option or settings file; 4 a folder that holds no run, or a page that cannot be written.
    """

    runs: Annotated[tuple[Path, ...], cli.Positional]
    """Folders of two or more runs, finished or not."""

    output: Path | None = None
    """File for the page, such as comparison.html."""

    overwrite: cli.Action = False
    """Replace that file."""

    json: cli.Action = False
    """Print JSON instead of tables."""

    def __post_init__(self) -> None:
        if len(self.runs) < 2:
            raise ValueError(f"{len(self.runs)} run is named; two or more can be compared")


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the arguments, read the runs, print the differences."""
    command = cli.parse_flags(Compare, arguments)
    require_alone("dfad.compare", "Start one process.")
    configure_logging()
    runs = read_runs(command.runs)
    if command.output is not None:
        _write(command, runs, command.output)
    if command.json:
        named = {run.name: {"settings": run.settings, "result": run.result} for run in runs}
        print(json.dumps({"runs": named, "differences": differences(runs)}, indent=2, ensure_ascii=False))
        return
    Console().print(_table("Results", runs, results(runs), "right"))
    found = differences(runs)
    if found:
        Console().print(_table("Settings that differ", runs, found, "left"))
    else:
        Console().print("All settings are the same.")


def _write(command: Compare, runs: Sequence[Run], path: Path) -> None:
    if path.is_dir() or path.suffix not in (".html", ".htm"):
        raise ConfigurationError(f"--output {path} names no page; give a file that ends in .html.")
    if path.exists() and not command.overwrite:
        raise RunFolderError(f"{path} already exists. Replace it with --overwrite, or choose another --output.")
    if not path.absolute().parent.is_dir():
        raise RunFolderError(f"There is no folder {path.absolute().parent} to write {path.name} to.")
    write_text(path, comparison_page(runs))
    log.info("The page is %s.", path)


def _table(title: str, runs: Sequence[Run], rows: Mapping[str, Sequence[str]], justify: str) -> Table:
    table = Table("", *(run.name for run in runs), title=title)
    for column in table.columns:
        column.overflow = "fold"
    for column in table.columns[1:]:
        column.justify = "right" if justify == "right" else "left"
    for name, values in rows.items():
        table.add_row(name, *values)
    return table


if __name__ == "__main__":
    cli.run(main)
