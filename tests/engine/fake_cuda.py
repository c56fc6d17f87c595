"""A stand-in for PyTorch's CUDA graphs without a GPU; it raises errors where PyTorch does.

Modelled on the sources of PyTorch 2.11: a capture that was broken cannot be ended, and leaves the stream, the allocator
and the generators as they were in the middle of it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch


@dataclass
class State:
    """The state of a generator; a graph that it is registered with holds a reference."""

    seed: int = 0
    offset: int = 0
    capturing: bool = False


class Generator:
    """A CUDA generator."""

    def __init__(self, world: "World", state: State | None = None) -> None:
        self.world = world
        self.state = state or State()

    def get_state(self) -> tuple[int, int]:
        assert not self.world.capturing, "Cannot call CUDAGeneratorImpl::current_seed"
        return self.state.seed, self.state.offset

    def set_state(self, state: tuple[int, int]) -> None:
        assert not self.world.capturing
        self.state.seed, self.state.offset = state

    def clone_state(self) -> "Generator":
        return Generator(self.world, State(self.state.seed, self.state.offset))

    def graphsafe_set_state(self, other: "Generator") -> None:
        self.state = other.state

    def draw(self) -> int:
        """Draw a number; in a capture, the position of the draw in its replays."""
        if self.world.capturing != self.state.capturing:
            raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")
        self.state.offset += 1
        return self.state.offset


class Graph:
    """A CUDA graph."""

    def __init__(self, world: "World") -> None:
        self.world = world
        self.states: list[State] = []
        self.streams: list[torch.Generator] = []
        """Registered generators of a CPU."""
        self.replays = 0
        self.pool: object = None
        world.graphs.append(self)

    def register_generator_state(self, generator: Generator | torch.Generator) -> None:
        if isinstance(generator, Generator):
            self.states.append(generator.state)
        else:
            self.streams.append(generator)

    def replay(self) -> None:
        assert self.pool is not None
        self.replays += 1
        for state in self.states:
            state.offset += 1

    def reset(self) -> None:
        if self.pool is not None:
            self.world.pools.remove(self.pool)
        self.pool = None


class Capture:
    """``torch.cuda.graph``."""

    def __init__(self, world: "World", graph: Graph, pool: object, stream: object) -> None:
        self.world, self.graph, self.pool, self.stream = world, graph, pool, stream

    def __enter__(self) -> None:
        world = self.world
        self.previous, world.stream = world.stream, self.stream
        self.graph.states.append(world.default.state)
        self.offsets = [state.offset for state in self.graph.states]
        for state in self.graph.states:
            state.capturing = True
        world.capturing, world.broken = True, False
        world.pools.append(self.pool)
        world.allocating.append(self.pool)

    def __exit__(self, *_: object) -> None:
        world = self.world
        world.capturing = False
        if world.broken:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
        world.allocating.remove(self.pool)
        self.graph.pool = self.pool
        for state, offset in zip(self.graph.states, self.offsets, strict=True):
            state.capturing, state.offset = False, offset
        world.stream = self.previous


@dataclass(eq=False)
class World:
    """The state of the device."""

    stream: object = "default stream"
    capturing: bool = False
    broken: bool = False
    """Whether something made the capture invalid."""
    pools: list[object] = field(default_factory=list)
    allocating: list[object] = field(default_factory=list)
    """The pools that the allocator believes to serve captures."""
    graphs: list[Graph] = field(default_factory=list)
    default: Generator = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        self.default = Generator(self)

    def wait(self) -> None:
        """An operation that breaks a capture."""
        if self.capturing:
            self.broken = True
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore words")

    def end_pool(self, index: int, pool: object) -> None:
        if pool not in self.allocating:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.allocating.remove(pool)

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Make PyTorch use this stand-in."""

        def stream(_: object = None) -> Any:
            return SimpleNamespace(device=torch.device("cuda", 0), wait_stream=lambda other: None)

        class UsedStream:
            def __init__(self, used: object) -> None:
                self.used = used

            def __enter__(self) -> None:
                self.previous, world.stream = world.stream, self.used

            def __exit__(self, *_: object) -> None:
                world.stream = self.previous

        world = self
        replacements: dict[str, Callable[..., Any]] = {
            "Stream": stream,
            "stream": UsedStream,
            "current_stream": lambda _=None: SimpleNamespace(wait_stream=lambda other: None, name=self.stream),
            "set_stream": lambda chosen: setattr(self, "stream", chosen.name),
            "synchronize": lambda _=None: self.wait(),
            "graph_pool_handle": lambda: object(),
            "CUDAGraph": lambda: Graph(self),
            "graph": lambda graph, pool, stream: Capture(self, graph, pool, stream),
        }
        for name, replacement in replacements.items():
            monkeypatch.setattr(torch.cuda, name, replacement)
        monkeypatch.setattr(torch.cuda, "default_generators", (self.default,))
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", self.end_pool, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda index, pool: self.pools.remove(pool), raising=False)
