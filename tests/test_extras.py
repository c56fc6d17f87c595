"""What works without the packages of the extras, and the messages where one is missing."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from dfad.errors import DataError
from tests.processes import HANGING

ROOT = Path(__file__).parents[1]
TEACHER = ROOT / "tests" / "fixtures" / "teacher-of-0.1.0.safetensors"

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

MODULES = {"pyyaml": "yaml", "scikit-learn": "sklearn", "pillow": "PIL", "nvidia-dali-cuda130": "nvidia.dali"}
"""Module names that differ from their package's name."""


def modules(requirements: list[str]) -> set[str]:
    names = (re.match(r"[\w-]+", requirement)[0] for requirement in requirements)
    return {MODULES.get(name, name) for name in names if name != "dfad"}


CORE = modules(PROJECT["dependencies"])
USERS_EXTRAS = ("demo", "images", "svhn", "dali")
EXTRAS = modules([line for name in USERS_EXTRAS for line in PROJECT["optional-dependencies"][name]])


def run_without(missing: set[str], code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    blocked = f"import sys\nfor name in {sorted(missing)}: sys.modules[name] = None\n"
    return subprocess.run(
        [sys.executable, "-c", blocked + code], cwd=cwd, capture_output=True, text=True, timeout=HANGING
    )


def test_the_losses_need_torch_and_numpy_alone(tmp_path):
    missing = (CORE | EXTRAS) - {"torch", "numpy", "filelock"}  # PyTorch itself imports filelock
    done = run_without(missing, "import dfad.losses, dfad.functional", tmp_path)
    assert done.returncode == 0, done.stderr


def test_a_run_needs_no_extra_and_says_once_what_it_leaves_out(tmp_path):
    arguments = [
        "--preset=own", f"--teacher.checkpoint={TEACHER}", "--student.factory=convnet",
        '--student.kwargs={"channels": [4, 8, 8], "in_channels": 1}', "--method.rounds=2", "--method.student_steps=1",
        "--method.warm_up=2", "--method.batch_size=8", "--generator.noise_dim=4", "--generator.width=4",
        "--selection.bank_size=16", "--device=cpu", "--run_dir=run",
    ]  # fmt: skip
    done = run_without(EXTRAS, f"from dfad import train; train.main({arguments})", tmp_path)
    assert done.returncode == 0, done.stderr
    written = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"config.yaml", "metrics.jsonl", "checkpoint.pt", "student.safetensors", "result.json"} <= written
    assert not {"tensorboard", "samples.png", "curves.png"} & written
    for line in (
        "No pictures are written: matplotlib is not installed. Install it with: pip install 'dfad[demo]'.",
        "No TensorBoard events are written: tensorboard is not installed. Install it with: pip install 'dfad[demo]'.",
    ):
        assert done.stderr.count(line) == 1


@pytest.mark.parametrize(
    ("module", "name", "extra"), [("sklearn.datasets", "digits", "demo"), ("PIL", "folder", "images")]
)
def test_a_data_set_whose_package_is_missing_names_the_extra(module, name, extra, tmp_path, monkeypatch):
    from dfad.data import DataConfig, open_dataset

    for split in ("train", "test"):
        (tmp_path / split / "cat").mkdir(parents=True)
        (tmp_path / split / "cat" / "1.png").write_bytes(b"an image")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DataError, match=rf"is not installed\. Install it with: pip install 'dfad\[{extra}\]'\."):
        open_dataset(DataConfig(name, tmp_path))
