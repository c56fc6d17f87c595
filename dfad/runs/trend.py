"""The trend of a student's agreement with the teacher: whether it still improves."""

from collections.abc import Mapping, Sequence

STEADY = 0.005
"""Smallest change of the agreement that counts: half an image in a hundred."""

FEWEST = 3
"""Smallest number of evaluations for a trend."""


def recent_change(history: Sequence[Mapping[str, float]]) -> tuple[float, int] | None:
    """The change of the agreement over the last half of its evaluations, and the number of rounds; None for too few.

    The change is that of the least-squares line, so that a single outlier at the end is no trend.

    Args:
        history: records of metrics, each with its ``round``.
    """
    points = [(record["round"], record["agreement"]) for record in history if "agreement" in record]
    points = points[-max(FEWEST, (len(points) + 1) // 2) :]
    span = points[-1][0] - points[0][0] if points else 0
    if len(points) < FEWEST or not span:
        return None
    centre = sum(x for x, _ in points) / len(points)
    mean = sum(y for _, y in points) / len(points)
    slope = sum((x - centre) * (y - mean) for x, y in points) / sum((x - centre) ** 2 for x, _ in points)
    return slope * span, int(span)


def direction(change: float) -> str:
    """A change as a word."""
    return "steady" if abs(change) < STEADY else "rising" if change > 0 else "falling"


def verdict(history: Sequence[Mapping[str, float]]) -> str:
    """A sentence on whether the student still improved at the end."""
    found = recent_change(history)
    if found is None:
        return "Agreement was measured too seldom to say whether it still rises: --selection.every sets the interval."
    change, span = found
    if direction(change) == "steady":
        return f"Agreement was steady over the last {span:,} rounds: these settings will hardly improve it further."
    moved = "still rose" if change > 0 else "fell"
    return f"Agreement {moved} by {abs(change):.1%} of the images over the last {span:,} rounds."


def improves(history: Sequence[Mapping[str, float]]) -> bool:
    """Whether the student still improved at the end."""
    found = recent_change(history)
    return found is not None and direction(found[0]) == "rising"


def duration(seconds: float) -> str:
    """A duration as text."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
