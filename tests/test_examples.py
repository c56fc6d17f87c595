"""The examples run, and come to what they promise."""

import json
import re
import sys
from importlib import import_module
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
NOTEBOOK = json.loads((EXAMPLES / "walkthrough.ipynb").read_text(encoding="utf-8"))


@pytest.fixture
def example(monkeypatch, tmp_path):
    """Imports an example as its own folder's scripts do, from an empty folder."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.chdir(tmp_path)
    yield import_module
    for path in EXAMPLES.glob("*.py"):
        sys.modules.pop(path.stem, None)


def test_all_are_listed_and_tested():
    listed = set(re.findall(r"^\| \[([^]]+)\]", (EXAMPLES / "README.md").read_text(), re.MULTILINE))
    files = {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb")} - {"digits.py"}
    assert listed == files
    assert all(name.partition(".")[0] in Path(__file__).read_text() for name in files)


def test_plain_pytorch(example):
    assert example("plain_pytorch").main() > 0.9


def test_with_lightning(example):
    pytest.importorskip("lightning")
    assert example("with_lightning").main() > 0.85


def test_with_transformers(example):
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    assert example("with_transformers").main(epochs=6) > 0.8


def test_own_networks(example, tmp_path):
    result = example("own_networks").main(rounds=30, run_dir=str(tmp_path / "run"))
    assert result.rounds == 30
    assert result.accuracy > 0.4
    assert (tmp_path / "run" / "report.html").exists()


def test_torchvision_teacher(example, tmp_path):
    pytest.importorskip("torchvision", exc_type=Exception)
    result = example("torchvision_teacher").main(rounds=1, batch_size=4, width=8, run_dir=str(tmp_path / "run"))
    assert result.rounds == 1


def test_walkthrough(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    space: dict[str, object] = {}
    for cell in NOTEBOOK["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]).replace("ROUNDS = 60", "ROUNDS = 8"), "walkthrough", "exec"), space)
    assert space["ROUNDS"] == 8
    assert space["result"].rounds == 8
    assert (tmp_path / "runs" / "walkthrough" / "export" / "student.pt2").exists()


def test_the_notebook_is_clean():
    assert NOTEBOOK["nbformat"] == 4
    for cell in NOTEBOOK["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None
