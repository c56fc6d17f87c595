"""``python -m tools.gpu.kernel_times``: where the time of one captured round goes, kernel by kernel."""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from bench.device import DEVICE, ON_GPU, seconds_of
from bench.rounds import CASES
from dfad.config import EngineConfig
from dfad.distillation.distiller import Distiller
from dfad.engine import wait_for
from dfad.engine.cuda_graph import WARM_UP_ROUNDS

LISTED = 40
"""Number of kernels with a row; the others share one."""


def measure(name: str) -> dict[str, Any]:
    """Calls and microseconds of every kernel of a round; without a GPU, of PyTorch's operations.

    Args:
        name: the pair of networks, from ``bench/rounds.py``.
    """
    case = next(case for case in CASES if case.name == name)
    config = case.config(DEVICE, engine=EngineConfig(cuda_graph="on" if ON_GPU else "off"))
    distiller = Distiller(*case.networks(), config, image_shape=case.image_shape)
    with distiller.engine.running():
        for _ in range(WARM_UP_ROUNDS + 2):
            distiller.run_round()
        seconds = min(seconds_of(distiller.run_round) for _ in range(5))
        with profile(activities=[ProfilerActivity.CUDA if ON_GPU else ProfilerActivity.CPU]) as profiler:
            distiller.run_round()
            wait_for(DEVICE)
        return {
            "round": name,
            "captured": distiller.engine.captured,
            "precision": distiller.engine.precision,
            "milliseconds": seconds * 1e3,
            **tabulate([(event.key, event.count, _microseconds(event)) for event in profiler.key_averages()]),
        }


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


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tools.gpu.kernel_times", description=__doc__.partition("\n")[0])
    parser.add_argument("round", choices=[case.name for case in CASES])
    parser.add_argument("--result", type=Path, required=True, help="JSON file")
    command = parser.parse_args()
    torch.manual_seed(0)
    command.result.write_text(json.dumps(measure(command.round), indent=1) + "\n")


if __name__ == "__main__":
    main()
