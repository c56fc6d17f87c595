"""The one console that progress, log lines and tables share, so that none breaks another."""

import logging

from rich.console import Console
from rich.logging import RichHandler

console = Console(stderr=True)
"""On standard error: standard output holds results alone. Rich respects NO_COLOR."""


def configure_logging(level: int = logging.INFO) -> None:
    """Log lines through the console: styled on a terminal, plain elsewhere."""
    handler: logging.Handler
    if console.is_terminal:
        handler = RichHandler(console=console, show_path=False, log_time_format="[%X]")
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    logging.basicConfig(level=level, handlers=[handler], format="%(message)s", force=True)
