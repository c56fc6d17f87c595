"""Signals that ask a run to stop: it finishes the round, writes its checkpoint and exits."""

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass
class StopRequest:
    """Whether a stop was requested, and by which signal."""

    signal_number: int = 0
    """0 until then."""


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Turn SIGINT and SIGTERM into a request to stop during a block; a second signal acts as it would outside.

    Has no effect outside the main thread, where Python installs no handlers.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    previous = {number: signal.getsignal(number) for number in SIGNALS}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def handle(number: int, frame: FrameType | None) -> None:
        request.signal_number = number
        log.warning("%s: stopping after this round.", signal.Signals(number).name)
        restore()

    for number in SIGNALS:
        signal.signal(number, handle)
    try:
        yield request
    finally:
        restore()
