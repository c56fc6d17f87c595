"""``python -m bench.report``: README's figures, ``docs/results.md`` and the curves beside it, from the records alone.

A record that is added to ``bench/results`` appears by itself: its benchmarks by the names of their groups, and every
part of it that holds a ``teacher_accuracy`` as a row of accuracies.
"""

import argparse
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.records import Record, load_all
from dfad.experiments.comparisons import REAL_DATA
from dfad.experiments.figures import comparison_figure
from dfad.experiments.provenance import UNKNOWN
from dfad.runs.pictures import save_picture

ROOT = Path(__file__).parents[1]
README, ALL_RESULTS = ROOT / "README.md", ROOT / "docs" / "results.md"

OURS, COPY, FLOOR = "ours", "copy", "floor"
LOSS_GROUP = re.compile(r"(?P<name>.+), (?P<dtype>\w+), (?P<direction>forward(?:\+backward)?), (?P<launch>\w+)")

Row = dict[str, Any]
Records = Mapping[str, Record]


@dataclass(frozen=True)
class Group:
    """Contenders for one task on one machine."""

    record: str
    name: str
    rows: dict[str, Row]
    """By contender."""

    def seconds(self, contender: str) -> float | None:
        """Of its fastest round."""
        return self.rows[contender]["seconds"] if contender in self.rows else None

    def over(self, contender: str, other: str) -> float | None:
        """How many times as long the one takes as the other."""
        one, two = self.seconds(contender), self.seconds(other)
        return one / two if one and two else None


def groups(records: Records) -> list[Group]:
    """All groups, record by record."""
    found: dict[tuple[str, str], Group] = {}
    for record, content in records.items():
        for row in content.get("benchmarks", []):
            group = found.setdefault((record, row["group"]), Group(record, row["group"], {}))
            group.rows[row["contender"]] = row
    return list(found.values())


def rounds(records: Records) -> list[str]:
    """Whole rounds of every machine."""
    body = [
        [
            group.record,
            group.name.removeprefix("round "),
            milliseconds(group.seconds(OURS)),
            times(group.over("published", OURS)),
            times(group.over("repaired", OURS)),
            times(group.over(OURS, FLOOR)),
        ]
        for group in groups(records)
        if group.name.startswith("round ")
    ]
    head = ("record", "networks", "ours, ms", "as published", "repaired by hand", "ours over the floor")
    return table(head, body, figures_from=2)


def losses(records: Records, *, largest_only: bool) -> list[str]:
    """The losses of every machine, forward and backward in float32 as they run fastest there; or all there is."""
    body = []
    for group, match in _losses(records, largest_only=largest_only):
        details = () if largest_only else (match["dtype"], match["direction"], match["launch"])
        contenders = (group.over(name, OURS) for name in ("published", "torch.compile"))
        body.append(
            [
                group.record,
                match["name"],
                *details,
                milliseconds(group.seconds(OURS)),
                *map(times, contenders),
                percent(group.over(COPY, OURS)),
            ]
        )
    details = () if largest_only else ("dtype", "direction", "launch")
    head = ("record", "loss", *details, "ours, ms", "as published", "torch.compile", "of a copy's bandwidth")
    return table(head, body, figures_from=2 + len(details))


def _losses(records: Records, *, largest_only: bool) -> Iterator[tuple[Group, re.Match[str]]]:
    matched = [(group, match) for group in groups(records) if (match := LOSS_GROUP.fullmatch(group.name))]
    if not largest_only:
        yield from matched
        return
    best: dict[tuple[str, str], tuple[Group, re.Match[str]]] = {}
    for group, match in matched:
        if OURS not in group.rows or (match["dtype"], match["direction"]) != ("float32", "forward+backward"):
            continue
        kind = (group.record, match["name"].rpartition(" ")[0])  # the name without the size
        row = group.rows[OURS]
        if kind not in best or _rank(row) > _rank(best[kind][0].rows[OURS]):
            best[kind] = (group, match)
    yield from best.values()


def _rank(row: Row) -> tuple[int, float]:
    return row.get("bytes", 0), -row["seconds"]


def other_groups(records: Records) -> list[str]:
    """Everything that is measured besides rounds and losses."""
    body = [
        [group.record, group.name, contender, milliseconds(row["seconds"]), _rate(row)]
        for group in groups(records)
        if not group.name.startswith("round ") and not LOSS_GROUP.fullmatch(group.name) and not _of_ranks(group)
        for contender, row in group.rows.items()
    ]
    return table(("record", "task", "contender", "ms", "images per second"), body, figures_from=3)


def ranks(records: Records) -> list[str]:
    """What several ranks share, against one process or DistributedDataParallel."""
    body = [
        [
            group.record,
            group.name,
            contender,
            milliseconds(row["seconds"]),
            f"{row['rounds_per_second']:,.1f}",
            _rate(row),
            str(row.get("collectives", "")),
            f"{row['bytes_sent'] / 1e6:.2f}" if "bytes_sent" in row else "",
            percent(row.get("share_in_collectives")),
        ]
        for group in groups(records)
        if _of_ranks(group)
        for contender, row in group.rows.items()
    ]
    head = (
        "record",
        "task",
        "contender",
        "ms",
        "per second",
        "images per second",
        "collectives",
        "MB sent",
        "of the time",
    )
    return table(head, body, figures_from=3)


def _of_ranks(group: Group) -> bool:
    return any("ranks" in row for row in group.rows.values())


def all_contenders(records: Records) -> list[str]:
    """Each contender's round: its rate, its memory and its distance from ours."""
    body = [
        [
            group.record,
            group.name.removeprefix("round "),
            contender,
            milliseconds(row["seconds"]),
            _rate(row),
            f"{row['peak_memory_bytes'] / 1e6:,.0f}" if "peak_memory_bytes" in row else "",
            times(group.over(contender, OURS)),
            {True: "yes", False: "no"}.get(row.get("captured"), ""),
        ]
        for group in groups(records)
        if group.name.startswith("round ")
        for contender, row in group.rows.items()
    ]
    head = ("record", "networks", "contender", "ms", "images per second", "peak memory, MB", "over ours", "CUDA graph")
    return table(head, body, figures_from=3)


def left_out(records: Records) -> Iterator[str]:
    """Parts of the engine that our rounds did without, and why."""
    for group in groups(records):
        for contender, row in group.rows.items():
            for reason in row.get("left_out", ()):
                yield f"- {group.record.removesuffix('.json')}, {group.name}, {contender}: {reason}"


def _rate(row: Row) -> str:
    return f"{row['images_per_second']:,.0f}" if "images_per_second" in row else ""


def accuracies(records: Records) -> list[str]:
    """Every distillation that was measured on real images."""
    body = [
        [
            record,
            row["name"],
            percent(row["teacher_accuracy"], 2),
            spread(row["accuracy"]),
            spread(row.get("best_accuracy")),
            str(seeds(row) or ""),
            f"{row['test_images']:,}" if "test_images" in row else "",
            f"{mean(row['seconds']):.0f}" if "seconds" in row else "",
        ]
        for record, content in records.items()
        for row in measured_accuracies(content)
    ]
    head = ("record", "distillation", "teacher", "student, last", "chosen", "seeds", "test images", "seconds")
    return table(head, body, figures_from=2)


def measured_accuracies(content: Any) -> Iterator[Row]:
    """Every part of a record, at any depth, that has the accuracies of a teacher and its student, or of every arm."""
    if isinstance(content, dict) and "teacher_accuracy" in content:
        name = content.get("name") or content.get("comparison") or content.get("preset") or ""
        if "arms" in content:
            shared = {key: content[key] for key in ("teacher_accuracy", "test_images", "machine") if key in content}
            for arm, row in content["arms"].items():
                yield {**shared, **row, "name": f"{name}, {arm}"}
        elif "accuracy" in content:
            yield {**content, "name": name}
        return
    for part in content.values() if isinstance(content, dict) else content if isinstance(content, list) else ():
        yield from measured_accuracies(part)


def seeds(row: Row) -> int:
    """The number of runs behind a row; 0 where it is not recorded."""
    values = row["accuracy"].get("values", ()) if isinstance(row["accuracy"], Mapping) else ()
    return len(row.get("runs", values))


def teachers(records: Records) -> list[str]:
    """Every network that was trained on data as a teacher."""
    body = [
        [
            record,
            teacher["name"],
            percent(teacher["accuracy"], 2),
            str(teacher["epochs"]),
            f"{teacher['seconds']:.0f}",
            f"{teacher['images_per_second']:,.0f}",
        ]
        for record, content in records.items()
        for teacher in content.get("teachers", [])
    ]
    head = ("record", "teacher", "accuracy", "epochs", "seconds", "images per second")
    return table(head, body, figures_from=2)


def claims(records: Records) -> list[str]:
    """What comparisons were meant to show, and whether they do."""
    return [
        f"- {record.removesuffix('.json')}: {claim['text']}: {'holds' if claim['holds'] else 'does not hold'}"
        for record, content in records.items()
        for claim in content.get("claims", [])
    ]


def checks(records: Records) -> list[str]:
    """What was tested on each GPU, and what was not available there."""
    body = [
        [record, check, result]
        for record, content in records.items()
        for check, result in content.get("checks", {}).items()
    ]
    return table(("record", "check", "result"), body)


def kernels(records: Records) -> list[str]:
    """What the profiler counted of each kernel."""
    body = [
        [record, kernel["kernel"], *(f"{value:,.2f}" for value in kernel["metrics"].values())]
        for record, content in records.items()
        for kernel in content.get("kernels", [])
    ]
    names = next((list(k["metrics"]) for c in records.values() for k in c.get("kernels", [])), [])
    return table(("record", "kernel", *names), body, figures_from=2)


def profiles(records: Records) -> Iterator[str]:
    """Where the time of a round goes, by kernel."""
    for record, content in records.items():
        for profile in content.get("profiles", []):
            yield (
                f"{record.removesuffix('.json')}, {profile['round']} in {profile['precision']}: "
                f"{profile['milliseconds']:.2f} ms, of which kernels {profile['kernel_milliseconds']:.2f} ms in "
                f"{profile['launches']} launches; {'' if profile.get('captured') else 'not '}captured as a CUDA graph."
            )
            yield ""
            body = [
                [row["kernel"], str(row["calls"]), f"{row['microseconds']:,.0f}", percent(row["share"], 1)]
                for row in profile["kernels"]
            ]
            yield from table(("kernel", "calls", "µs", "share"), body, figures_from=1)
            yield ""


def provenance(records: Records, folder: str | None = "bench/results") -> list[str]:
    """One line per record: device, versions, commit.

    Args:
        records: by the names of their files.
        folder: where the files are, to link them.
    """
    lines = []
    for name, content in records.items():
        machines = [row.get("machine", {}) for row in content.get("benchmarks", [])]
        machines += [row.get("machine", {}) for row in [*measured_accuracies(content), *content.get("teachers", [])]]
        told = dict.fromkeys(_machine(machine, content) for machine in machines or [content.get("machine", {})])
        link = f"[{name}]({folder}/{name})" if folder else name
        lines.append(f"- {link}: {'; also '.join(told)}")
    return lines


def _machine(machine: Mapping[str, str], content: Record) -> str:
    device = machine.get("device") or content.get("device") or f"device {UNKNOWN}"
    versions = [f"{label} {machine.get(key, UNKNOWN)}" for key, label in VERSIONS.items()]
    commit, marker, _ = machine.get("commit", UNKNOWN).partition(" + ")
    commit = commit if commit == UNKNOWN else f"`{commit[:7]}`"
    return f"{device}; {', '.join(versions)}; commit {commit}{' with changes' if marker else ''}"


VERSIONS = {"torch": "torch", "triton": "triton", "python": "Python"}


def no_gpu(records: Records) -> list[str]:
    """A line for readers where no record is from a GPU."""
    devices = [str(content.get("device", "")) for content in records.values()]
    if any("NVIDIA" in device for device in devices):
        return []
    return [
        "",
        "There is no record from a GPU yet: Triton kernels are tested in Triton's interpreter, and compiled offline.",
    ]


def speed(records: Records) -> list[str]:
    """Rounds and the largest losses."""
    return [
        "The fastest of a run's whole rounds. Multiples of ours: the loop as published, and the same loop repaired by",
        "hand. The last column is ours as a multiple of its floor, the convolutions and matrix products alone.",
        "",
        *rounds(records),
        "",
        "The losses, forward and backward in float32, the largest size of each kind.",
        "",
        *losses(records, largest_only=True),
        *no_gpu(records),
    ]


def accuracy(records: Records) -> list[str]:
    """Students, and the teachers that were trained for them."""
    return [
        "Accuracy of the student after the last round, and of the one that agreed most with its teacher on generated",
        "images: mean and standard deviation over seeds.",
        "",
        *accuracies(records),
        *(["", *trained] if (trained := teachers(records)) else []),
    ]


def highlights(records: Records) -> list[str]:
    """README's short table: of each comparison its most accurate distillation, and the rounds of each machine."""
    body = []
    for content in records.values():
        rows = [row for row in measured_accuracies(content) if not row["name"].endswith(REAL_DATA)]
        if rows:
            best = max(rows, key=lambda row: mean(row["accuracy"]))
            cells = percent(best["teacher_accuracy"], 2), spread(best["accuracy"]), str(seeds(best) or "")
            body.append([best["name"], *cells])
    head = ("most accurate distillation of a comparison", "teacher", "student", "seeds")
    return [
        *table(head, body, figures_from=1),
        "",
        "Time of a whole round. Multiples of ours: the loop as published, and the same loop repaired by hand. The last",
        "column is ours as a multiple of its floor, the convolutions and matrix products alone.",
        "",
        *rounds(records),
        *no_gpu(records),
    ]


PARTS: dict[str, Callable[[Records], list[str]]] = {"results": highlights}
"""Of the README, by the names in its markers."""


def readme(text: str, records: Records) -> str:
    """The README with its parts written from the records.

    Raises:
        ValueError: if it lacks a part's markers.
    """
    for name, part in PARTS.items():
        opening, closing = f"<!-- {name}: written by make report -->\n", f"<!-- end of {name} -->\n"
        before, found, rest = text.partition(opening)
        _, ended, after = rest.partition(closing)
        if not (found and ended):
            raise ValueError(f"README.md has no part between {opening.strip()} and {closing.strip()}; add these lines.")
        text = before + opening + "\n".join(part(records)) + "\n" + closing + after
    return text


REHEARSED = "A rehearsal: none of these figures is a measurement."


def results(records: Records) -> str:
    """``docs/results.md``."""
    intro = (
        "Written by `make report` from the files in `bench/results`. Times are those of the fastest round, rates those "
        "of the median round. The columns of contenders have their times as multiples of ours."
    )
    return "\n".join(["# Results", "", intro, *_sections(records, "../bench/results")]) + "\n"


def summary(record: Record, name: str) -> str:
    """One record as Markdown."""
    warning = ["", f"**{REHEARSED}**"] if record.get("rehearsal") else []
    return "\n".join([f"# {record['device']}", *warning, *_sections({name: record}, None)]) + "\n"


def _sections(records: Records, folder: str | None) -> Iterator[str]:
    sections = {
        "Speed, in short": speed(records),
        "Accuracy": accuracy(records),
        "Claims": claims(records),
        "Rounds": all_contenders(records),
        "Parts left out of these rounds": list(left_out(records)),
        "Losses": losses(records, largest_only=False),
        "Several ranks": ranks(records),
        "Data and choices": other_groups(records),
        "Checks on a GPU": checks(records),
        "Kernels of a round": list(profiles(records)),
        "Kernels, by the profiler": kernels(records),
        "Records": provenance(records, folder),
    }
    for title, lines in sections.items():
        if lines:
            yield from ("", f"## {title}", "", *lines)


def table(head: Sequence[str], body: Sequence[Sequence[str]], figures_from: int | None = None) -> list[str]:
    """A Markdown table; nothing where there are no rows.

    Args:
        head: titles.
        body: cells.
        figures_from: the first column of figures, which are set to the right.
    """
    if not body:
        return []
    rules = ["---" if figures_from is None or i < figures_from else "---:" for i in range(len(head))]
    # a record is named by its file; its line of versions links it
    rows = [[cell.removesuffix(".json") if i == 0 else cell for i, cell in enumerate(row)] for row in body]
    return [f"| {' | '.join(cells)} |" for cells in (head, rules, *rows)]


def milliseconds(seconds: float | None) -> str:
    """With three digits."""
    if seconds is None:
        return ""
    value = seconds * 1e3
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}" if value >= 0.1 else f"{value:.4f}"


def times(ratio: float | None) -> str:
    """With a multiplication sign."""
    return "" if ratio is None else f"{ratio:.3g} ×" if ratio < 100 else f"{ratio:.0f} ×"


def percent(fraction: float | None, digits: int = 0) -> str:
    """A fraction as a percentage."""
    return "" if fraction is None else f"{fraction:.{digits}%}".replace("%", " %")


def spread(values: Mapping[str, float] | float | None) -> str:
    """The mean and, over several seeds, the standard deviation."""
    if values is None:
        return ""
    deviation = values.get("std", 0.0) if isinstance(values, Mapping) else 0.0
    return percent(mean(values), 2) + (f" ± {100 * deviation:.2f}" if deviation else "")


def mean(values: Mapping[str, float] | float) -> float:
    """The mean over seeds, or the single value."""
    return values["mean"] if isinstance(values, Mapping) else values


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__.partition("\n")[0])
    parser.parse_args()
    records = load_all()
    README.write_text(readme(README.read_text(encoding="utf-8"), records), encoding="utf-8")
    ALL_RESULTS.write_text(results(records), encoding="utf-8")
    for name, record in records.items():
        if len(record.get("arms", ())) > 1:
            picture = ALL_RESULTS.with_name(name).with_suffix(".png")
            save_picture(picture, lambda record=record: comparison_figure(record))


if __name__ == "__main__":
    main()
