"""``python -m tools.gpu.provision``: packages for a GPU machine without a network.

``pack`` downloads wheels where there is a network and builds the C++ extension; ``install`` puts the packages that are
missing there, or too old, into a folder. It runs before anything is installed, so it needs only the standard library.
Nothing is compiled on the GPU machine: on its GPU the project does not need the extension.
"""

import argparse
import hashlib
import importlib.metadata
import importlib.util
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
LIST = Path(__file__).with_name("wheels.txt")
NEVER = ("torch", "triton")
"""Packages that the machine must have itself."""

SIZE_LIMIT = 64_000_000
"""Largest size in bytes of all wheels together."""

PLATFORMS = (
    *(f"manylinux_2_{minor}_x86_64" for minor in (34, 31, 28, 27, 24, 17, 12, 5)),
    *(f"manylinux{year}_x86_64" for year in (2014, 2010, 1)),
)

MODULES = (
    "torch", "triton", "numpy", "tyro", "yaml", "safetensors", "rich", "filelock", "tensorboard", "matplotlib",
    "sklearn", "PIL", "scipy", "pytest", "pytest_benchmark", "xdist", "hypothesis",
)  # fmt: skip
"""Packages that the project, its tests and its benchmarks import."""

CORE = {"torch", "triton", "numpy", "pillow", "matplotlib", "scikit-learn", "tensorboard"}
"""Packages that such machines have, and that are too large to send or must be their own."""

SOURCES = ("kernels/csrc", "CMakeLists.txt")
"""Of the extension."""

EXTENSIONS = ("dfad_kernels/_cpu", "dfad_kernels/_chains")
PACKAGE = ROOT / "kernels" / "dfad_kernels"
"""Folder of the extension, beside its Python code."""


class ProvisionError(Exception):
    """Packages are missing on the machine and among the wheels."""


def listed(more: Sequence[str] = ()) -> list[str]:
    """Names of the packages to pack."""
    lines = (line.partition("#")[0].strip() for line in LIST.read_text().splitlines())
    return [*(line for line in lines if line), *more]


def download_command(folder: Path, python_version: str, more: Sequence[str] = ()) -> list[str]:
    """The pip command: only wheels, in the versions that the project is tested with, without their dependencies."""
    platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
    return [
        *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"),
        *("--python-version", python_version, "--implementation", "cp", *platforms),
        *("-c", str(ROOT / "constraints.txt"), "-d", str(folder), *listed(more)),
    ]


def pack(folder: Path, python_version: str, more: Sequence[str] = ()) -> int:
    """Download the wheels, and build the extension if there is such a Python; returns their size in bytes.

    Raises:
        ProvisionError: if they are too large, or one of them is PyTorch or Triton.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for old in (*folder.glob("*.whl"), stamp(folder)):
        old.unlink(missing_ok=True)
    subprocess.run(download_command(folder, python_version, more), check=True)
    python = find_python(python_version)
    if python:
        subprocess.run([python, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(folder), str(ROOT)], check=True)
        stamp(folder).write_text(source_hash())
    else:
        print(
            f"Without the C++ extension, which a GPU does without: no Python {python_version} to build it for. "
            f"Install one (pyenv install {python_version}, uv python install {python_version}) and run this again."
        )
    wheels = list(folder.glob("*.whl"))
    for wheel in wheels:
        if distribution(wheel) in NEVER:
            raise ProvisionError(f"{wheel} must not travel: {distribution(wheel)} has to be the GPU machine's own.")
    size = sum(wheel.stat().st_size for wheel in wheels)
    if size > SIZE_LIMIT:
        raise ProvisionError(
            f"The wheels in {folder} are {size:,} bytes; {SIZE_LIMIT:,} may travel. Leave some of {more} out."
        )
    return size


def find_python(version: str) -> str | None:
    """An interpreter of a version with pip: on the path, or one of pyenv's or uv's."""
    places = [Path.home() / ".pyenv" / "versions", Path.home() / ".local" / "share" / "uv" / "python"]
    installed = [
        str(path) for place in places for path in sorted(place.glob(f"*{version}*/bin/python3")) if path.exists()
    ]
    check = f"import pip, sys; raise SystemExit(sys.version_info[:2] != {tuple(map(int, version.split('.')))})"
    for candidate in (shutil.which(f"python{version}"), *installed):
        if candidate and subprocess.run([candidate, "-c", check], capture_output=True).returncode == 0:
            return candidate
    return None


def stamp(folder: Path) -> Path:
    """The file with the hash of the sources of the extension in a folder of wheels."""
    return folder / "extension.sha256"


def distribution(wheel: Path) -> str:
    """The normalised name of a wheel's package."""
    return normalised(wheel.name.partition("-")[0])


def normalised(name: str) -> str:
    """A package's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def requirements(pyproject: Path = ROOT / "pyproject.toml") -> dict[str, tuple[int, ...]]:
    """The minimum version of every package that the project requires, including extras."""
    project = tomllib.loads(pyproject.read_text())["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    found = (re.match(r"([A-Za-z0-9._-]+)\s*>=\s*([\d.]+)", line) for line in lines)
    return {normalised(match[1]): release(match[2]) for match in found if match}


def release(version: str) -> tuple[int, ...]:
    """The leading numbers of a version."""
    match = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(map(int, match[0].split("."))) if match else ()


def missing_wheels(folder: Path) -> list[Path]:
    """Wheels of packages that this interpreter lacks, or has in an unsuitable version."""
    needed = requirements()
    return [
        wheel
        for wheel in sorted(folder.glob("*.whl"))
        if distribution(wheel) != "dfad" and not _has(distribution(wheel), needed.get(distribution(wheel), ()))
    ]


def _has(name: str, least: tuple[int, ...]) -> bool:
    try:
        return release(importlib.metadata.version(name)) >= least
    except importlib.metadata.PackageNotFoundError:
        return False


def missing_modules(names: Sequence[str]) -> list[str]:
    """The modules that cannot be imported."""
    importlib.invalidate_caches()
    specs = {name: importlib.util.find_spec(name) for name in names}
    # a folder without a module has no loader
    return [name for name, spec in specs.items() if spec is None or spec.loader is None]


def outdated() -> Iterator[str]:
    """Packages of the project that are too old here, except those that are not imported there."""
    packed = {normalised(name) for name in listed()}
    for name, least in requirements().items():
        if name not in packed | CORE:
            continue
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if release(version) < least:
            yield f"{name} {version} (needs {'.'.join(map(str, least))})"


def install(wheels: Path, target: Path) -> None:
    """Unpack everything that is missing into a folder, which is already on the module path.

    Raises:
        ProvisionError: naming packages that are neither on the machine nor among the wheels.
    """
    target.mkdir(parents=True, exist_ok=True)
    if found := missing_wheels(wheels):
        print("From the wheels:", ", ".join(distribution(wheel) for wheel in found), flush=True)
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--upgrade"]
        subprocess.run([*pip, "--target", str(target), *map(str, found)], check=True)
    if missing := [*missing_modules(MODULES), *outdated()]:
        raise ProvisionError(
            f"This machine lacks {', '.join(missing)}, and {wheels} holds no wheels of them. Where there is a network, "
            "add the packages with make gpu-wheels WITH='PACKAGE …' and bring the folder along."
        )
    print(extension(wheels))


def extension(wheels: Path) -> str:
    """Copy the extension beside its Python code, if there is a suitable one; returns a line about it."""
    without = "Without the C++ extension, which a GPU does without:"
    if not missing_modules(["dfad_kernels"]) and importlib.util.find_spec("dfad_kernels._cpu"):
        return "The C++ extension is installed."
    wheel = next(iter(wheels.glob("dfad-*.whl")), None)
    if wheel is None:
        return f"{without} {wheels} holds none."
    if not stamp(wheels).exists() or stamp(wheels).read_text() != source_hash():
        return f"{without} the one in {wheels} is of other sources. Run make gpu-wheels again where there is a network."
    built_for = re.search(r"-cp(\d)(\d+)-", wheel.name)
    if built_for is None or (int(built_for[1]), int(built_for[2])) != sys.version_info[:2]:
        return f"{without} {wheel.name} is for another Python than {sys.version.split()[0]}."
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.startswith(EXTENSIONS) and name.endswith(".so"):
                (PACKAGE / Path(name).name).write_bytes(archive.read(name))
    return f"The C++ extension is that of {wheel.name}."


def source_hash(root: Path = ROOT) -> str:
    """SHA-256 over the sources of the extension."""
    digest = hashlib.sha256()
    for name in SOURCES:
        place = root / name
        for path in sorted(place.rglob("*")) if place.is_dir() else [place]:
            if path.is_file():
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
        raise SystemExit(f"\n{error.cmd[0]} failed with exit code {error.returncode}; what it says is above.") from None


if __name__ == "__main__":
    main()
