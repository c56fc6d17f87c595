"""``python -m tools.gpu.checks``: reports of NVIDIA's tools on the machine and the kernels, as JSON.

If a tool is not installed, or does not run on the machine, the result says so.
"""

import argparse
import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.device import DEVICE, ON_GPU
from dfad.experiments.provenance import machine

NOT_INSTALLED = "not installed"

GRACE = 20.0
"""Seconds for a report after the request to stop."""

SANITIZED_SECONDS = 110.0
"""Seconds for the sanitized tests; what they found by then is reported."""

SANITIZED_TESTS = ("tests/kernels/test_gpu.py", "-q", "-k", "(equation and float32) or layout")

METRICS = {
    "gpu__time_duration.sum": ("microseconds", 1e-3),
    "dram__bytes_read.sum": ("MB read", 1e-6),
    "dram__bytes_write.sum": ("MB written", 1e-6),
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": ("% of the memory's peak", 1.0),
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": ("% of the processors' peak", 1.0),
}
"""The profiler's metrics in nanoseconds, bytes and percent: their names here, and the factor to the unit."""

KERNELS = "regex:^_[a-z_]+_kernel$"
"""Names of this project's kernels."""


def versions() -> dict[str, Any]:
    """Machine, driver and compiler."""
    return {
        "machine": machine(),
        "driver": _first_line(["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]),
        "nvcc": _last_line(["nvcc", "--version"]),
        "compute-sanitizer": _last_line(["compute-sanitizer", "--version"]),
        "ncu": _last_line(["ncu", "--version"]),
    }


def _first_line(command: Sequence[str]) -> str:
    return (_output(command) or [NOT_INSTALLED])[0]


def _last_line(command: Sequence[str]) -> str:
    return (_output(command) or [NOT_INSTALLED])[-1]


def _output(command: Sequence[str]) -> list[str]:
    if not shutil.which(command[0]):
        return []
    return subprocess.run(command, capture_output=True, text=True).stdout.strip().splitlines()


def sanitizer(tool: str, tests: Sequence[str] = SANITIZED_TESTS) -> tuple[str, bool]:
    """The sanitizer's summary of the kernels' tests, and whether it found nothing.

    Args:
        tool: ``memcheck`` or ``racecheck``.
        tests: arguments of pytest.
    """
    if not shutil.which("compute-sanitizer"):
        return NOT_INSTALLED, True
    command = ["compute-sanitizer", "--tool", tool, sys.executable, "-m", "pytest", *tests]
    # a separate allocation for every tensor, so that accesses beyond it are out of bounds
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    output, code = interrupted_after(SANITIZED_SECONDS, command, environment)
    print(output)
    return sanitizer_summary(output, code)


def interrupted_after(seconds: float, command: Sequence[str], environment: Mapping[str, str]) -> tuple[str, int]:
    """A command's output and exit code; after some time it is interrupted, and reports what it has found."""
    process = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # its children are to be interrupted, too
    )
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGINT)
        output, _ = process.communicate(timeout=GRACE)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return output, process.returncode


def sanitizer_summary(output: str, returncode: int) -> tuple[str, bool]:
    """The outcome in words, and whether the kernels are free of errors; tests may have been interrupted."""
    if refusal := re.search(r"=+ (?:Error: )?(.*[Dd]evice not supported.*)", output):
        return f"refused by the machine: {refusal[1]}", True
    summary = re.search(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", output)
    tests = re.search(r"(\d+ (?:passed|failed).*?) in ", output)
    if not summary:
        return f"ended with code {returncode} and no summary", False
    interrupted = "! KeyboardInterrupt !" in output
    clean = re.match(r"0 (?:errors|hazards)", summary[1]) is not None
    passed = tests is not None and "failed" not in tests[1] and (returncode == 0 or interrupted)
    words = f"{summary[1]}; {tests[1] if tests else 'no tests ran'}"
    return f"{words}{', then no time was left' if interrupted else ''}", clean and passed


def profile() -> list[dict[str, Any]] | str:
    """The profiler's metrics of every kernel of :func:`run_operators`."""
    if not shutil.which("ncu"):
        return NOT_INSTALLED
    command = ["ncu", "--csv", "--print-units", "base", "--clock-control", "none", "--kernel-name", KERNELS]
    command += ["--metrics", ",".join(METRICS), sys.executable, "-m", "tools.gpu.checks", "operators"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout)
    kernels = profiled(done.stdout)
    if kernels:
        return kernels
    reason = next((line for line in done.stdout.splitlines() if line.startswith("==ERROR==")), "no kernel was profiled")
    return f"does not work here: {reason.removeprefix('==ERROR== ')}"


def profiled(output: str) -> list[dict[str, Any]]:
    """The kernels in the profiler's CSV, in which a line is one metric of one launch."""
    lines = output.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    launches: dict[str, dict[str, Any]] = {}
    for row in csv.DictReader(line for line in lines[start:] if line.startswith('"')):
        kernel = f"{row['Kernel Name'].strip('_')}, launch {row['ID']}, grid {row['Grid Size']}"
        launch = launches.setdefault(row["ID"], {"kernel": kernel, "metrics": {}})
        if row["Metric Name"] in METRICS:
            label, factor = METRICS[row["Metric Name"]]
            launch["metrics"][label] = float(row["Metric Value"].replace(",", "")) * factor
    return list(launches.values())


def run_operators() -> None:
    """Every kind of loss once, forward and backward, at its largest size; and every operator over features."""
    from bench.bench_ops import FEATURE_TASKS, TASKS, inputs

    largest: dict[str, Any] = {}
    for task in TASKS:
        kind = task.name.rpartition(" ")[0]
        if kind not in largest or torch.Size(task.shape).numel() > torch.Size(largest[kind].shape).numel():
            largest[kind] = task
    for task in largest.values():
        student, teacher = inputs(task, torch.bfloat16)
        torch.autograd.grad(task.contenders["ours"](student, teacher), student)
        print(f"{task.name}, bfloat16")
    for operator in FEATURE_TASKS:
        shape = (512 if ON_GPU else 2, 64, 32, 32)
        x, added = (
            torch.randn(shape, device=DEVICE).bfloat16().contiguous(memory_format=torch.channels_last) for _ in range(2)
        )
        y = operator.ours(x.requires_grad_(), added, *torch.rand(4, 64, device=DEVICE).add(0.5).unbind())
        torch.autograd.grad(y, x, torch.ones_like(y))
        print(f"{operator.name}, bfloat16")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tools.gpu.checks", description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=("versions", "memcheck", "racecheck", "profile", "operators"))
    parser.add_argument("--result", type=Path, help="JSON file")
    command = parser.parse_args()
    if command.what == "operators":
        run_operators()
        return
    clean = True
    result: Any
    if command.what in ("memcheck", "racecheck"):
        result, clean = sanitizer(command.what)
    else:
        result = versions() if command.what == "versions" else profile()
    command.result.write_text(json.dumps(result, indent=1) + "\n")
    if not clean:
        raise SystemExit(str(result))


if __name__ == "__main__":
    main()
