"""Python programs as processes of their own, each a fork of one that has imported PyTorch already."""

import multiprocessing
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest import mock

HANGING = 1800
"""Seconds after which a program hangs, on however busy a machine."""

ROOT = str(Path(__file__).parents[1])

COMMANDS = tuple(f"dfad.{name}" for name in ("train", "teacher", "evaluate", "reproduce", "inspect", "export"))

IMPORTED = (
    *COMMANDS,
    "torch._dynamo",  # which PyTorch imports with the first optimizer
    "torch.distributed.fsdp",
    "torch.utils.tensorboard",
    "matplotlib.pyplot",
    "sklearn.datasets",
)

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(list(IMPORTED))


def context() -> Any:
    """The context of multiprocessing whose processes are such forks."""
    # what a library reads when it is imported: a pool of threads does not survive a fork
    with mock.patch.dict(os.environ, {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}):
        forkserver.ensure_running()
    return _context


class Process:
    """A running program, with the interface of :class:`subprocess.Popen`.

    Args:
        program: what follows ``python`` on a command line: ``-m MODULE``, ``-c CODE`` or a file, and its arguments.
        cwd: folder to run in.
        env: environment.
    """

    def __init__(self, program: Sequence[str], cwd: Path, env: Mapping[str, str]) -> None:
        self._folder = Path(tempfile.mkdtemp())
        given = [str(argument) for argument in program]
        self._process = context().Process(target=_run, args=(given, str(cwd), dict(env), str(self._folder)))
        self._process.start()

    @property
    def returncode(self) -> int | None:
        """The exit code, the negative number of the signal that ended it, or None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """The same."""
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send it a signal."""
        os.kill(self._process.pid, number)

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for its end; returns what it wrote to standard output and to standard error."""
        self._process.join(timeout)
        if self.returncode is None:
            self.kill()
            self._process.join()
            raise subprocess.TimeoutExpired("the program", timeout or 0)
        written = [path.read_text() if path.exists() else "" for path in (self._folder / "1", self._folder / "2")]
        shutil.rmtree(self._folder)
        return written[0], written[1]


def run(
    program: Sequence[str], cwd: Path, env: Mapping[str, str], timeout: float = HANGING
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end; arguments as of :class:`Process`."""
    process = Process(program, cwd, env)
    output, errors = process.communicate(timeout)
    assert process.returncode is not None
    return subprocess.CompletedProcess(list(program), process.returncode, output, errors)


def _run(program: list[str], cwd: str, env: dict[str, str], folder: str) -> None:
    for number in (1, 2):
        os.dup2(os.open(f"{folder}/{number}", os.O_WRONLY | os.O_CREAT), number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    option = program.pop(0) if program[0] in ("-m", "-c") else ""
    name, *arguments = program
    sys.argv = [option or name, *arguments]
    sys.path[:] = [cwd, *(folder for folder in sys.path if folder not in ("", ROOT))]
    if option == "-m":
        sys.modules.pop(name, None)  # or runpy would warn that it is imported already
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    elif option == "-c":
        exec(compile(name, "<string>", "exec"), {"__name__": "__main__"})
    else:
        runpy.run_path(name, run_name="__main__")
