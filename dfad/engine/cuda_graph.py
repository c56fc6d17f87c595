"""A round as one CUDA graph, so that the host has no work between its kernels."""

import gc
import inspect
import logging
import traceback
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dfad.errors import ConfigurationError, first_line

log = logging.getLogger(__name__)

WARM_UP_ROUNDS = 3
"""Number of rounds that run without a graph before the capture, so that libraries choose their algorithms and
optimizers allocate their state. They are normal rounds: nothing is computed twice or discarded."""

CHECKED_WITH = ("2.11", "2.13")
"""Versions of PyTorch for which the state after a failed capture was checked (:func:`_release_pool`)."""

Round = Callable[[], Mapping[str, Tensor]]


class RoundGraphs:
    """The graphs of rounds, each captured after its first few runs.

    A round is held by a weak reference: its owner may own these graphs, and a reference cycle could be freed by the
    garbage collector in the middle of a capture, which would break it.

    Args:
        device: a CUDA device.
        required: whether a round that cannot be captured is an error; otherwise it runs without a graph.
    """

    def __init__(self, device: torch.device, *, required: bool) -> None:
        self.device = device
        self.required = required
        self.captures = 0
        """Number of captures, including forgotten ones."""
        self._rounds: dict[weakref.ref[Any], CapturedRound] = {}

    def run(self, round_: Round, generators: Sequence[torch.Generator] = ()) -> Mapping[str, Tensor]:
        """One round; what it returns is overwritten by the next.

        Args:
            round_: does the same work on the same memory at each call, without waiting for the device; what changes
                from round to round (noise, learning rates) is read from device memory and from the generators.
            generators: of its random numbers, so that a replay draws the next ones.

        Raises:
            ConfigurationError: if it cannot be captured although that is required.
        """
        key = weakref.WeakMethod(round_) if inspect.ismethod(round_) else weakref.ref(round_)
        if key not in self._rounds:
            self._rounds = {known: captured for known, captured in self._rounds.items() if known() is not None}
            self._rounds[key] = CapturedRound(self.device, generators, required=self.required)
        captured = self._rounds[key]
        replays = captured.graph is not None
        results = captured(round_)
        self.captures += captured.graph is not None and not replays
        if captured.refused and len(self._rounds) > 1:
            self._rounds = {key: captured}  # the generators' states are new: other graphs would advance the old ones
        return results

    @property
    def replaying(self) -> bool:
        """Whether a graph exists."""
        return any(captured.graph is not None for captured in self._rounds.values())

    def forget(self) -> None:
        """Drop all graphs, because the tensors that they read and write are replaced."""
        if self.replaying:
            torch.cuda.synchronize(self.device)
        self._rounds = {}


class CapturedRound:
    """Runs a round: the first few times without a graph, then captured and replayed.

    Args:
        device: a CUDA device.
        generators: of the round's random numbers.
        required: as for :class:`RoundGraphs`.
    """

    def __init__(self, device: torch.device, generators: Sequence[torch.Generator], *, required: bool) -> None:
        self.device = device
        self.generators = generators
        self.required = required
        self.stream = torch.cuda.Stream(device)
        self.rounds_run = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.results: Mapping[str, Tensor] = {}
        self.refused = False

    def __call__(self, round_: Round) -> Mapping[str, Tensor]:
        """One round; what it returns is overwritten by the next."""
        if self.graph is None and not self.refused and self.rounds_run >= WARM_UP_ROUNDS:
            self._capture(round_)
        if self.graph is not None:
            self.graph.replay()
            return self.results
        self.rounds_run += 1
        # on the stream of the later capture: libraries have workspaces per stream
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            results = round_()
        torch.cuda.current_stream(self.device).wait_stream(self.stream)
        return results

    def _capture(self, round_: Round) -> None:
        index = self.stream.device.index
        generators = [*self.generators, torch.cuda.default_generators[index]]
        states = [generator.get_state() for generator in generators]
        previous = torch.cuda.current_stream(self.device)
        pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        for generator in self.generators:
            graph.register_generator_state(generator)
        try:
            with _no_garbage(), torch.cuda.graph(graph, pool=pool, stream=self.stream):
                self.results = round_()
        except RuntimeError as error:
            self.refused = True
            # ending a broken capture fails too; that error is not the reason
            cause = error.__context__ if isinstance(error.__context__, RuntimeError) else error
            reason = _reason(cause)
            torch.cuda.set_stream(previous)  # a capture that cannot be ended leaves its stream current
            torch.cuda.synchronize(self.device)
            graph.reset()
            _release_pool(index, pool)
            for generator, state in zip(generators, states, strict=True):
                # the registered state may remain marked as being captured
                generator.graphsafe_set_state(generator.clone_state())
                generator.set_state(state)
            if isinstance(error.__context__, KeyboardInterrupt):
                raise error.__context__ from None
            if self.required:
                raise ConfigurationError(
                    f"engine.cuda_graph is on, but the round cannot be captured: {reason}. Leave it on auto, or switch "
                    "it off."
                ) from cause
            log.warning(
                "Without a CUDA graph: the round cannot be captured: %s. With --engine.cuda_graph off, what gains only "
                "in a graph is left out as well.",
                reason,
            )
        else:
            self.graph = graph
            log.info("The round is captured as a CUDA graph.")


@contextmanager
def _no_garbage() -> Iterator[None]:
    """Run the garbage collector now, and not in the block: freeing tensors or graphs would break a capture."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _release_pool(index: int, pool: Any) -> None:
    """End and release the memory pool of a capture that failed.

    Where PyTorch could end the capture it has done both. Otherwise the allocator would behave as if the capture
    continued: it would look for the pool at every allocation, and hold back memory that waits for another stream. There
    is no public way.
    """
    end, release = (getattr(torch._C, name, None) for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"))
    if end is None or release is None:
        log.info("PyTorch %s does not let the memory of a failed capture be released.", torch.__version__)
        return
    try:
        end(index, pool)
    except RuntimeError:  # it was ended, and graph.reset() has released it
        return
    release(index, pool)


def _reason(error: RuntimeError) -> str:
    """The reason for a failed capture, with the line of code that caused it."""
    words = first_line(error)
    inside = Path(torch.__file__).parent
    frames = [
        frame for frame in traceback.extract_tb(error.__traceback__) if inside not in Path(frame.filename).parents
    ]
    if not frames or not frames[-1].line:
        return words
    return f"`{frames[-1].line}` in {frames[-1].name}, {Path(frames[-1].filename).name}: {words}"
