"""The machine and the commit of a measurement, without the name of the host."""

import functools
import hashlib
import platform
import re
import subprocess
from pathlib import Path

import torch

from dfad.environment import processor, version

PACKAGES = ("torch", "triton", "dfad", "liger-kernel", "nvidia-dali-cuda130", "apex")


def machine() -> dict[str, str]:
    """The device, the threads, the versions and the commit."""
    return {
        "device": device_name(),
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
        "commit": commit(),
    }


def device_name() -> str:
    """The GPU; without one, the processor and how many threads."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{processor()}, {torch.get_num_threads()} threads"


def file_name() -> str:
    """Name of the file of the device's record."""
    return re.sub(r"[^a-z0-9]+", "-", device_name().lower()).strip("-") + ".json"


ROOT = Path(__file__).parents[2]

CODE = ("dfad", "kernels", "bench", "tools", "CMakeLists.txt", "pyproject.toml")
"""Files that a figure depends on, relative to the checkout's root; without the records."""

CODE_ENDINGS = (".py", ".hpp", ".cpp", ".sh", ".txt", ".toml")

COMMIT_FILE = ROOT / "build" / "gpu" / "commit"
"""Commit and hash of the code, for a copy of the checkout without its history."""

UNKNOWN = "not recorded"


@functools.cache
def commit(root: Path = ROOT, commit_file: Path = COMMIT_FILE) -> str:
    """The commit of the code: that of the checkout if nothing differs from it, else the one that :func:`write_commit`
    wrote if the code is still the same, else the checkout's, marked ``+ changes``.
    """
    try:
        head = _git(root, "rev-parse", "HEAD").strip()
        changed = _git(root, "status", "--porcelain", "--", *CODE, ":!bench/results")
    except (OSError, subprocess.CalledProcessError):  # a copy without its history
        head = changed = ""
    if head and not changed:
        return head
    recorded, _, code = commit_file.read_text().partition(" of ") if commit_file.exists() else ("", "", "")
    if recorded and code == code_hash(root):
        return recorded
    return f"{head} + changes" if head else UNKNOWN


def write_commit() -> None:
    """Write the commit down for a copy of the checkout without its history."""
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
    # inside another project's checkout, git would return that project's commit
    if not (root / ".git").exists():
        raise FileNotFoundError(f"{root} has no history")
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    write_commit()
