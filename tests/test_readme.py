"""README and documentation say only what is so: commands run, links and pictures exist, tables are the program's."""

import os
import re
import shlex
import shutil
from pathlib import Path

import pytest

from dfad import train
from dfad.errors import DfadError
from tests.processes import run
from tests.test_train_command import SMALL

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
USAGE, TUTORIAL, OWN_TEACHER = (
    (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8") for name in ("usage", "tutorial", "own-teacher")
)

NETWORKS = """
import torch
from torch import nn

def student(width=16):
    return nn.Sequential(
        nn.Conv2d(1, width, 3, stride=2, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10),
    )

teacher = student

if __name__ == "__main__":
    torch.save(teacher().state_dict(), "weights.pt")
"""

SHORTENED = {
    "dfad.train": ["--method.warm_up=2", *(flag for flag in SMALL if "noise" not in flag)],
    "dfad.teacher": ["--epochs=1"],
}
"""Flags that are added to a command that starts a run."""


def blocks(language: str, page: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page, re.DOTALL | re.MULTILINE)


def first_line(block: str) -> str:
    return block.split("\n")[0][:40]


def table(heading: str) -> list[list[str]]:
    section = USAGE.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows[2:]]


@pytest.fixture(scope="module")
def made_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("user")
    (folder / "mynets.py").write_text(NETWORKS)
    execute(folder, ["mynets.py"])
    return folder


@pytest.fixture
def users_folder(made_folder, tmp_path):
    """A folder with networks and weights of a user."""
    return shutil.copytree(made_folder, tmp_path, dirs_exist_ok=True)


def execute(folder: Path, program: list[str]) -> None:
    done = run(program, folder, os.environ)
    assert done.returncode == 0, f"{shlex.join(program)}\n{done.stderr}"


def run_commands(block: str, folder: Path) -> None:
    for line in block.replace("\\\n", " ").splitlines():
        python, dash_m, module, *flags = shlex.split(line)
        assert (python, dash_m) == ("python", "-m")
        more = [] if "--resume" in flags else SHORTENED.get(module, [])
        execute(folder, ["-m", module, *flags, *more])


def run_python(block: str, folder: Path) -> None:
    shortened = block.replace("rounds=300", "rounds=2, student_steps=1, batch_size=8")
    assert (shortened != block) == ("Distiller" in block)
    execute(folder, ["-c", shortened])


@pytest.mark.parametrize("block", [*blocks("bash"), *blocks("bash", OWN_TEACHER)], ids=first_line)
def test_commands_run(block, users_folder):
    run_commands(block, users_folder)


@pytest.mark.parametrize("block", [*blocks("python"), *blocks("python", OWN_TEACHER)], ids=first_line)
def test_python_runs(block, users_folder):
    run_python(block, users_folder)


def test_the_tutorial_runs_from_top_to_bottom(tmp_path):
    (networks,) = blocks("python", TUTORIAL)
    name = networks.partition("\n")[0].removeprefix("# ")
    (tmp_path / name).write_text(networks)
    commands = blocks("bash", TUTORIAL)
    assert len(commands) >= 7
    for block in commands:
        run_commands(block, tmp_path)


def test_its_blocks_are_all_of_a_kind_that_is_tested():
    assert re.findall(r"^```(\w+)", README, re.MULTILINE) == ["text", "bash", "python", "python", "bash"]
    targets = re.findall(r"^make (\w+)", blocks("text")[0], re.MULTILINE)
    assert targets
    for target in targets:  # which run by themselves
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_its_links_and_pictures_exist():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("https://")]
    assert len(links) >= 2
    for link in links:
        assert (ROOT / link.partition("#")[0]).stat().st_size < 300_000


def test_every_room_is_described_to_contributors():
    page = (ROOT / "docs" / "contributing.md").read_text(encoding="utf-8")
    rooms = [path.parent.name for path in (ROOT / "dfad").glob("*/__init__.py")]
    assert "engine" in rooms
    assert [name for name in rooms if f"`dfad/{name}`" not in page] == []


def test_it_is_short():
    assert README.count("\n") < 150


def test_its_exit_codes_are_those_of_the_errors():
    documented = {int(code) for row in table("Exit codes") for code in row[0].split(",")}
    assert documented == {0, 130, 143} | {kind.exit_code for kind in (DfadError, *DfadError.__subclasses__())
                                          if "exit_code" in vars(kind)}  # fmt: skip


def test_its_options_exist(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        train.main(["--help"])
    offered = set(re.findall(r"--[a-z][a-z0-9_.]*", capsys.readouterr().out))
    mentioned = {flag for row in table("Options that matter") for flag in re.findall(r"`(--[^`]+)`", row[0])}
    assert len(mentioned) > 15
    assert mentioned <= offered
