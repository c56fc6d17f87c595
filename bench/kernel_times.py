"""Where the time of a run goes, kernel by kernel."""

from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile

from bench.device import DEVICE, ON_GPU
from dfad.engine import wait_for

LISTED = 40
"""Number of kernels with a row; the others share one."""


def kernels_of(run: Callable[[], object]) -> dict[str, Any]:
    """Calls and microseconds of every kernel of a run; without a GPU, of PyTorch's operations."""
    with profile(activities=[ProfilerActivity.CUDA if ON_GPU else ProfilerActivity.CPU]) as profiler:
        run()
        wait_for(DEVICE)
    return tabulate([(event.key, event.count, _microseconds(event)) for event in profiler.key_averages()])


def _microseconds(event: Any) -> float:
    return float(event.self_device_time_total if ON_GPU else event.self_cpu_time_total)


def tabulate(kernels: list[tuple[str, int, float]]) -> dict[str, Any]:
    """The slowest kernels first, each with its share of the total, and the others as one row."""
    kernels = sorted((kernel for kernel in kernels if kernel[2] > 0), key=lambda kernel: -kernel[2])
    total = sum(microseconds for _, _, microseconds in kernels)
    rest = kernels[LISTED:]
    if rest:
        kernels = [*kernels[:LISTED], (f"{len(rest)} others", sum(k[1] for k in rest), sum(k[2] for k in rest))]
    return {
        "kernel_milliseconds": total / 1e3,
        "launches": sum(calls for _, calls, _ in kernels),
        "kernels": [
            {"kernel": name[:120], "calls": calls, "microseconds": time, "share": time / total}
            for name, calls, time in kernels
        ],
    }
