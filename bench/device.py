"""The device that is measured, and the time that it takes for something."""

import time
from collections.abc import Callable

import torch

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")

CACHE = 1 << 28
"""Bytes that no GPU's cache holds."""


def wait() -> None:
    """For the device."""
    if ON_GPU:
        torch.cuda.synchronize()


def seconds_of(run: Callable[[], object]) -> float:
    """Of one run: on a GPU between two events on the device, which the host's own work does not prolong unless the
    device waits for it."""
    if not ON_GPU:
        started = time.perf_counter()
        run()
        return time.perf_counter() - started
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def captured(function: Callable[[], object]) -> Callable[[], object]:
    """The function as a CUDA graph; as it is where there is no GPU."""
    if not ON_GPU:
        return function
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        function()
    return graph.replay


def cold_cache() -> Callable[[], object]:
    """What empties a GPU's cache, so that a run finds its tensors in memory."""
    if not ON_GPU:
        return lambda: None
    return torch.empty(CACHE, dtype=torch.uint8, device=DEVICE).zero_
