"""The console that progress, log lines and tables share, so that they do not overwrite one another."""

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
"""Writes to standard error: standard output is for results only. Rich respects NO_COLOR."""


PLAIN = str.maketrans({"–": "-", "—": "-", "→": "->", "×": "x", "…": "...", "‖": "||", "≥": ">=", "≤": "<="})
"""Replacements for terminals that support only ASCII."""


def prepare_streams() -> None:
    """Let the standard streams accept any text: characters that their encoding lacks are replaced by similar ones, and
    output to a closed stream is discarded."""
    codecs.register_error("plain", _plain)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="plain")  # UTF-8 lacks what stands for the bytes of a name in another encoding


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
    """Discard all further output, because its reader has exited; also what Python flushes at exit."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def configure_logging(level: int = logging.INFO) -> None:
    """Log lines through the console: styled on a terminal, plain elsewhere; errors alone of ranks after the first."""
    from dfad.ranks import launched  # which needs PyTorch, and --version does not

    if launched()[0]:
        level = logging.ERROR
    handler: logging.Handler
    if console.is_terminal:
        handler = RichHandler(console=console, show_path=False, log_time_format="[%X]")
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    logging.basicConfig(level=level, handlers=[handler], format="%(message)s", force=True)


@contextmanager
def quiet(*loggers: str) -> Iterator[None]:
    """Hide the warnings of other packages, and the log lines of these loggers."""
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
