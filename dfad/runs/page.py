"""Parts of pages: each page is a single HTML file, which needs neither a server nor a network."""

import base64
import json
import math
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import Any

Points = Sequence[tuple[float, float]]

POINTS = 400
"""Largest number of points of a curve: more than a screen can show."""

DASHES = ("", "6 3", "2 3", "8 3 2 3")
"""Dashes of the curves, so that they differ in more than their colour."""

COLOURS = 8

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 360, 210, 46, 352, 8, 184
"""Layout of a chart in its own units, which are about pixels at a width of 400 pixels."""

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; \
script-src 'unsafe-inline'; img-src data:">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<main>
{body}
</main>
<script>
{script}</script>
</body>
</html>
"""


def page(title: str, body: Iterable[str]) -> str:
    """A whole page.

    Args:
        title: plain text.
        body: HTML.
    """
    folder = files("dfad.runs")
    style, script = ((folder / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    return PAGE.format(title=escape(title), style=style, body="\n".join(body), script=script)


def table(caption: str, rows: Iterable[Sequence[str]], header: Sequence[str] = (), *, numbers: bool = False) -> str:
    """A table whose first column names its rows; cells are HTML.

    Args:
        caption: HTML.
        rows: of cells.
        header: of columns.
        numbers: the other columns are numbers, aligned right.
    """
    kind = ' class="number"' if numbers else ""
    head = "".join(f'<th scope="col">{cell}</th>' for cell in header)
    lines = [f"<caption>{caption}</caption>"] + ([f"<thead><tr>{head}</tr></thead>"] if header else [])
    for name, *cells in rows:
        others = "".join(f"<td{kind}>{cell}</td>" for cell in cells)
        lines.append(f'<tr><th scope="row">{name}</th>{others}</tr>')
    return scrolled(caption, f"<table>{''.join(lines)}</table>")


def scrolled(name: str, content: str) -> str:
    """Content that may be wider than the page, with a name for screen readers."""
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{name}">{content}</div>'


def tiles(facts: Mapping[str, str]) -> str:
    """The most important figures, in large type."""
    return f'<ul class="tiles">{"".join(f"<li><strong>{v}</strong>{escape(k)}</li>" for k, v in facts.items())}</ul>'


def chart(title: str, series: Mapping[str, Points], unit: str = "round") -> str:
    """Curves over the rounds; empty if there are no points.

    Args:
        title: plain text.
        series: points ``(round, value)`` by name; values that are no numbers are left out.
        unit: of the horizontal axis.
    """
    drawn = {name: thinned([(x, y) for x, y in points if math.isfinite(y)]) for name, points in series.items()}
    drawn = {name: points for name, points in drawn.items() if points}
    if not drawn:
        return ""
    xs = [x for points in drawn.values() for x, _ in points]
    ys = [y for points in drawn.values() for _, y in points]
    low, high = min(xs), max(xs)
    ticks = nice_ticks(min(ys), max(ys))
    bottom, top = min(ticks[0], *ys), max(ticks[-1], *ys)

    def across(x: float) -> float:
        return LEFT + (RIGHT - LEFT) * ((x - low) / (high - low) if high > low else 0.5)

    def up(y: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * ((y - bottom) / (top - bottom) if top > bottom else 0.5)

    parts = []
    for tick in ticks:
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{RIGHT}" y1="{up(tick):.1f}" y2="{up(tick):.1f}"/>')
        parts.append(f'<text x="{LEFT - 5}" y="{up(tick) + 4:.1f}" text-anchor="end">{number(tick)}</text>')
    alone = low == high
    for x, anchor in {} if alone else {low: "start", high: "end"}.items():
        parts.append(f'<text x="{across(x):.1f}" y="{HEIGHT - 10}" text-anchor="{anchor}">{number(x)}</text>')
    axis = escape(f"{unit} {number(low)}" if alone else unit)
    parts.append(f'<text x="{(LEFT + RIGHT) / 2}" y="{HEIGHT - 10}" text-anchor="middle">{axis}</text>')
    legend = []
    for index, (name, points) in enumerate(drawn.items()):
        look = f'stroke="var(--series-{index % COLOURS})" stroke-dasharray="{DASHES[index % len(DASHES)]}"'
        dot = ' style="stroke-width: 6; stroke-linecap: round; stroke-dasharray: none"' if len(points) == 1 else ""
        path = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in (points * 2 if len(points) == 1 else points))
        parts.append(f'<polyline class="curve" {look}{dot} points="{path}"/>')
        line = f'<line x1="0" x2="26" y1="5" y2="5" stroke-width="2" {look}/>'
        legend.append(f'<li><svg viewBox="0 0 26 10" aria-hidden="true">{line}</svg> {escape(name)}</li>')
    parts.append(f'<line class="cursor" y1="{TOP}" y2="{BOTTOM}" x1="0" x2="0" visibility="hidden"/>')
    ends = "; ".join(f"{name} from {number(points[0][1])} to {number(points[-1][1])}" for name, points in drawn.items())
    data = {
        "series": [{"name": name, "points": points} for name, points in drawn.items()],
        "left": LEFT, "right": RIGHT, "low": low, "high": high,
    }  # fmt: skip
    return (
        f'<figure class="chart"><figcaption>{escape(title)}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" tabindex="0" aria-label="{escape(f"{title}: {ends}")}">'
        f'{"".join(parts)}</svg><ul class="legend">{"".join(legend)}</ul>'
        f'<p class="reading" aria-live="polite"></p>'
        f'<script type="application/json">{script_json(data)}</script></figure>'
    )


def thinned(points: Points) -> list[tuple[float, float]]:
    """At most :data:`POINTS` points, evenly spaced, including the last one."""
    step = math.ceil(len(points) / POINTS) if points else 1
    return [point for index, point in enumerate(points) if (len(points) - 1 - index) % step == 0]


def nice_ticks(low: float, high: float) -> list[float]:
    """About four round numbers that enclose a range."""
    if high <= low:
        low, high = low - (abs(low) / 2 or 1), high + (abs(high) / 2 or 1)
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first = math.floor(low / step + 1e-9)
    return [round(index * step, 12) for index in range(first, math.ceil(high / step - 1e-9) + 1)]


def number(value: float) -> str:
    """A number in short form, for an axis."""
    if value and not 1e-3 <= abs(value) < 1e5:
        digits, exponent = f"{value:.2e}".split("e")
        return f"{float(digits):g}e{int(exponent)}".replace("-", "−")
    return f"{value:.4g}".replace("-", "−")


def percent(value: float | None) -> str:
    """A value as text; a dash if there is none."""
    return "–" if value is None else f"{value:.2%}"


def script_json(value: Any) -> str:
    """JSON that cannot close a script element."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")


def image(pixels: Any) -> str:
    """An array ``uint8 (height, width[, 3])`` as PNG in a data URI."""
    return f"data:image/png;base64,{base64.b64encode(png(pixels)).decode()}"


def png(pixels: Any) -> bytes:
    """An array ``uint8 (height, width[, 3])`` as PNG.

    Implemented here, so that a page needs no package for pictures: ISO/IEC 15948, 8 bits, no filter.
    """
    height, width = pixels.shape[:2]
    colour = 2 if pixels.ndim == 3 else 0
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows, 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in chunks
    )
