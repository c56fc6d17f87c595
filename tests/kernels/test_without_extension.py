"""A GPU needs only Triton's kernels: nothing there loads the C++ extension, which takes minutes to build."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

HIDE = "import sys; sys.modules['dfad_kernels._cpu'] = None\n"

RUN = """
import torch
from dfad import models
from dfad.config import DistillConfig, EngineConfig, MethodConfig, OptimizersConfig
from dfad.distillation.distiller import Distiller
from dfad_kernels import kernel_name
networks = [models.convnet(channels=(4, 8), num_classes=4, in_channels=1) for _ in range(2)]
config = DistillConfig(device="cpu", fused=False, method=MethodConfig(rounds=1, batch_size=4, student_steps=1))
assert Distiller(*networks, config, image_shape=(1, 8, 8)).fit().rounds == 1
print(kernel_name("cuda"))
try:
    kernel_name("cpu")
except RuntimeError as error:
    print(str(error).splitlines()[0])
"""


def python(code: str) -> str:
    before = [path for path in [os.environ.get("PYTHONPATH")] if path]  # where the sanitized tests find PyTorch
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "kernels"), str(ROOT), *before])}
    done = subprocess.run(
        [sys.executable, "-c", HIDE + code], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_rounds_run_and_the_kernels_of_a_gpu_are_found() -> None:
    found, reason = python(RUN).splitlines()[-2:]
    assert found == "triton"
    assert "cannot be loaded" in reason


def test_tests_and_benchmarks_of_a_gpu_are_collected() -> None:
    files = [f"tests/{name}" for name in ("kernels/test_gpu.py", "engine/test_cuda_graph.py")]
    files += ["bench/bench_step.py", "bench/bench_ops.py"]
    collected = python(f"import pytest\nraise SystemExit(pytest.main(['--collect-only', '-q', *{files}]))")
    for file in files:
        assert f"{file}::" in collected
