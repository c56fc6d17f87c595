"""What a figure was measured on and with which commit; never the name of a host."""

import functools
import hashlib
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

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


ROOT = Path(__file__).parents[2]

CODE = ("dfad", "kernels", "bench", "tools", "CMakeLists.txt", "pyproject.toml")
"""What a figure depends on, from the root of the checkout; the records themselves excepted."""

CODE_ENDINGS = (".py", ".hpp", ".cpp", ".sh", ".txt", ".toml")

COMMIT_FILE = ROOT / "build" / "gpu" / "commit"
"""For a copy of the checkout that travels without its history: the commit, and the hash of the code that it is of."""

UNKNOWN = "not recorded"


@functools.cache
def commit(root: Path = ROOT, commit_file: Path = COMMIT_FILE) -> str:
    """The checkout's commit, marked ``+ changes`` where the code is not the commit's; without history, what
    :func:`write_commit` has left, if the code is still that.
    """
    try:
        head = _git(root, "rev-parse", "HEAD").strip()
        changed = _git(root, "status", "--porcelain", "--", *CODE, ":!bench/results")
    except (OSError, subprocess.CalledProcessError):
        recorded, _, code = commit_file.read_text().partition(" of ") if commit_file.exists() else ("", "", "")
        return recorded if recorded and code == code_hash(root) else UNKNOWN
    return f"{head} + changes" if changed else head


def write_commit() -> None:
    """Leave the commit for a copy of the checkout without its history."""
    COMMIT_FILE.parent.mkdir(parents=True, exist_ok=True)
    COMMIT_FILE.write_text(f"{commit()} of {code_hash()}")


def code_hash(root: Path = ROOT) -> str:
    """SHA-256 over the names and contents of the code."""
    digest = hashlib.sha256()
    for name in CODE:
        place = root / name
        for path in sorted(place.rglob("*")) if place.is_dir() else [place]:
            relative = path.relative_to(root).as_posix()
            if path.suffix in CODE_ENDINGS and not relative.startswith("bench/results/"):
                digest.update(f"{relative} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def _git(root: Path, *arguments: str) -> str:
    # of a folder inside another project's checkout, that project's commit would be told
    if not (root / ".git").exists():
        raise FileNotFoundError(f"{root} has no history")
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    write_commit()
