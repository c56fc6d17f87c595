"""Errors for users: each message says what was given, what is needed and what to do.

Each class carries the exit code that a command ends with.
"""

from collections.abc import Iterable
from difflib import get_close_matches


class DfadError(Exception):
    """An error that commands show without a traceback."""

    exit_code = 1


class ConfigurationError(DfadError, ValueError):
    """An option, preset or configuration file that cannot be used."""

    exit_code = 2


class ModelError(DfadError, ValueError):
    """A teacher, student or checkpoint that cannot be built, read or combined."""

    exit_code = 3


class RunFolderError(DfadError):
    """A run's folder that already holds a run, has no room for one, or cannot be written to."""

    exit_code = 4


class DivergenceError(DfadError, ArithmeticError):
    """Losses became NaN or infinite; the last good checkpoint is kept."""

    exit_code = 5


class DataError(DfadError, ValueError):
    """Data that is missing, truncated, corrupted or in another format."""

    exit_code = 6


class ExportError(DfadError):
    """An export whose results differ from the student's, or that the student does not allow."""

    exit_code = 7


class RankError(DfadError):
    """Of the processes that share a run, one has ended, hangs, or went another way than the others."""

    exit_code = 8


class Interrupted(DfadError):
    """A signal asked the run to stop; its checkpoint is written."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number  # the shell's convention


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """The paragraph for a name that does not exist, with the closest that does and all of them."""
    known = list(known)
    return f"There is no {kind} {name!r}.{nearest(name, known)} Choose one of: {', '.join(known)}."


def not_installed(package: str, extra: str) -> str:
    """The message for a missing package that an extra of this one installs."""
    return f"{package} is not installed. Install it with: pip install 'dfad[{extra}]'."


def nearest(name: str, candidates: Iterable[str]) -> str:
    """`` Did you mean 'x'?`` for the candidate closest to ``name``, or nothing where none is close."""
    matches = get_close_matches(name, list(candidates), n=1, cutoff=0.5)
    return f" Did you mean {matches[0]!r}?" if matches else ""


def name_of(network: object) -> str:
    """The class of a network in messages: the user's own, which a wrapper of :mod:`dfad.models` holds."""
    own = getattr(network, "network", None) if type(network).__module__.startswith("dfad.models.") else None
    return type(network).__name__ if own is None else name_of(own)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the memory of the machine or of a GPU ran out, for which PyTorch has a class on GPUs alone."""
    on_gpu = type(error).__name__ == "OutOfMemoryError"
    return on_gpu or isinstance(error, MemoryError) or "DefaultCPUAllocator: can't allocate" in str(error)


def first_line(error: Exception) -> str:
    """The first line of an error's message, without the full stop: those of other packages are often long."""
    return str(error).strip().partition("\n")[0].rstrip(".") or "without a message"
