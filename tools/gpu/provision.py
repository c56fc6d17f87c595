"""``python -m tools.gpu.provision``: what a GPU machine without a network lacks.

``pack`` downloads wheels where there is a network; ``install`` puts those that are missing into a folder, and builds
the extension there with the machine's own PyTorch. It runs before anything is installed, so it needs the standard
library alone.
"""

import argparse
import hashlib
import importlib.metadata
import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
LIST = Path(__file__).with_name("wheels.txt")
NEVER = ("torch", "triton")
"""What must be the machine's own."""

SIZE_LIMIT = 64_000_000
"""Bytes of all wheels together."""

PLATFORMS = (
    *(f"manylinux_2_{minor}_x86_64" for minor in (34, 31, 28, 27, 24, 17, 12, 5)),
    *(f"manylinux{year}_x86_64" for year in (2014, 2010, 1)),
)

MODULES = (
    "torch", "triton", "numpy", "tyro", "yaml", "safetensors", "rich", "tensorboard", "matplotlib", "sklearn", "PIL",
    "pytest", "pytest_benchmark", "xdist", "hypothesis",
)  # fmt: skip
"""What the project, its tests and its benchmarks import."""

BUILD_MODULES = ("nanobind", "scikit_build_core")
CMAKE = (3, 26)
"""What builds the extension."""

SOURCES = ("kernels", "CMakeLists.txt", "pyproject.toml")
"""Of the extension."""


class ProvisionError(Exception):
    """What the machine lacks and was not brought along."""


def listed(more: Sequence[str] = ()) -> list[str]:
    """Names of the packages to pack."""
    lines = (line.partition("#")[0].strip() for line in LIST.read_text().splitlines())
    return [*(line for line in lines if line), *more]


def download_command(folder: Path, python_version: str, more: Sequence[str] = ()) -> list[str]:
    """Pip's, for wheels alone, of the versions that the project is tested with, and nothing that they require."""
    platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
    return [
        *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"),
        *("--python-version", python_version, "--implementation", "cp", *platforms),
        *("-c", str(ROOT / "constraints.txt"), "-d", str(folder), *listed(more)),
    ]


def pack(folder: Path, python_version: str, more: Sequence[str] = ()) -> int:
    """Download the wheels; returns their size in bytes.

    Raises:
        ProvisionError: if they are larger than may travel, or one is of PyTorch or Triton.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.whl"):
        old.unlink()
    subprocess.run(download_command(folder, python_version, more), check=True)
    wheels = list(folder.glob("*.whl"))
    for wheel in wheels:
        if distribution(wheel) in NEVER:
            raise ProvisionError(f"{wheel} must not travel: {distribution(wheel)} has to be the GPU machine's own.")
    size = sum(wheel.stat().st_size for wheel in wheels)
    if size > SIZE_LIMIT:
        raise ProvisionError(
            f"The wheels in {folder} take {size:,} bytes, and {SIZE_LIMIT:,} may travel. Leave some of {more} out."
        )
    return size


def distribution(wheel: Path) -> str:
    """The normalised name of what a wheel holds."""
    return wheel.name.partition("-")[0].replace("_", "-").lower()


def missing_wheels(folder: Path) -> list[Path]:
    """Wheels of packages that this interpreter does not have in any version."""
    return [wheel for wheel in sorted(folder.glob("*.whl")) if not _has_package(distribution(wheel))]


def _has_package(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def missing_modules(names: Sequence[str]) -> list[str]:
    """Those that cannot be imported."""
    importlib.invalidate_caches()
    specs = {name: importlib.util.find_spec(name) for name in names}
    # a folder without a module of its own has no loader
    return [name for name, spec in specs.items() if spec is None or spec.loader is None]


def install(wheels: Path, target: Path) -> None:
    """Bring everything that is missing into a folder, which is on the module path already.

    Raises:
        ProvisionError: naming what is neither on the machine nor among the wheels.
    """
    target.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--upgrade", "--target"]
    if found := missing_wheels(wheels):
        print("From the wheels:", ", ".join(distribution(wheel) for wheel in found), flush=True)
        subprocess.run([*pip, str(target), *map(str, found)], check=True)
    if missing := missing_modules(MODULES):
        raise ProvisionError(
            f"This machine lacks {', '.join(missing)}, and {wheels} holds no wheels of them. Where there is a network, "
            "add the packages with make gpu-wheels WITH='PACKAGE …' and bring the folder along."
        )
    stamp = target / "extension"
    if not missing_modules(["dfad_kernels"]) and not stamp.exists():
        print("The kernels are those that the interpreter has installed.")
        return
    current = f"{source_hash()} {sys.version}"
    if stamp.exists() and stamp.read_text() == current:
        return
    missing = missing_modules(BUILD_MODULES)
    if not has_cmake():
        missing.append(f"CMake {'.'.join(map(str, CMAKE))} or newer")
    if missing:
        raise ProvisionError(
            f"The extension cannot be built: this machine lacks {', '.join(missing)}, and {wheels} holds no wheels of "
            "them. Where there is a network, run make gpu-wheels (WITH=cmake for CMake) and bring the folder along."
        )
    print("Building the extension with the machine's own tools.", flush=True)
    subprocess.run([*pip, str(target), "--no-build-isolation", str(ROOT)], check=True)
    package = target / "dfad"
    if not package.is_symlink():  # one copy of the package: the checkout's
        shutil.rmtree(package, ignore_errors=True)
        package.symlink_to(ROOT / "dfad")
    stamp.write_text(current)


def has_cmake() -> bool:
    """Whether there is one that is new enough: as a package, or a program."""
    if not missing_modules(["cmake"]):
        return True
    program = shutil.which("cmake")
    told = subprocess.run([program, "--version"], capture_output=True, text=True).stdout if program else ""
    version = re.search(r"version (\d+)\.(\d+)", told)
    return version is not None and (int(version[1]), int(version[2])) >= CMAKE


def source_hash(root: Path = ROOT) -> str:
    """SHA-256 over what the extension is built of."""
    digest = hashlib.sha256()
    for name in SOURCES:
        place = root / name
        for path in sorted(place.rglob("*")) if place.is_dir() else [place]:
            if path.is_file() and "__pycache__" not in path.parts:
                digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tools.gpu.provision", description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack")
    packing.add_argument("folder", type=Path)
    packing.add_argument("--python-version", default="3.12")
    packing.add_argument("--with", dest="more", nargs="*", default=[], help="further packages")
    installing = commands.add_parser("install")
    installing.add_argument("wheels", type=Path)
    installing.add_argument("target", type=Path)
    arguments = parser.parse_args()
    try:
        if arguments.command == "pack":
            size = pack(arguments.folder, arguments.python_version, arguments.more)
            print(f"{arguments.folder}: wheels for Python {arguments.python_version}, {size / 1e6:.1f} MB")
        else:
            install(arguments.wheels, arguments.target)
    except ProvisionError as error:
        raise SystemExit(f"\n{error}") from None
    except subprocess.CalledProcessError as error:
        raise SystemExit(f"\npip failed with exit code {error.returncode}; what it says is above.") from None


if __name__ == "__main__":
    main()
