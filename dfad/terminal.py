"""The one console that progress, log lines and tables share, so that none breaks another."""

import codecs
import io
import logging
import os
import sys
import unicodedata
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.logging import RichHandler

console = Console(stderr=True)
"""On standard error: standard output holds results alone. Rich respects NO_COLOR."""


PLAIN = str.maketrans({"–": "-", "—": "-", "→": "->", "×": "x", "…": "...", "‖": "||", "≥": ">=", "≤": "<="})
"""For terminals that know ASCII alone."""


def prepare_streams() -> None:
    """Let the standard streams take any text: what their encoding lacks is replaced by what looks like it, and what
    goes to a closed one is lost."""
    codecs.register_error("plain", _plain)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper) and codecs.lookup(stream.encoding).name != "utf-8":
            stream.reconfigure(errors="plain")


def _plain(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    return "".join(map(_looking_alike, error.object[error.start : error.end])), error.end


def _looking_alike(character: str) -> str:
    name = unicodedata.name(character, "")
    if name.startswith("BOX DRAWINGS"):
        return "-" if name.endswith("HORIZONTAL") else "|" if name.endswith("VERTICAL") else "+"
    letters = unicodedata.normalize("NFKD", character.translate(PLAIN)).encode("ascii", "ignore").decode()
    return letters or "?"


def silence_stdout() -> None:
    """After whoever read the output has gone: what is still to come, at the program's end too, is lost."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def configure_logging(level: int = logging.INFO) -> None:
    """Log lines through the console: styled on a terminal, plain elsewhere."""
    handler: logging.Handler
    if console.is_terminal:
        handler = RichHandler(console=console, show_path=False, log_time_format="[%X]")
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    logging.basicConfig(level=level, handlers=[handler], format="%(message)s", force=True)


@contextmanager
def quiet(*loggers: str) -> Iterator[None]:
    """What other packages report of their own work is not shown: their warnings, and the log lines of these loggers."""
    levels = {name: logging.getLogger(name).level for name in loggers}
    for name in loggers:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
