"""Several ranks on one machine, for tests."""

import multiprocessing
import pickle
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

TIME_LIMIT = 120
"""Seconds; for what would otherwise hang."""

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["dfad.distillation.distiller"])  # imported once, and not once per rank


def run_ranks(
    count: int, work: Callable[..., Any], folder: Path, *arguments: Any, time_limit: float = TIME_LIMIT
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
        _context.Process(target=_rank, args=(rank, count, work, folder, arguments, time_limit)) for rank in range(count)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(TIME_LIMIT)
    hanging = [number for number, rank in enumerate(ranks) if rank.is_alive()]
    for rank in ranks:
        rank.kill()
    outcomes = [
        pickle.loads(path.read_bytes()) if (path := folder / f"outcome-{rank}").exists() else (None, "it was killed")
        for rank in range(count)
    ]
    failures = [f"rank {rank}: {error}" for rank, (_, error) in enumerate(outcomes) if error]
    assert not hanging, (hanging, failures)
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
