"""``python -m tools.gpu.probes``: tests separately, in a few seconds, what a round as a CUDA graph relies on.

The probes run in parallel, each in its own process: one that fails may leave the GPU's context unusable.
"""

import argparse
import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.device import DEVICE, ON_GPU, captured
from bench.rounds import CASES
from dfad.config import EngineConfig
from dfad.distillation.beta import symmetric_beta
from dfad.distillation.distiller import Distiller
from dfad.engine.cuda_graph import WARM_UP_ROUNDS, RoundGraphs

LIMIT = 80.0
"""Seconds for all probes together; what is not finished then counts as failed."""


def mixing_coefficients() -> str:
    """Draws from the symmetric Beta distribution are captured, and each replay draws new numbers."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    concentration = torch.ones(64, 2, device=DEVICE)

    def round_() -> dict[str, Tensor]:
        return {"coefficient": symmetric_beta(concentration, generator)}

    replaying = True
    if ON_GPU:
        graphs = RoundGraphs(DEVICE, required=True)
        # a replay overwrites the result of the previous one
        drawn = [graphs.run(round_, [generator])["coefficient"].clone() for _ in range(WARM_UP_ROUNDS + 3)]
        replaying = graphs.replaying
    else:
        drawn = [round_()["coefficient"] for _ in range(WARM_UP_ROUNDS + 3)]
    expected = torch.Generator(DEVICE).manual_seed(0)
    same = all(torch.equal(x, symmetric_beta(concentration, expected)) for x in drawn)
    assert replaying
    assert len({x.sum().item() for x in drawn}) == len(drawn), "a replay drew what another had drawn"
    return "the same numbers as without a graph" if same else "other numbers than without a graph"


def collector() -> str:
    """Rounds of small networks are captured while the garbage collector runs at every allocation, and their losses stay
    finite."""
    case = CASES[0]
    config = case.config(DEVICE, engine=EngineConfig(cuda_graph="on" if ON_GPU else "off"))
    distiller = Distiller(*case.networks(), config, image_shape=case.image_shape)
    thresholds = gc.get_threshold()
    gc.set_threshold(1)
    try:
        with distiller.engine.running():
            losses = [distiller.run_round()["generator_loss"].item() for _ in range(WARM_UP_ROUNDS + 5)]
    finally:
        gc.set_threshold(*thresholds)
    assert distiller.engine.captured == ON_GPU
    assert torch.tensor(losses).isfinite().all(), losses
    return f"{distiller.engine.precision}, generator losses {losses[0]:.3f} to {losses[-1]:.3f}"


def failed_capture() -> str:
    """After a capture that fails, streams, generators and memory are as before, and another one succeeds."""
    if not ON_GPU:
        return "needs a GPU"
    generator = torch.Generator(DEVICE).manual_seed(0)
    stream = torch.cuda.current_stream()

    def waiting() -> dict[str, Tensor]:
        drawn = torch.rand(4, generator=generator, device=DEVICE) + torch.rand(4, device=DEVICE)
        return {"value": drawn * drawn.sum().item()}

    def working() -> dict[str, Tensor]:
        return {"value": torch.rand(4, generator=generator, device=DEVICE)}

    graphs = RoundGraphs(DEVICE, required=False)
    for _ in range(WARM_UP_ROUNDS + 2):
        graphs.run(waiting, [generator])
    assert not graphs.replaying
    assert torch.cuda.current_stream() == stream
    for _ in range(WARM_UP_ROUNDS + 2):
        graphs.run(working, [generator])
    assert graphs.replaying
    torch.rand(4, device=DEVICE)
    return "the next draw and the next capture succeed"


def convolution_relu() -> str:
    """cuDNN's convolution with bias and ReLU takes channels-last bfloat16, equals the two, and is captured."""
    if not ON_GPU:
        return "needs a GPU"
    x = torch.randn(64, 64, 32, 32, device=DEVICE).bfloat16().contiguous(memory_format=torch.channels_last)
    weight = torch.randn(64, 64, 3, 3, device=DEVICE).bfloat16().contiguous(memory_format=torch.channels_last) / 24
    bias = torch.randn(64, device=DEVICE).bfloat16()

    def fused() -> Tensor:
        return torch.cudnn_convolution_relu(x, weight, bias, [1, 1], [1, 1], [1, 1], 1)

    found = fused()
    torch.testing.assert_close(found, F.relu(F.conv2d(x, weight, bias, padding=1)), rtol=2e-2, atol=2e-2)
    captured(fused)()
    return "channels last" if found.is_contiguous(memory_format=torch.channels_last) else "not channels last"


PROBES: dict[str, Callable[[], str]] = {
    "mixing coefficients in a graph": mixing_coefficients,
    "a failed capture": failed_capture,
    "rounds in a graph while the collector runs": collector,
    "convolution and ReLU by cuDNN": convolution_relu,
}


def run_all() -> dict[str, str]:
    """The result of each probe, by name."""
    command = [sys.executable, "-m", "tools.gpu.probes", "--only"]
    processes = {
        name: subprocess.Popen([*command, name], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for name in PROBES
    }
    deadline = time.monotonic() + LIMIT
    results = {}
    for name, process in processes.items():
        try:
            output, _ = process.communicate(timeout=max(1.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
            output += f"\nnot finished after {LIMIT:.0f} s"
        print(f"--- {name}\n{output}")
        last = output.strip().splitlines()[-1:] or ["it said nothing"]
        results[name] = last[0] if process.returncode == 0 else f"failed: {last[0]}"
    return results


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tools.gpu.probes", description=__doc__.partition("\n")[0])
    parser.add_argument("--only", choices=PROBES, help="run this one here")
    parser.add_argument("--result", type=Path, help="JSON file")
    command = parser.parse_args()
    if command.only:
        print(PROBES[command.only]())
        return
    results = run_all()
    if command.result:
        command.result.write_text(json.dumps(results, indent=1) + "\n")
    failed = [name for name, words in results.items() if words.startswith("failed")]
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
