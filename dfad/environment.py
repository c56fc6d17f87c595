"""What a result depends on besides its settings: the versions of packages and the processor."""

import importlib.metadata
import platform
import re
from pathlib import Path


def version(package: str = "dfad") -> str:
    """A package's version from its metadata, such as 0.1.0; ``not installed`` where there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result depends on."""
    packages = {name: version(name) for name in ("torch", "numpy")}
    return {"dfad": version(), "python": platform.python_version(), **packages}


def processor() -> str:
    """The CPU's name as Linux gives it; elsewhere what Python knows, at least its architecture."""
    info = Path("/proc/cpuinfo")
    name = re.search(r"model name\s*: (.*)", info.read_text(errors="replace")) if info.exists() else None
    return name[1] if name else platform.processor() or platform.machine()
