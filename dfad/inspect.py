"""``python -m dfad.inspect TEACHER``: describe a network, suitable students, and the command that distils it."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated

from rich.console import Console
from rich.table import Column, Table

from dfad import cli
from dfad.config import TeacherConfig
from dfad.engine import choose_device
from dfad.inspection import Inspection, inspection
from dfad.runs.settings import to_tree
from dfad.terminal import configure_logging


@dataclass(frozen=True, kw_only=True)
class Inspect:
    """Describe a teacher, suitable students, and the command that distils it; nothing is downloaded.

    Exit codes: 0 done; 2 option; 3 a network that cannot be loaded, or cannot teach.
    """

    source: Annotated[str, cli.Positional]
    """The teacher: timm:NAME, torchvision:NAME, hf:FOLDER-or-NAME, package.module:callable, a bare name of dfad.models,
    or a file that holds a network."""

    teacher: TeacherConfig = field(default_factory=TeacherConfig)

    device: str = "auto"
    """cpu, cuda or cuda:N; auto takes a GPU where there is one."""

    json: cli.Action = False
    """Print JSON instead of tables."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the arguments, inspect the network, print the result."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    command = cli.parse_flags(Inspect, arguments)
    configure_logging()
    found = inspection(
        command.source, command.teacher, choose_device(command.device), extras=_flags_of_teacher(arguments)
    )
    if command.json:
        print(json.dumps(to_tree(found), indent=2, ensure_ascii=False))
        return
    console = Console()
    for table in tables(found):
        console.print(table)
    for limit in found.limits:
        console.print(f"• {limit}", highlight=False)
    console.print("\nRun next:\n", highlight=False)
    print(found.command)


def _flags_of_teacher(arguments: Sequence[str]) -> list[str]:
    """The arguments that the printed command repeats."""
    kept, keeping = [], False
    for argument in arguments:
        if argument.startswith("--"):
            keeping = argument.startswith("--teacher.")
        if keeping:
            kept.append(argument)
    return kept


def tables(found: Inspection) -> list[Table]:
    """The result as tables."""
    about = Table("", "", title=f"{found.source}: {found.network}", show_header=False)
    channels, height, width = found.image_shape
    size_found = found.image_shape_found.rstrip(".")
    rows = {
        "classes": str(found.classes),
        "images": f"{channels} channel{'s' * (channels > 1)}, {height}×{width} pixels ({size_found})",
        "normalisation": _normalisation(found),
        "norms": _counts(found.norms),
        "activations": f"{_counts(found.activations)}: {found.boundary}",
        "generated images are shaped by": found.image_prior,
        "parameters": f"{found.parameters:,}",
        "MFLOP per image": f"{found.flops_per_image / 1e6:,.4g}",
        f"seconds per batch of {found.batch_size}": f"{found.seconds_per_batch:.4g} on {found.device}",
        "parts of the engine": ", ".join(found.engine_parts),
        "why not the others": "\n".join(found.engine_reasons) or "all run",
    }
    for name, value in rows.items():
        about.add_row(name, value)
    whole = Column("tap", overflow="fold")  # a name to be copied
    taps = Table(whole, "shape", "what it is", title="Candidate taps: before the activation, the last of a resolution")
    for tap in found.taps:
        taps.add_row(tap.name, "×".join(map(str, tap.shape)), tap.found)
    students = Table("student", "parameters", "taps", title="Students that fit")
    for student in found.students:
        students.add_row(f"{student.source} {json.dumps(student.kwargs)}", f"{student.parameters:,}", student.fit)
    return [about, *([taps] if found.taps else []), *([students] if found.students else [])]


def _normalisation(found: Inspection) -> str:
    if not found.mean:
        return found.normalisation_found
    mean, std = (", ".join(f"{value:.4g}" for value in values) for values in (found.mean, found.std))
    return f"mean {mean}; std {std} ({found.normalisation_found})"


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items()) or "none found"


if __name__ == "__main__":
    cli.run(main)
