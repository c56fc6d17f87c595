"""A round as one CUDA graph: launched whole, so that the host has nothing to do between its kernels."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

log = logging.getLogger(__name__)

WARM_UP_ROUNDS = 3
"""Rounds that run as they are before the capture, so that libraries have chosen their algorithms and optimizers have
allocated their state. They count as rounds: nothing is computed twice or thrown away."""


class _LastOperation(TorchDispatchMode):
    """Remembers which operation was called last, to name the one that a capture failed at."""

    name = "nothing"

    def __torch_dispatch__(
        self, function: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.name = str(function)
        return function(*args, **(kwargs or {}))


class CapturedRound:
    """Runs a round: the first few times as it is, then captured and replayed.

    A round must be the same work on the same memory each time, without waiting for the device; what changes from
    round to round (noise, learning rates) is read from device memory and from the registered generators.

    Args:
        round_: the work; it returns scalars to be recorded, whose memory a replay writes again.
        generators: of the random numbers that it draws, so that a replay draws the next ones.
        device: a CUDA device.
    """

    def __init__(
        self,
        round_: Callable[[], Mapping[str, Tensor]],
        generators: Sequence[torch.Generator],
        device: torch.device,
    ) -> None:
        self.round = round_
        self.generators = generators
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.rounds_run = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.results: Mapping[str, Tensor] = {}
        self.refused = False

    def __call__(self) -> Mapping[str, Tensor]:
        """One round; what it returns is overwritten by the next."""
        if self.graph is None and not self.refused and self.rounds_run >= WARM_UP_ROUNDS:
            self._capture()
        if self.graph is not None:
            self.graph.replay()
            return self.results
        self.rounds_run += 1
        # on the stream of the capture to come: libraries hold workspaces per stream
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            results = self.round()
        torch.cuda.current_stream(self.device).wait_stream(self.stream)
        return results

    def _capture(self) -> None:
        states = [generator.get_state() for generator in self.generators]
        graph = torch.cuda.CUDAGraph()
        for generator in self.generators:
            graph.register_generator_state(generator)
        operation = _LastOperation()
        try:
            with torch.cuda.graph(graph, stream=self.stream), operation:
                self.results = self.round()
        except RuntimeError as error:
            self.refused = True
            reason = str(error).strip().partition("\n")[0]
            log.warning("Without a CUDA graph: %s cannot be captured (%s).", operation.name, reason)
            torch.cuda.synchronize(self.device)
            for generator, state in zip(self.generators, states, strict=True):
                generator.set_state(state)
        else:
            self.graph = graph
            log.info("The round is captured as a CUDA graph.")
