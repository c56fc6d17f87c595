"""The tables of ``docs/losses.md`` and ``docs/kernels.md`` that the tests measure."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def render(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def document(page: str, name: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Asserts that a page's table of that name has these rows by their first two columns.

    With ``DFAD_WRITE_TABLES=1`` the table is written instead, figures and all.
    """
    path = DOCS / page
    text = path.read_text(encoding="utf-8")
    between = re.compile(rf"(?<=<!-- {name} -->\n).*?(?=<!-- end -->)", re.DOTALL)
    found = between.search(text)
    assert found, f"{path} has no place for the table {name}"
    if os.environ.get("DFAD_WRITE_TABLES") == "1":
        path.write_text(between.sub(lambda _: render(header, rows) + "\n", text, count=1), encoding="utf-8")
        return
    documented = [tuple(cell.strip() for cell in line.strip("|").split("|")[:2]) for line in found[0].splitlines()[2:]]
    wanted = [tuple(map(str, row[:2])) for row in rows]
    assert documented == wanted, f"set DFAD_WRITE_TABLES=1 to write the tables of {page} again"
