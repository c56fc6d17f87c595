"""A record as plots: rounds and losses against their alternatives, and accuracies over time."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from bench import report
from bench.records import Record


def save(record: Record, path: Path) -> None:
    """Write the plots of a record."""
    panels = [(draw, found) for draw, find in PANELS.items() if (found := find(record))]
    rows = max((len(found) for _, found in panels), default=0)
    rows = max(rows, sum(map(len, round_times(record).values())))
    figure = Figure(figsize=(5.4 * max(1, len(panels)), max(4.2, 0.22 * rows)), layout="constrained")
    if record.get("rehearsal"):
        figure.suptitle(report.REHEARSED)
    for index, (draw, found) in enumerate(panels):
        draw(figure.add_subplot(1, len(panels), index + 1), found)
    figure.savefig(path, dpi=110)


def round_times(record: Record) -> dict[str, dict[str, float]]:
    """Milliseconds of each contender, by pair of networks."""
    return {
        group.name.removeprefix("round "): {name: row["seconds"] * 1e3 for name, row in group.rows.items()}
        for group in report.groups({"": record})
        if group.name.startswith("round ")
    }


def loss_shares(record: Record) -> dict[str, float]:
    """Bandwidth of each loss, forward and backward, as a share of a copy's; as a CUDA graph if that was measured."""
    shares: dict[str, dict[str, float]] = {}
    for group in report.groups({"": record}):
        match = report.LOSS_GROUP.fullmatch(group.name)
        share = group.over(report.COPY, report.OURS)
        if match and share and match["direction"] == "forward+backward":
            shares.setdefault(match["launch"], {})[f"{match['name']}, {match['dtype']}"] = share
    return shares.get("graph") or shares.get("eager") or {}


def curves(record: Record) -> list[dict[str, Any]]:
    """Students with accuracies measured during their run."""
    return [student for student in record.get("students", []) if student.get("curve")]


def draw_rounds(axes: Any, times: dict[str, dict[str, float]]) -> None:
    """Multiples of our time; our own bar shows the time."""
    names = list(dict.fromkeys(name for contenders in times.values() for name in contenders))
    height = 0.8 / len(names)
    for index, name in enumerate(names):
        places, widths, labels = [], [], []
        for place, contenders in enumerate(times.values()):
            if name in contenders and report.OURS in contenders:
                places.append(place + index * height)
                widths.append(contenders[name] / contenders[report.OURS])
                labels.append(f"{contenders[name]:.3g} ms")
        bars = axes.barh(places, widths, height, label=name)
        axes.bar_label(bars, labels, fontsize=7, padding=2)
    axes.set_yticks([place + 0.4 - height / 2 for place in range(len(times))], list(times))
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set(title="Rounds", xlabel="time over ours", xscale="log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.margins(x=0.15)
    axes.invert_yaxis()
    axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2)


def draw_losses(axes: Any, shares: dict[str, float]) -> None:
    """One bar per entry."""
    bars = axes.barh(list(shares), list(shares.values()))
    axes.bar_label(bars, [f"{share:.0%}" for share in shares.values()], fontsize=7, padding=2)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set(title="Losses, forward and backward", xlabel="share of a copy's bandwidth")
    axes.tick_params(axis="y", labelsize=7)
    axes.margins(x=0.15)
    axes.invert_yaxis()


def draw_curves(axes: Any, students: list[dict[str, Any]]) -> None:
    """Accuracies, and each teacher's as a line of the same colour."""
    for index, student in enumerate(students):
        color = f"C{index}"
        points = [(look["seconds"], look["accuracy"]) for look in student["curve"]]
        axes.plot(*zip(*points, strict=True), color=color, marker=".", label=student["name"])
        axes.axhline(student["teacher_accuracy"], color=color, linewidth=0.8, linestyle="--")
    axes.set(title="Students; dashed, their teachers", xlabel="seconds", ylabel="accuracy on test images")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.2))  # below, clear of the curves


PANELS = {draw_rounds: round_times, draw_losses: loss_shares, draw_curves: curves}
"""The plots: a drawing function and its data for each."""
