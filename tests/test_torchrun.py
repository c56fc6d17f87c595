"""``torchrun -m dfad.train`` as a user meets it: what survives and what is refused; losses in the hands of others."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from dfad.losses import ActivationBoundaryLoss, BatchNormStatisticsLoss, Discrepancy, InterpolatedKLDivLoss
from dfad.ranks import TIME_LIMIT
from tests.ranks import run_ranks
from tests.test_train_command import SMALL, assert_same_networks, environment, lines_of, wait_until

RANKS = 2


def command(*given: object) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
    return [*launcher, "--max-restarts=1", "-m", "dfad.train", *SMALL, "--no_evaluate", *map(str, given)]


def start(*given: object, cwd: Path) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    variables = environment(**{TIME_LIMIT: "60"})
    return subprocess.Popen(command(*given), cwd=cwd, env=variables, stdout=pipe, stderr=pipe, text=True)


def process_of_rank(launcher: int, rank: int) -> int:
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    variables = {int(child): Path(f"/proc/{child}/environ").read_bytes().split(b"\0") for child in children}
    return next(child for child, given in variables.items() if f"RANK={rank}".encode() in given)


@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
def test_a_rank_that_is_killed_is_started_again_and_ends_with_the_same_bits(tmp_path):
    arguments = ("--method.rounds=12", "--run_dir")
    with start(*arguments, "killed", cwd=tmp_path) as process:
        wait_until(lambda: lines_of(tmp_path / "killed" / "metrics.jsonl") >= 3, process)
        os.kill(process_of_rank(process.pid, 1), signal.SIGKILL)
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    with start(*arguments, "whole", cwd=tmp_path) as process:
        output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert output.count("Distilled without data") == 1  # the first rank's
    assert lines_of(tmp_path / "whole" / "metrics.jsonl") == 12
    assert_same_networks(tmp_path / "killed", tmp_path / "whole")


def test_a_batch_that_ranks_do_not_divide_is_one_error(tmp_path):
    with start("--method.batch_size=10", "--run_dir=run", cwd=tmp_path) as process:
        _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "exitcode  : 2 " in errors  # of the ranks; the launcher's own is 1
    assert "rank 1: " not in errors
    assert "batch_size is 10, and 2 ranks share it" in errors
    assert not (tmp_path / "run").exists()


class Small(nn.Module):
    """A student of logits and one tap."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        features = self.convolution(images)
        tap = self.norm(features)
        return self.head(F.relu(tap).mean(dim=(2, 3))), tap, features


def losses(outputs: tuple[Tensor, Tensor, Tensor], norm: nn.BatchNorm2d, *, fused: bool) -> Tensor:
    logits, tap, features = outputs
    stream = torch.Generator().manual_seed(9)
    teacher_logits, teacher_tap = (torch.randn(x.shape, generator=stream) for x in (logits, tap))
    return (
        Discrepancy("kl", 4.0, fused=fused)(logits, teacher_logits)
        + InterpolatedKLDivLoss(fused=fused)(logits, teacher_logits, 0.3)
        + ActivationBoundaryLoss(fused=fused)(tap, teacher_tap)
        + BatchNormStatisticsLoss([norm], fused=fused)([features])
    )


def gradients(wrap: Any, *, fused: bool = True) -> dict[str, Tensor]:
    """Of a network in eval mode, on the same images on every rank: so they are those of one process."""
    torch.manual_seed(7)
    network = Small().eval()
    norm = nn.BatchNorm2d(4)
    wrapped = wrap(network)
    images = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(8))
    losses(wrapped(images), norm, fused=fused).backward()
    found = {}
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None
        gradient = parameter.grad
        found[name] = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
    return {name: gradient.detach().clone() for name, gradient in found.items()}


def in_the_hands_of_others() -> dict[str, dict[str, Tensor]]:
    mesh = torch.distributed.init_device_mesh("cpu", (RANKS,))
    return {
        "DistributedDataParallel": gradients(DistributedDataParallel),
        "fully_shard": gradients(lambda network: fully_shard(network, mesh=mesh)),
    }


@pytest.fixture(scope="module")
def in_others_hands(tmp_path_factory) -> list[dict[str, dict[str, Tensor]]]:
    return run_ranks(RANKS, in_the_hands_of_others, tmp_path_factory.mktemp("others"))


@pytest.mark.parametrize("wrapper", ["DistributedDataParallel", "fully_shard"])
def test_losses_work_in_the_hands_of_others(wrapper, in_others_hands):
    expected = gradients(lambda network: network, fused=False)
    for rank in in_others_hands:
        for name, gradient in expected.items():
            torch.testing.assert_close(rank[wrapper][name], gradient, rtol=1e-4, atol=1e-6)
