"""What is handed on: metadata, the source distribution, and files that name the version."""

import os
import re
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path

import pytest
import yaml

from tests.processes import HANGING

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> set[str]:
    """Names of the files in the source distribution."""
    pytest.importorskip("scikit_build_core")
    folder = tmp_path_factory.mktemp("sdist")
    code = f"from scikit_build_core.build import build_sdist; print(build_sdist({str(folder)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=HANGING)
    assert done.returncode == 0, done.stderr
    (archive,) = folder.glob("*.tar.gz")
    assert archive.stat().st_size < 5_000_000
    with tarfile.open(archive) as tar:
        return {name.partition("/")[2] for name in tar.getnames()}


def test_the_source_distribution_builds_and_explains_itself(sdist):
    needed = {
        "pyproject.toml", "CMakeLists.txt", "LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff", "dfad/py.typed",
        "kernels/dfad_kernels/py.typed", "dfad/runs/page.css", "dfad/runs/page.js", "dfad/__main__.py",
    }  # fmt: skip
    assert needed <= sdist
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "kernels").rglob("*.?pp")}
    assert sources
    assert sources <= sdist
    assert not [name for name in sdist if name.startswith((".venv", "build/", "runs/")) or name.endswith(".so")]


def test_the_metadata_says_who_what_and_for_whom():
    project = PROJECT["project"]
    assert project["authors"]
    assert project["urls"]
    assert {"Typing :: Typed", "Programming Language :: Python :: 3.11"} <= set(project["classifiers"])
    assert project["scripts"] == {"dfad": "dfad.__main__:main"}
    assert not [line for line in project["classifiers"] if line.startswith("License")]  # PEP 639: an expression


def test_the_version_stands_once_and_the_citation_follows_it():
    version = PROJECT["project"]["version"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == version
    assert citation["cff-version"] == "1.2.0"
    paper = citation["preferred-citation"]
    assert paper["title"] in " ".join((ROOT / "README.md").read_text().split())
    assert [author["family-names"] for author in paper["authors"]] == ["Qu", "Wang", "Xiao"]
    headings = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == "Unreleased"
    assert version in headings
    quoted = [
        path
        for path in (ROOT / "dfad").rglob("*.py")
        if re.search(rf"version.* = .{re.escape(version)}", path.read_text())
    ]
    assert quoted == []


def test_a_wheel_is_planned_for_every_python_that_is_promised():
    planned = {name.removesuffix("-*") for name in PROJECT["tool"]["cibuildwheel"]["build"]}
    promised = re.findall(r"Python :: 3\.(\d+)", " ".join(PROJECT["project"]["classifiers"]))
    assert planned == {f"cp3{minor}" for minor in promised}
    assert "libgomp" in PROJECT["tool"]["cibuildwheel"]["linux"]["repair-wheel-command"]


def test_it_needs_no_repository_around_it(tmp_path):
    code = "import dfad, dfad_kernels, dfad.runs.page; print(len(dfad.runs.page.page('x', [])))"
    plain = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=plain, capture_output=True, text=True, timeout=HANGING
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 3000
