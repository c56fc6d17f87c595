"""The measured device, and the time of a function on it."""

import time
from collections.abc import Callable

import torch

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")

CACHE = 1 << 28
"""Bytes, more than any GPU's cache holds."""


def seconds_of(run: Callable[[], object]) -> float:
    """Seconds of one run; on a GPU between two events on the device, so that the host's work counts only if the device
    waits for it."""
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
    """The function as a CUDA graph; unchanged without a GPU."""
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
    """A function that clears a GPU's cache, so that a run reads its tensors from memory."""
    if not ON_GPU:
        return lambda: None
    return torch.empty(CACHE, dtype=torch.uint8, device=DEVICE).zero_
