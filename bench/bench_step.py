"""Whole rounds: rounds and images per second, peak memory, and how far each contender is from the floor."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench.floor import Floor
from bench.rounds import CASES, Case, contenders, repaired_engine
from dfad.estimate import TensorMemory
from dfad.trainer import Distiller

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
RUNNABLE = [pytest.param(case, id=case.name) for case in CASES if DEVICE.type == "cuda" or not case.gpu_only]
ROUNDS = 40 if DEVICE.type == "cuda" else 5
WARM_UP = 6 if DEVICE.type == "cuda" else 1
"""More than a CUDA graph waits for before it is captured."""


def measure(benchmark: Any, case: Case, round_: Callable[[], object]) -> None:
    """Time a round; its rates and peak memory go to the record."""

    def run() -> None:
        round_()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"round {case.name}"
    benchmark.pedantic(run, rounds=ROUNDS, warmup_rounds=WARM_UP)
    seconds = benchmark.stats.stats.median
    images = (case.method.student_steps + 1) * case.method.batch_size
    benchmark.extra_info |= {
        "rounds_per_second": 1 / seconds,
        "images_per_second": images / seconds,
        "peak_memory_bytes": peak_memory(round_),
        "device": str(DEVICE),
        "threads": torch.get_num_threads(),
    }


def peak_memory(round_: Callable[[], object]) -> int:
    """Bytes: allocated on a GPU; on a CPU of the tensors that a round makes."""
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        round_()
        return torch.cuda.max_memory_allocated()
    with TensorMemory() as memory:
        round_()
    return memory.peak


@pytest.mark.parametrize("case", RUNNABLE)
@pytest.mark.parametrize(("name", "make"), contenders(DEVICE), ids=[name for name, _ in contenders(DEVICE)])
def test_round(case: Case, name: str, make: Callable[[Case], Callable[[], object]], benchmark: Any) -> None:
    measure(benchmark, case, make(case))


@pytest.mark.parametrize("case", RUNNABLE)
def test_floor(case: Case, benchmark: Any) -> None:
    teacher, student = case.networks()
    config = case.config(DEVICE, engine=repaired_engine(DEVICE))
    measure(benchmark, case, Floor(Distiller(teacher, student, config, image_shape=case.image_shape)))
