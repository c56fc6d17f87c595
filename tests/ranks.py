"""Several ranks on one machine, for tests."""

import os
import pickle
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dfad import cli
from dfad.ranks import TIME_LIMIT
from tests.processes import HANGING, context


def run_ranks(
    count: int, work: Callable[..., Any], folder: Path, *arguments: Any, time_limit: float = HANGING
) -> list[Any]:
    """What a function of a module returns in each of several processes that speak by gloo.

    Args:
        count: of processes.
        work: which all call.
        folder: an empty one.
        arguments: of the function.
        time_limit: of a collective, in seconds.
    """
    ranks = [
        context().Process(target=_rank, args=(rank, count, work, folder, arguments, time_limit))
        for rank in range(count)
    ]
    with _ended(ranks):
        pass
    outcomes = [
        pickle.loads(path.read_bytes()) if (path := folder / f"outcome-{rank}").exists() else (None, "it was killed")
        for rank in range(count)
    ]
    failures = [f"rank {rank}: {error}" for rank, (_, error) in enumerate(outcomes) if error]
    assert not failures, "\n".join(failures)
    return [result for result, _ in outcomes]


def _rank(
    rank: int, count: int, work: Callable[..., Any], folder: Path, arguments: tuple[Any, ...], time_limit: float
) -> None:
    torch.set_num_threads(1)
    result = error = None
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/rendezvous",
            rank=rank,
            world_size=count,
            timeout=timedelta(seconds=time_limit),
        )
        result = work(*arguments)
    except BaseException:
        error = traceback.format_exc()
    (folder / f"outcome-{rank}").write_bytes(pickle.dumps((result, error)))
    if error is None:
        with suppress(RuntimeError):  # where it is a collective that is to fail
            dist.barrier()  # whoever kept the connections stays until all have done
        dist.destroy_process_group()


@contextmanager
def _ended(ranks: Sequence[BaseProcess]) -> Iterator[None]:
    """Start processes before a block, and wait for them after it; none outlives it."""
    for rank in ranks:
        rank.start()
    try:
        yield
        deadline = time.monotonic() + HANGING
        for rank in ranks:
            rank.join(max(0.0, deadline - time.monotonic()))
        hanging = [number for number, rank in enumerate(ranks) if rank.is_alive()]
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()
    assert not hanging, f"ranks {hanging} hang"


@dataclass
class Ended:
    """What a command left."""

    exit_code: int
    output: str
    errors: str


def run_command(
    main: Callable[[Sequence[str]], None],
    arguments: Sequence[Sequence[object]],
    folder: Path,
    *,
    prepare: Callable[[int], None] | None = None,
    grace: float = 60.0,
    meanwhile: Callable[[Sequence[BaseProcess]], None] = lambda ranks: None,
    environment: Sequence[Mapping[str, str]] | None = None,
) -> list[Ended]:
    """A command in one process per rank, which find one another as torchrun's do, by a store that outlives them.

    Args:
        main: of the command.
        arguments: of each rank.
        folder: from which it is called; outputs are kept there.
        prepare: which each rank calls before the command, with its number.
        grace: seconds in which the first rank can report an error that all have.
        meanwhile: called with the started processes.
        environment: of each rank, beside what torchrun sets.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks = []
    for rank, given in enumerate(arguments):
        variables = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(len(arguments)),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            TIME_LIMIT: str(HANGING),
            **(environment[rank] if environment else {}),
        }
        command = (main, [*map(str, given)], folder, rank, variables, grace, prepare)
        ranks.append(context().Process(target=_command, args=command))
    with _ended(ranks):
        meanwhile(ranks)
    return [
        Ended(process.exitcode or 0, *((folder / f"{stream}-{rank}").read_text() for stream in ("output", "errors")))
        for rank, process in enumerate(ranks)
    ]


def _command(
    main: Callable[[Sequence[str]], None],
    arguments: list[str],
    folder: Path,
    rank: int,
    variables: Mapping[str, str],
    grace: float,
    prepare: Callable[[int], None] | None,
) -> None:
    torch.set_num_threads(1)
    cli.GRACE = grace
    os.environ.update(variables)
    os.chdir(folder)
    for stream, name in ((1, "output"), (2, "errors")):
        file = os.open(folder / f"{name}-{rank}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(file, stream)
    if prepare is not None:
        prepare(rank)
    cli.run(lambda: main(arguments))
