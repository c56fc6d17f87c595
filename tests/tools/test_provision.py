"""Packages for a GPU machine without a network."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tools.gpu import provision
from tools.gpu.provision import ProvisionError, install, missing_wheels, pack

ROOT = Path(__file__).parents[2]


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.fixture
def calls(monkeypatch) -> list[list[str]]:
    """The commands that would have been run."""
    made: list[list[str]] = []

    def run(command, **options):
        made.append(list(map(str, command)))
        return subprocess.CompletedProcess(command, 0, stdout="")

    monkeypatch.setattr(provision.subprocess, "run", run)
    return made


@pytest.fixture
def wheels(tmp_path) -> Path:
    folder = tmp_path / "wheels"
    folder.mkdir()
    for name in ("nobody_has_this-1.0-py3-none-any.whl", "PyYAML-6.0-cp312-cp312-manylinux_2_17_x86_64.whl"):
        (folder / name).write_bytes(b"a wheel")
    return folder


def test_every_packed_version_is_the_tested_one_and_pytorch_is_not_packed():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {normalised(line.partition("==")[0]) for line in lines if "==" in line}
    names = {normalised(name) for name in provision.listed()}
    assert "tyro" in names
    assert names <= pinned
    assert not names & set(provision.NEVER)


def test_only_wheels_for_the_machine_are_downloaded_and_nothing_else(calls, tmp_path):
    old = tmp_path / "old-1.0-py3-none-any.whl"
    old.write_bytes(b"")
    assert pack(tmp_path, "3.12", ["cmake"]) == 0
    assert not old.exists()
    command = calls[0]
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--only-binary=:all:", "--no-deps"} <= set(command)
    assert command[command.index("--python-version") + 1] == "3.12"
    assert "manylinux_2_28_x86_64" in command
    assert command[command.index("-c") + 1].endswith("constraints.txt")
    assert {"tyro", "cmake"} <= set(command)


def test_too_much_or_pytorch_may_not_travel(calls, tmp_path, monkeypatch):
    monkeypatch.setattr(provision, "find_python", lambda version: None)

    def downloading(name: str):
        def run(*_, **__) -> None:
            (tmp_path / name).write_bytes(b"12345")

        monkeypatch.setattr(provision.subprocess, "run", run)

    downloading("torch-2.13.0-cp312-cp312-manylinux_2_28_x86_64.whl")
    with pytest.raises(ProvisionError, match="torch has to be the GPU machine's own"):
        pack(tmp_path, "3.12")
    downloading("big-1.0-py3-none-any.whl")
    monkeypatch.setattr(provision, "SIZE_LIMIT", 4)
    with pytest.raises(ProvisionError, match=r"are 5 bytes; 4 may travel. Leave some of \['big'\] out"):
        pack(tmp_path, "3.12", ["big"])


def test_what_the_machine_has_is_left_alone(wheels, tmp_path, calls, capsys):
    assert [path.name for path in missing_wheels(wheels)] == ["nobody_has_this-1.0-py3-none-any.whl"]
    install(wheels, tmp_path / "site")
    (command,) = calls
    assert {"--no-index", "--no-deps", str(tmp_path / "site")} <= set(command)
    assert command[-1].endswith("nobody_has_this-1.0-py3-none-any.whl")
    assert "nobody-has-this" in capsys.readouterr().out


def test_a_package_that_is_too_old_counts_as_missing(wheels, tmp_path, calls, monkeypatch):
    real = provision.importlib.metadata.version
    monkeypatch.setattr(
        provision.importlib.metadata, "version", lambda name: "5.4.1" if name == "pyyaml" else real(name)
    )
    assert any("PyYAML" in wheel.name for wheel in missing_wheels(wheels))
    with pytest.raises(ProvisionError, match=r"lacks pyyaml 5.4.1 \(needs 6.0\)"):  # pip has not run here
        install(wheels, tmp_path / "site")


@pytest.mark.parametrize(("version", "numbers"), [("2.11.0+cu130", (2, 11, 0)), ("6.0rc1", (6, 0)), ("dev", ())])
def test_releases_are_compared_by_their_numbers(version, numbers):
    assert provision.release(version) == numbers


def test_requirements_are_those_of_the_project():
    needed = provision.requirements()
    assert needed["torch"] == (2, 11)
    assert needed["pytest-benchmark"] == (5, 1)
    assert all(name in needed or name in provision.CORE for name in provision.CORE)


def test_what_is_neither_there_nor_brought_is_told(tmp_path, calls, monkeypatch):
    monkeypatch.setattr(provision, "MODULES", ("sys", "no_such_module"))
    with pytest.raises(ProvisionError, match="lacks no_such_module, and .* holds no wheels of them.*make gpu-wheels"):
        install(tmp_path / "wheels", tmp_path / "site")


class TestExtension:
    @pytest.fixture(autouse=True)
    def machine(self, monkeypatch, tmp_path):
        """A copy of the package without the extension."""
        monkeypatch.setattr(provision.importlib.util, "find_spec", lambda name: None)
        monkeypatch.setattr(provision, "PACKAGE", tmp_path / "package")
        (tmp_path / "package").mkdir()

    def carried(self, folder: Path, tag: str, sources: str) -> None:
        folder.mkdir(exist_ok=True)
        with zipfile.ZipFile(folder / f"dfad-0.1.0-{tag}-linux_x86_64.whl", "w") as wheel:
            wheel.writestr("dfad_kernels/_cpu.so", b"code")
            wheel.writestr("dfad_kernels/other.py", b"")
        provision.stamp(folder).write_text(sources)

    @property
    def own_tag(self) -> str:
        version = f"cp{sys.version_info[0]}{sys.version_info[1]}"
        return f"{version}-{version}"

    def test_is_laid_beside_its_python(self, wheels, tmp_path):
        self.carried(wheels, self.own_tag, provision.source_hash())
        assert "is that of dfad-0.1.0" in provision.extension(wheels)
        assert [path.name for path in (tmp_path / "package").iterdir()] == ["_cpu.so"]
        assert (tmp_path / "package" / "_cpu.so").read_bytes() == b"code"

    @pytest.mark.parametrize(
        ("tag", "sources", "words"),
        [("cp312-cp312", "other", "of other sources"), ("cp27-cp27m", None, "for another Python"), ("", None, "none")],
    )
    def test_is_done_without_where_none_fits(self, tag, sources, words, wheels, tmp_path):
        if tag:
            self.carried(wheels, tag, sources or provision.source_hash())
        told = provision.extension(wheels)
        assert told.startswith("Without the C++ extension, which a GPU does without")
        assert words in told
        assert not list((tmp_path / "package").iterdir())

    def test_depends_on_every_source(self, tmp_path):
        for name in provision.SOURCES:
            place = tmp_path / name
            place.parent.mkdir(exist_ok=True)
            place.write_text("x") if "." in name else place.mkdir()
        before = provision.source_hash(tmp_path)
        (tmp_path / "kernels" / "csrc" / "new.hpp").write_text("")
        assert provision.source_hash(tmp_path) != before

    def test_is_built_where_there_is_such_a_python(self, calls, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(provision, "find_python", lambda version: f"/python{version}")
        pack(tmp_path, "3.12")
        assert calls[1][:4] == ["/python3.12", "-m", "pip", "wheel"]
        assert provision.stamp(tmp_path).read_text() == provision.source_hash()
        monkeypatch.setattr(provision, "find_python", lambda version: None)
        pack(tmp_path, "3.12")
        assert not provision.stamp(tmp_path).exists()
        assert "no Python 3.12 to build it for" in (told := capsys.readouterr().out)
        assert "pyenv install 3.12" in told

    def test_a_python_is_one_that_runs(self, tmp_path, monkeypatch):
        version = f"{sys.version_info[0]}.{sys.version_info[1]}"
        monkeypatch.setattr(provision.shutil, "which", lambda name: "/bin/false")
        monkeypatch.setattr(provision.Path, "home", lambda: tmp_path)
        assert provision.find_python(version) is None
        place = tmp_path / ".pyenv" / "versions" / f"{version}.9" / "bin"
        place.mkdir(parents=True)
        (place / "python3").symlink_to(sys.executable)
        assert provision.find_python(version) == str(place / "python3")
        assert provision.find_python("2.7") is None


@pytest.mark.parametrize(
    ("target", "variable", "wanted", "unwanted"),
    [
        ("gpu-wheels", "WITH=cmake", "-m tools.gpu.provision pack build/gpu/wheels --with cmake", "REHEARSE"),
        ("gpu", "REHEARSE=1", "REHEARSE=1 PYTHON=.venv/bin/python tools/gpu/gpu.sh", "--rehearse"),
        ("gpu", "REHEARSE=", "REHEARSE= PYTHON=python3 tools/gpu/gpu.sh", "pip install"),
        ("report", "PYTHON=python3", "-m bench.report", "REHEARSE"),
    ],
)
def test_make(target, variable, wanted, unwanted):
    done = subprocess.run(["make", "-n", target, variable], cwd=ROOT, capture_output=True, text=True, check=True)
    assert wanted in done.stdout
    assert unwanted not in done.stdout
