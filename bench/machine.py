"""What a figure was measured on."""

import platform
import subprocess
from pathlib import Path

import torch

from dfad.export import versions


def describe() -> dict[str, object]:
    """Processor, GPU, threads, versions and the commit; no name of a host."""
    return {
        "processor": processor(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": versions(),
        "commit": commit(),
    }


def processor() -> str:
    """The model's name, where the system tells it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def commit() -> str | None:
    """The checkout's, with ``+`` where it has changes."""
    try:
        output = subprocess.run(
            ["git", "describe", "--always", "--dirty=+"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):  # not a checkout
        return None
    return output.stdout.strip()
