"""What a GPU machine without a network is brought."""

import re
import subprocess
import sys
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
    (command,) = calls
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--only-binary=:all:", "--no-deps"} <= set(command)
    assert command[command.index("--python-version") + 1] == "3.12"
    assert "manylinux_2_28_x86_64" in command
    assert command[command.index("-c") + 1].endswith("constraints.txt")
    assert {"tyro", "cmake"} <= set(command)


def test_too_much_or_pytorch_may_not_travel(calls, tmp_path, monkeypatch):
    def downloading(name: str):
        def run(*_, **__) -> None:
            (tmp_path / name).write_bytes(b"12345")

        monkeypatch.setattr(provision.subprocess, "run", run)

    downloading("torch-2.13.0-cp312-cp312-manylinux_2_28_x86_64.whl")
    with pytest.raises(ProvisionError, match="torch has to be the GPU machine's own"):
        pack(tmp_path, "3.12")
    downloading("big-1.0-py3-none-any.whl")
    monkeypatch.setattr(provision, "SIZE_LIMIT", 4)
    with pytest.raises(ProvisionError, match=r"take 5 bytes, and 4 may travel. Leave some of \['big'\] out"):
        pack(tmp_path, "3.12", ["big"])


def test_what_the_machine_has_is_left_alone(wheels, tmp_path, calls, capsys):
    assert [path.name for path in missing_wheels(wheels)] == ["nobody_has_this-1.0-py3-none-any.whl"]
    install(wheels, tmp_path / "site")
    (command,) = calls  # no build: the kernels are installed here
    assert {"--no-index", "--no-deps", str(tmp_path / "site")} <= set(command)
    assert command[-1].endswith("nobody_has_this-1.0-py3-none-any.whl")
    assert "nobody-has-this" in capsys.readouterr().out


def test_what_is_neither_there_nor_brought_is_told(tmp_path, calls, monkeypatch):
    monkeypatch.setattr(provision, "MODULES", ("sys", "no_such_module"))
    with pytest.raises(ProvisionError, match="lacks no_such_module, and .* holds no wheels of them.*make gpu-wheels"):
        install(tmp_path / "wheels", tmp_path / "site")


class TestBuilding:
    @pytest.fixture(autouse=True)
    def without_kernels(self, monkeypatch):
        """The machine has everything but the extension."""
        lacking = {"dfad_kernels"}
        monkeypatch.setattr(provision, "missing_modules", lambda names: [name for name in names if name in lacking])
        return lacking

    def test_is_done_without_isolation_and_again_only_for_other_sources(self, tmp_path, calls, monkeypatch):
        site = tmp_path / "site"
        for _ in range(2):
            install(tmp_path, site)
        (command,) = calls
        assert {"--no-build-isolation", "--no-index", "--no-deps"} <= set(command)
        assert command[-1] == str(ROOT)
        assert (site / "dfad").resolve() == ROOT / "dfad"
        monkeypatch.setattr(provision, "source_hash", lambda: "other")
        install(tmp_path, site)
        assert len(calls) == 2

    @pytest.mark.parametrize(
        ("lacks", "words"), [("nanobind", "lacks nanobind"), ("cmake", r"lacks CMake 3\.26 or newer")]
    )
    def test_tells_what_it_lacks(self, lacks, words, without_kernels, tmp_path, monkeypatch):
        without_kernels.add(lacks)
        old = subprocess.CompletedProcess((), 0, stdout="cmake version 3.25.1")
        monkeypatch.setattr(provision.subprocess, "run", lambda *_, **__: old)
        with pytest.raises(ProvisionError, match=words):
            install(tmp_path, tmp_path / "site")

    def test_depends_on_every_source(self, tmp_path):
        for name in provision.SOURCES:
            place = tmp_path / name
            place.write_text("x") if "." in name else place.mkdir()
        before = provision.source_hash(tmp_path)
        (tmp_path / "kernels" / "new.hpp").write_text("")
        assert provision.source_hash(tmp_path) != before


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
