"""The processes that share one run, as PyTorch's launcher starts them: their ranks and their communication.

Every process is a rank. All collectives of the project are here, and a process that is alone calls none.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from dfad.errors import ConfigurationError, DfadError, RankError, first_line

T = TypeVar("T")

CHECKED_WITH = ("2.11", "2.13")
"""Versions of PyTorch for which access to the process group's store, which is not public, was checked."""

TIME_LIMIT = "DFAD_TIME_LIMIT"
"""Environment variable: seconds that a rank waits for another."""

DEFAULT_TIME_LIMIT = 600.0

GRACE = 3.0
"""Seconds that a rank waits for the first one to report an error that probably all have, before it does so itself."""


@dataclass(frozen=True)
class Ranks:
    """One of the processes that share a run; by default the only one."""

    rank: int = 0
    count: int = 1
    store: dist.Store | None = field(default=None, compare=False, repr=False)
    """Store for messages between ranks when collectives fail."""

    @property
    def first(self) -> bool:
        """Whether this rank writes files, logs and results."""
        return self.rank == 0

    @property
    def several(self) -> bool:
        """Whether there are other ranks."""
        return self.count > 1

    def capturable(self, device: torch.device) -> bool:
        """Whether a CUDA graph may contain the collectives over tensors on a device."""
        return not self.several or "nccl" in dist.get_backend_config().partition(f"{device.type}:")[2].partition(",")[0]

    # Batches

    def require_divides(self, name: str, batch_size: int) -> None:
        """Check that the ranks can share a batch.

        Raises:
            ConfigurationError: if it is not a multiple of twice their number.
        """
        if self.several and batch_size % (2 * self.count):
            nearest = max(1, round(batch_size / (2 * self.count))) * 2 * self.count
            raise ConfigurationError(
                f"{name} is {batch_size}, and {self.count} ranks share it: it must be a multiple of {2 * self.count}, "
                f"for each of them takes images and the partners that they are mixed with. Give {nearest}, or start "
                "another number of ranks."
            )

    def share(self, batch: Tensor) -> Tensor:
        """This rank's rows of a whole batch.

        They are a part of the first half and the mirrored part of the second one. So the reverse of a share is the
        share of the reversed batch, and pairing a batch with its reverse needs no images of other ranks.
        """
        if not self.several:
            return batch
        part = len(batch) // (2 * self.count)
        last = len(batch) - self.rank * part
        return torch.cat([batch[self.rank * part :][:part], batch[last - part : last]])

    def whole(self, share: Tensor) -> Tensor:
        """The whole batch from the ranks' shares."""
        if not self.several:
            return share
        first, second = self.gather(share).unflatten(1, (2, -1)).unbind(1)
        return torch.cat([first.flatten(0, 1), second.flip(0).flatten(0, 1)])

    # Collectives over tensors

    def gather(self, tensor: Tensor) -> Tensor:
        """The tensors of all ranks, which have one shape, along a new first dimension; without gradients."""
        gathered = tensor.new_empty(self.count, *tensor.shape)
        with self._collective():
            dist.all_gather(list(gathered.unbind()), tensor.detach().contiguous())
        return gathered

    def add(self, tensor: Tensor) -> Tensor:
        """Replace a contiguous tensor by its sum over the ranks, in place."""
        with self._collective():
            dist.all_reduce(tensor)
        return tensor

    def average(self, tensor: Tensor) -> Tensor:
        """The mean over the ranks; gradients flow back to all of them."""
        if not self.several:
            return tensor
        average: Tensor = _Average.apply(tensor, self)
        return average

    # Messages between hosts; none of them waits for a GPU

    def largest(self, number: int) -> int:
        """The largest of the numbers of all ranks."""
        if not self.several:
            return number
        largest = torch.tensor(number)
        with self._collective():
            dist.all_reduce(largest, dist.ReduceOp.MAX)
        return int(largest)

    def all_of(self, value: T) -> list[T]:
        """The values of all ranks, which must be picklable."""
        if not self.several:
            return [value]
        values: list[Any] = [None] * self.count
        with self._collective():
            dist.all_gather_object(values, value)
        return values

    def of_first(self, work: Callable[[], T]) -> T:
        """The first rank's result of a function, or its error for users; the other ranks do not call it."""
        if not self.several:
            return work()
        outcome: list[Any] = [None, None]
        if self.first:
            try:
                outcome[0] = work()
            except DfadError as error:
                outcome[1] = error
        with self._collective():
            dist.broadcast_object_list(outcome)
        result: T = outcome[0]
        if outcome[1] is not None:
            raise outcome[1]
        return result

    def require_equal(self, **values: object) -> None:
        """Check that all ranks were given the same values.

        Args:
            values: by name, picklable and comparable.

        Raises:
            ConfigurationError: on every rank, naming the first rank that differs and in what.
        """
        first, *others = self.all_of(values)
        for rank, other in enumerate(others, start=1):
            different = [name for name in first | other if first.get(name, self) != other.get(name, self)]
            if different:
                raise ConfigurationError(
                    f"Rank {rank} of {self.count} has another {' and another '.join(different)} than rank 0. Start all "
                    "with the same command, on the same files."
                )

    def leave_word(self, word: str) -> None:
        """Leave a message for all ranks, which they find even if collectives fail."""
        if self.store is not None:
            with suppress(RuntimeError):  # the process with the store has ended
                self.store.set(word, "")

    def heard(self, word: str, within: float = 0.0) -> bool:
        """Whether a rank has left that message, or leaves it within some seconds."""
        deadline = time.monotonic() + within
        while True:
            with suppress(RuntimeError):
                if self.store is not None and self.store.check([word]):
                    return True
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.05)

    @contextmanager
    def _collective(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
                raise  # not of another rank, but of the graph, which the engine does without
            raise RankError(self._blame(error)) from error

    def _blame(self, error: RuntimeError) -> str:
        """The error for a failed collective, naming the ranks that took no part: those that leave no message."""
        reason = f"The ranks cannot go on: what rank {self.rank} said to the others failed ({first_line(error)})."
        self.leave_word(f"failed/{self.rank}")
        if not self.heard(f"failed/{self.rank}"):
            return reason
        silent = list(range(self.count))
        deadline = time.monotonic() + GRACE
        while silent and time.monotonic() < deadline:
            silent = [rank for rank in silent if not self.heard(f"failed/{rank}")]
            time.sleep(0.05)
        if not silent:
            return reason
        who = f"rank {silent[0]}" if len(silent) == 1 else f"ranks {', '.join(map(str, silent))}"
        limit = f"A rank waits {time_limit():g} seconds for another; {TIME_LIMIT} in the environment changes that."
        return f"{who.capitalize()} of {self.count} took no part any more: ended, out of reach, or hanging. {limit}"


class _Average(torch.autograd.Function):
    """The losses of all ranks are averaged, so that gradients are, too; each rank's part of a gradient is of all."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return ranks.add(tensor.clone(memory_format=torch.contiguous_format)) / ranks.count

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        ranks: Ranks = ctx.ranks
        return ranks.add(gradient.clone(memory_format=torch.contiguous_format)) / ranks.count, None


ALONE = Ranks()


def current_ranks() -> Ranks:
    """The ranks of the default process group; a process without one is alone."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return ALONE
    store = getattr(dist.distributed_c10d, "_get_default_store", lambda: None)()
    return Ranks(dist.get_rank(), dist.get_world_size(), store)


@contextmanager
def joined() -> Iterator[Ranks]:
    """For as long as it lasts, the processes that a launcher has started speak to one another: by NCCL about tensors on
    GPUs, by gloo about all others. A process that was started alone is alone.

    Raises:
        ConfigurationError: if the time limit in the environment is none, or how the ranks find one another is not
            there.
        RankError: if they do not find one another.
    """
    rank, count = launched()
    if count == 1 or dist.is_initialized():
        yield current_ranks()
        return
    limit = timedelta(seconds=time_limit())
    _require_address()
    gpu = local_rank()
    with_gpu = torch.cuda.is_available() and gpu < torch.cuda.device_count()
    if with_gpu:
        torch.cuda.set_device(gpu)
    try:
        store, rank, count = next(iter(dist.rendezvous("env://", timeout=limit)))
        # the launcher keeps its store, and with it the addresses of ranks that it has started before
        store = dist.PrefixStore(f"start/{restarts()}", store)
        backend = "cpu:gloo,cuda:nccl" if with_gpu else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=limit)
    except (RuntimeError, ValueError) as error:
        raise RankError(f"Rank {rank} of {count} did not find the others: {first_line(error)}.") from error
    yield current_ranks()
    dist.destroy_process_group()  # not after an error: the others may be silent


def require_alone(command: str, way_out: str) -> None:
    """Refuse a launcher's several processes where they would all do the same.

    Raises:
        ConfigurationError: with another way.
    """
    _, count = launched()
    if count > 1:
        raise ConfigurationError(f"{command} was started as {count} ranks, which would all do the same. {way_out}")


def local_rank() -> int:
    """Number of a rank among those of its machine.

    Raises:
        ConfigurationError: if the launcher has put none into the environment.
    """
    rank = os.environ.get("LOCAL_RANK", "0")
    if not rank.isdecimal():
        raise ConfigurationError(f"In the environment, LOCAL_RANK is {rank!r}; it counts from 0 on each machine.")
    return int(rank)


def _require_address() -> None:
    host, port = (os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ConfigurationError(
            f"In the environment, MASTER_ADDR is {host!r} and MASTER_PORT {port!r}: the ranks need the address of the "
            "machine of rank 0 and a port that is free there. Start with a launcher, such as torchrun, which sets both."
        )


def launched() -> tuple[int, int]:
    """Rank and number of ranks that a launcher has put into the environment.

    Raises:
        ConfigurationError: if they are no such numbers, or the one is missing.
    """
    rank, count = (os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE"))
    if rank in ("", "0") and count in ("", "1"):
        return 0, 1
    if not (rank.isdecimal() and count.isdecimal() and int(rank) < int(count)):
        raise ConfigurationError(
            f"In the environment, RANK is {rank!r} and WORLD_SIZE {count!r}: a rank counts from 0, and is less than "
            "the number of ranks. Start with a launcher, such as torchrun, which sets both, or unset both."
        )
    return int(rank), int(count)


def restarts() -> int:
    """Number of restarts of all ranks by the launcher after a failure."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def time_limit() -> float:
    """Seconds that a rank waits for another.

    Raises:
        ConfigurationError: if the environment variable is not a positive number.
    """
    text = os.environ.get(TIME_LIMIT, str(DEFAULT_TIME_LIMIT))
    try:
        limit = float(text)
    except ValueError:
        limit = 0.0
    if not 0 < limit < float("inf"):
        raise ConfigurationError(f"{TIME_LIMIT} is {text!r} in the environment; give a positive number of seconds.")
    return limit
