"""What a figure was measured on; never the name of a host."""

import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from dfad.commit import commit

PACKAGES = ("torch", "triton", "dfad", "liger-kernel", "nvidia-dali-cuda130", "apex")


def machine() -> dict[str, str]:
    """The device, the threads, the versions and the commit."""
    return {
        "device": device_name(),
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        **{package: _version(package) for package in PACKAGES},
        "commit": commit(),
    }


def device_name() -> str:
    """The GPU; without one, the processor and how many threads."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    return f"{names[0] if names else platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def file_name() -> str:
    """Of the device's record."""
    return re.sub(r"[^a-z0-9]+", "-", device_name().lower()).strip("-") + ".json"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
