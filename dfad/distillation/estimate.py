"""The cost of a run, measured on a few of its rounds."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from dfad.distillation.distiller import Distiller
from dfad.distillation.tensor_memory import TensorMemory
from dfad.engine import wait_for
from dfad.engine.cuda_graph import WARM_UP_ROUNDS
from dfad.engine.fuse_convolutions import chained_flops
from dfad.models.probing import parameter_count

TIMED_ROUNDS = 5
"""Number of timed rounds after the warm-up; their median counts."""


@dataclass(frozen=True)
class Estimate:
    """The cost of a run."""

    teacher_parameters: int
    student_parameters: int
    generator_parameters: int
    flops_per_round: int
    """FLOPs of convolutions and matrix products; a multiplication and an addition count as two."""
    total_flops: int
    """Of all rounds and the generator's warm-up."""
    peak_memory: int
    """Bytes: allocated on a GPU; on a CPU, tensors of a round, parameters, optimizer state and image bank."""
    seconds_per_round: float
    total_seconds: float
    """Time of all rounds and the generator's warm-up, without evaluation and checkpoints."""
    captured: bool = False
    """Whether the timed rounds were replayed as a CUDA graph."""


def estimate(distiller: Distiller) -> Estimate:
    """Run a few rounds to measure one; this changes the distiller.

    Args:
        distiller: must not be used for a run afterwards.
    """
    with distiller.round.student_placed(), distiller.engine.running():
        return _measured(distiller)


def _measured(distiller: Distiller) -> Estimate:
    method = distiller.config.method
    total_flops, flops_per_round = count_flops(distiller)
    warm_up_seconds = 0.0
    if method.warm_up:
        warm_up_seconds = method.warm_up * median_seconds(distiller.round.warm_up, distiller.device, TIMED_ROUNDS)
    peak_memory = _peak_memory(distiller)
    for _ in range(WARM_UP_ROUNDS):
        distiller.round.run(0.0)
    seconds_per_round = median_seconds(lambda: distiller.round.run(0.0), distiller.device, TIMED_ROUNDS)
    return Estimate(
        teacher_parameters=distiller.teacher.parameter_count,
        student_parameters=parameter_count(distiller.student),
        generator_parameters=parameter_count(distiller.generator),
        flops_per_round=flops_per_round,
        total_flops=total_flops,
        peak_memory=peak_memory,
        seconds_per_round=seconds_per_round,
        total_seconds=warm_up_seconds + method.rounds * seconds_per_round,
        captured=distiller.engine.captured,
    )


def count_flops(distiller: Distiller) -> tuple[int, int]:
    """FLOPs of a whole run and of one round, of all ranks, counted on a warm-up step and a round, which change the
    distiller."""
    method, ranks = distiller.config.method, distiller.ranks.count
    warm_up = method.warm_up * ranks * _flops(distiller.round.warm_up) if method.warm_up else 0
    per_round = ranks * _flops(distiller.round)
    return warm_up + method.rounds * per_round, per_round


def _flops(work: Callable[[], object]) -> int:
    chained = chained_flops()
    with FlopCounterMode(display=False) as flops:
        work()
    return flops.get_total_flops() + chained_flops() - chained


def median_seconds(work: Callable[[], object], device: torch.device, calls: int) -> float:
    """Seconds of one call: the median of a few.

    Args:
        work: computes on the device.
        device: for whose work each call is waited.
        calls: number of calls.
    """
    seconds = []
    for _ in range(calls):
        wait_for(device)
        started = time.perf_counter()
        work()
        wait_for(device)
        seconds.append(time.perf_counter() - started)
    return sorted(seconds)[calls // 2]


def _peak_memory(distiller: Distiller) -> int:
    if distiller.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(distiller.device)
        distiller.round()
        return torch.cuda.max_memory_allocated(distiller.device)
    memory = TensorMemory()
    memory.count([distiller.state_dict(), distiller.teacher.network.state_dict()])
    with memory:
        distiller.round()
    return memory.peak
