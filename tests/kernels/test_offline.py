"""The Triton kernels, compiled for GPUs without having one."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.kernels.implementations import has_triton
from tests.kernels.tables import document

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")

pytestmark = pytest.mark.skipif(not has_triton, reason="needs triton")


@pytest.mark.parametrize("target", TARGETS)
def test_kernels_compile_to_wide_accesses_without_spills(target: str) -> None:
    channels = importlib.import_module("dfad_kernels.gpu.channels")
    program = Path(__file__).with_name("offline.py")
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_DEFAULT_FP_FUSION": "1"}
    result = subprocess.run(
        [sys.executable, program, target], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    reports: list[dict[str, Any]] = json.loads(result.stdout.splitlines()[-1])
    names = [(report["kernel"], report["dtype"]) for report in reports]
    assert len(set(names)) == len(names) == 32 + 41
    for report in reports:
        assert report["spills"] == report["local_bytes"] == report["int32_offsets"] == 0, report
        # permutations are read with wide loads as well where the layout happens to allow it
        assert report["wide_loads"] >= report["expected_loads"], report
        assert report["expected_loads"] > 0 or report["kernel"].startswith(("combine", "distance,")), report
        assert report["wide_stores"] >= report["expected_stores"], report
        if target.startswith("sm") and report["kernel"].startswith(("moments,", "gradient sums,")):
            stages = channels.STAGES if report["kernel"].startswith("moments") else channels.STAGES_OF_SEVERAL
            assert report["copies"] == stages.value * report["expected_loads"], report
    rows = [[r["kernel"], r["dtype"], r["registers"], r["wide_loads"], r["wide_stores"]] for r in reports]
    document(
        "kernels.md",
        f"registers {target}",
        ["kernel", "dtype", "registers a thread", "128-bit loads", "128-bit stores"],
        rows,
    )
