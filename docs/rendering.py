"""Hooks of the documentation's site: docstrings become Markdown, equations MathML, and records a part of it."""

import html
import re
from pathlib import Path
from typing import Any

import griffe
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

RECORDS = Path(__file__).parents[1] / "bench" / "results"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the records that pages link to."""
    for path in sorted(RECORDS.glob("*.json")):
        files.append(File.generated(config, f"bench/results/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Lets links that leave docs/ for a record find it in the site."""
    return markdown.replace("](../bench/results/", "](bench/results/")


def on_page_content(content: str, **_: Any) -> str:
    """Writes equations as MathML, which browsers show by themselves."""
    content = re.sub(r'<span class="arithmatex">\\\((.*?)\\\)</span>', _mathml("inline"), content, flags=re.DOTALL)
    return re.sub(r'<div class="arithmatex">\\\[(.*?)\\\]</div>', _mathml("block"), content, flags=re.DOTALL)


def _mathml(display: str) -> Any:
    return lambda found: convert(html.unescape(found[1]).strip(), display=display)


class Docstrings(griffe.Extension):
    """Rewrites what docstrings have of reStructuredText, roles and equations, as Markdown."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for every object that has been read."""
        if obj.docstring:
            obj.docstring.value = as_markdown(obj.docstring.value, owner=obj)


def as_markdown(text: str, owner: griffe.Object) -> str:
    """A docstring with links for roles and dollars around equations."""
    text = re.sub(r"^\.\. math::((?:.*\n)(?:[ ]+\S.*(?:\n|$))*)", _equation, text + "\n", flags=re.MULTILINE)
    text = re.sub(r":math:`([^`]+)`", r"$\1$", text)
    return re.sub(r":\w+:`(~?)([\w.]+)`", lambda role: _link(role[1], role[2], owner), text)


def _equation(directive: re.Match[str]) -> str:
    lines = " ".join(line.strip() for line in directive[1].splitlines())
    return f"$$\n{lines.strip()}\n$$\n"


def _link(shortened: str, name: str, owner: griffe.Object) -> str:
    """Of a name that the site has no page for, the name alone."""
    scope = owner if owner.is_class or owner.is_module else owner.parent
    candidates = [name] if "." in name else []
    while scope is not None and not candidates:
        if name in scope.members:
            candidates = [f"{scope.path}.{name}"]
        scope = scope.parent
    shown = f"<code>{name.rpartition('.')[2] if shortened else name}</code>"
    return f'<autoref identifier="{candidates[0]}" optional>{shown}</autoref>' if candidates else shown
