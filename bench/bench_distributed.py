"""Rounds that several ranks share on CPUs, where they speak by gloo, against one process that has all cores.

For each contender: rounds per second, the share of a round's time in collectives, their number, and the bytes that a
rank hands to them.
"""

import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from bench.device import ON_GPU
from bench.race import Contender, Outcome, Rules
from bench.rounds import CASES
from dfad.config import EngineConfig
from dfad.distillation.distiller import Distiller
from dfad.ranks import Ranks

RANKS = 2

CPU = torch.device("cpu")

SMALL = {case.name: case for case in CASES if not case.gpu_only}

Step = Callable[[], object]


@dataclass
class Collectives:
    """This project's collectives over tensors in a block."""

    seconds: float = 0.0
    count: int = 0
    bytes: int = 0
    """Of the tensors that this rank hands to them."""


@contextmanager
def watched() -> Iterator[Collectives]:
    """Watch the collectives of a block."""
    found = Collectives()

    def watching(collective: Callable[[Ranks, Tensor], Tensor]) -> Callable[[Ranks, Tensor], Tensor]:
        def call(ranks: Ranks, tensor: Tensor) -> Tensor:
            started = time.perf_counter()
            result = collective(ranks, tensor)
            found.seconds += time.perf_counter() - started
            found.count += 1
            found.bytes += tensor.nbytes
            return result

        return call

    plain = {name: getattr(Ranks, name) for name in ("add", "gather")}
    for name, collective in plain.items():
        setattr(Ranks, name, watching(collective))
    try:
        yield found
    finally:
        for name, collective in plain.items():
            setattr(Ranks, name, collective)


def timed(step: Step) -> tuple[float, Collectives]:
    """Seconds of a step that all ranks begin together, and its collectives."""
    if dist.is_initialized():
        dist.barrier()
    with watched() as collectives:
        started = time.perf_counter()
        step()
        return time.perf_counter() - started, collectives


class Team:
    """Processes that share a step, each with its part of the cores.

    Args:
        count: of processes.
        make: builds the step in each of them; is given a function that joins them, to be called first or later.
    """

    def __init__(self, count: int, make: Callable[[Step], Step]) -> None:
        self.seconds = self.within = 0.0
        self.collectives = Collectives()
        self.folder = tempfile.TemporaryDirectory()
        context = multiprocessing.get_context("spawn")
        self.ends = []
        for rank in range(count):
            end, other = context.Pipe()
            given = (rank, count, torch.get_num_threads(), make, Path(self.folder.name) / "rendezvous", other)
            context.Process(target=_serve, args=given, daemon=True).start()
            self.ends.append(end)
        self.run()

    def run(self) -> float:
        """Seconds of a step: of the slowest rank."""
        for end in self.ends:
            end.send(True)
        answers = [end.recv() for end in self.ends]
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        seconds, self.collectives = max(answers, key=lambda answer: answer[0])
        self.seconds += seconds
        self.within += self.collectives.seconds
        return float(seconds)

    def facts(self) -> Mapping[str, Any]:
        """Of a step, for the record."""
        if not self.collectives.count:
            return {"ranks": len(self.ends)}
        return {
            "ranks": len(self.ends),
            "collectives": self.collectives.count,
            "bytes_sent": self.collectives.bytes,
            "share_in_collectives": self.within / self.seconds,
        }

    def close(self) -> None:
        """End the processes."""
        for end in self.ends:
            end.send(False)
        self.folder.cleanup()


def _serve(rank: int, count: int, threads: int, make: Callable[[Step], Step], rendezvous: Path, end: Any) -> None:
    torch.set_num_threads(max(1, threads // count))

    def join() -> None:
        if count > 1:
            dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=count)

    step: Step | None = None
    while end.recv():
        try:
            step = step or make(join)
            end.send(timed(step))
        except Exception as error:
            end.send(RuntimeError(f"rank {rank}: {type(error).__name__}: {error}"))


def build(name: str, batch_size: int, **engine: Any) -> Distiller:
    """A case's distiller on CPUs."""
    case = SMALL[name]
    case = replace(case, method=replace(case.method, batch_size=batch_size))
    teacher, student = case.networks()
    # in float32: half of a processor's cores may compute bfloat16 with other instructions than all of them
    config = case.config(CPU, engine=EngineConfig(precision="float32", **engine))
    return Distiller(teacher, student, config, image_shape=case.image_shape)


def whole_round(join: Step, name: str, batch_size: int, **engine: Any) -> Step:
    """A round."""
    join()
    return build(name, batch_size, **engine).run_round


def student_step(join: Step, name: str, batch_size: int, **engine: Any) -> Step:
    """A student's step."""
    join()
    return build(name, batch_size, **engine).round.student_step


def student_step_of_ddp(join: Step, name: str, batch_size: int) -> Step:
    """The same by processes that know nothing of one another, but for DistributedDataParallel around what learns."""
    distiller = build(name, batch_size // RANKS)
    join()
    round_ = distiller.round
    round_.student = DistributedDataParallel(round_.student)
    if next(round_.connectors.parameters(), None) is not None:  # which it refuses, as of taps of the same widths
        round_.connectors = DistributedDataParallel(round_.connectors)
    return round_.student_step


RULES = Rules(
    rounds=lambda seconds: max(5, min(40, int(1 / seconds))),
    turns=5,
    warm_up=2,
    clock=lambda run: float(run()),  # type: ignore[arg-type]
)

CASE = pytest.mark.parametrize("name", ["digits", pytest.param("cifar-resnet20", marks=pytest.mark.full)])

pytestmark = pytest.mark.skipif(ON_GPU, reason="ranks speak by gloo, on CPUs")


def hold(
    race: Callable[..., None], group: str, teams: Mapping[str, Callable[[], Team]], images: Mapping[str, int]
) -> None:
    """A race of teams, whose processes end with it."""
    with ExitStack() as stack:

        def enter(name: str) -> Contender:
            team = teams[name]()
            stack.callback(team.close)
            return Contender(team.run, details=team.facts)

        def rates(outcomes: Mapping[str, Outcome], name: str) -> dict[str, float]:
            per_second = 1 / outcomes[name].row("", "")["median"]
            return {"rounds_per_second": per_second, "images_per_second": images[name] * per_second}

        race(group, {name: partial(enter, name) for name in teams}, RULES, rates)


@CASE
def test_round(name: str, race: Callable[..., None]) -> None:
    """Rounds of one batch, which ranks divide, and of as many images per rank as one process has."""
    method = SMALL[name].method
    make = partial(whole_round, name=name, batch_size=method.batch_size)
    larger = f"{RANKS} ranks, as many images per rank"
    teams = {
        "one process": partial(Team, 1, make),
        f"{RANKS} ranks": partial(Team, RANKS, make),
        f"{RANKS} ranks, each with its own statistics": partial(Team, RANKS, partial(make, batchnorm="local")),
        f"{RANKS} ranks, gradients in bfloat16": partial(Team, RANKS, partial(make, sent_gradients="bfloat16")),
        larger: partial(Team, RANKS, partial(make, batch_size=RANKS * method.batch_size)),
    }
    images = dict.fromkeys(teams, method.images_per_round) | {larger: RANKS * method.images_per_round}
    hold(race, f"ranks, round of {method.batch_size} images, {name}", teams, images)


@CASE
def test_student_step(name: str, race: Callable[..., None]) -> None:
    """A student's step: DistributedDataParallel, whose BatchNorms take each rank's statistics, against ours."""
    batch_size = SMALL[name].method.batch_size
    make = partial(student_step, name=name, batch_size=batch_size)
    teams = {
        "DistributedDataParallel": partial(Team, RANKS, partial(student_step_of_ddp, name=name, batch_size=batch_size)),
        "ours": partial(Team, RANKS, partial(make, batchnorm="local")),
        "ours, the whole batch's statistics": partial(Team, RANKS, make),
    }
    hold(race, f"ranks, student's step of {batch_size} images, {name}", teams, dict.fromkeys(teams, batch_size))
