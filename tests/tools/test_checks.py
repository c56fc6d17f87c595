"""Parsing of the reports of NVIDIA's tools."""

import re
import signal
import subprocess
from pathlib import Path

import pytest

from tools.gpu import checks

CSV = """==PROF== Connected to process 7
activation boundary, bfloat16
==PROF== Disconnected from process 7
"ID","Process ID","Kernel Name","Block Size","Grid Size","Section Name","Metric Name","Metric Unit","Metric Value"
"0","7","_kl_forward_kernel","(128, 1, 1)","(64, 1, 1)","Command line","dram__bytes_read.sum","byte","67,108,864"
"0","7","_kl_forward_kernel","(128, 1, 1)","(64, 1, 1)","Command line","gpu__time_duration.sum","ns","16,500"
"1","7","_kl_backward_kernel","(128, 1, 1)","(32, 1, 1)","Command line","gpu__time_duration.sum","ns","9000"
==WARNING== something
"""


def test_the_profilers_lines_become_kernels():
    assert checks.profiled(CSV) == [
        {
            "kernel": "kl_forward_kernel, launch 0, grid (64, 1, 1)",
            "metrics": {"MB read": pytest.approx(67.108864), "microseconds": pytest.approx(16.5)},
        },
        {
            "kernel": "kl_backward_kernel, launch 1, grid (32, 1, 1)",
            "metrics": {"microseconds": pytest.approx(9.0)},
        },
    ]
    assert checks.profiled("==ERROR== Failed to initialize the profiler") == []


@pytest.mark.parametrize(
    ("output", "code", "words", "clean"),
    [
        ("12 passed, 3 deselected in 9s\n===== ERROR SUMMARY: 0 errors", 0, "0 errors; 12 passed, 3 deselected", True),
        ("12 passed in 9s\n===== ERROR SUMMARY: 3 errors", 0, "3 errors; 12 passed", False),
        ("1 failed, 11 passed in 9s\n===== ERROR SUMMARY: 0 errors", 1, "0 errors; 1 failed, 11 passed", False),
        ("===== RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", 5, "0 hazards displayed", False),
        (
            "4 passed in 1s\n===== RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)",
            0,
            "0 hazards displayed (0 errors, 0 warnings); 4 passed",
            True,
        ),
        (
            "! KeyboardInterrupt !\n4 passed, 2 deselected in 110s\n===== ERROR SUMMARY: 0 errors",
            2,
            "0 errors; 4 passed, 2 deselected, then no time was left",
            True,
        ),
        (
            "! KeyboardInterrupt !\n1 failed in 110s\n===== ERROR SUMMARY: 0 errors",
            2,
            "0 errors; 1 failed, then",
            False,
        ),
        ("1 failed, 4 passed in 9s\n===== ERROR SUMMARY: 0 errors", 1, "0 errors; 1 failed, 4 passed", False),
        ("========= Error: Device not supported. Please refer", 1, "refused by the machine: Device not supp", True),
        ("Segmentation fault", -11, "ended with code -11 and no summary", False),
    ],
)
def test_the_sanitizers_summary(output, code, words, clean):
    told, found_clean = checks.sanitizer_summary(output, code)
    assert told.startswith(words)
    assert found_clean == clean


def test_tests_that_take_too_long_are_interrupted_and_report_what_they_found(monkeypatch):
    signals: list[int] = []

    class Process:
        pid, returncode = 7, 2

        def __init__(self, *_: object, **options: object) -> None:
            assert options["start_new_session"]

        def communicate(self, timeout: float) -> tuple[str, None]:
            if not signals:
                raise subprocess.TimeoutExpired("pytest", timeout)
            return "what it found", None

        def poll(self) -> int:
            return self.returncode

    monkeypatch.setattr(checks.subprocess, "Popen", Process)
    monkeypatch.setattr(checks.os, "killpg", lambda group, number: signals.append(number))
    assert checks.interrupted_after(5.0, ["pytest"], {}) == ("what it found", 2)
    assert signals == [signal.SIGINT]


def test_what_is_not_installed_is_told(monkeypatch):
    monkeypatch.setattr(checks.shutil, "which", lambda name: None)
    assert checks.sanitizer("memcheck") == ("not installed", True)
    assert checks.profile() == "not installed"
    assert checks.versions()["ncu"] == "not installed"


def test_a_profiler_that_does_not_work_says_why(monkeypatch):
    monkeypatch.setattr(checks.shutil, "which", lambda name: f"/bin/{name}")
    output = "==PROF== x\n==ERROR== LibraryNotLoaded\n"
    monkeypatch.setattr(checks.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess((), 1, stdout=output))
    assert checks.profile() == "does not work here: LibraryNotLoaded"


def test_the_filter_finds_every_kernel_of_this_project_alone():
    pattern = re.compile(checks.KERNELS.removeprefix("regex:"))
    folder = Path(checks.__file__).parents[2] / "kernels" / "dfad_kernels" / "gpu"
    names = [name for path in folder.glob("*.py") for name in re.findall(r"def (\w+_kernel)\(", path.read_text())]
    assert len(names) >= 19
    assert all(pattern.match(name) for name in names)
    assert not any(map(pattern.match, ("vectorized_elementwise_kernel", "_ZN7cutlass6KernelE", "triton_poi_fused_0")))
