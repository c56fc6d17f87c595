"""``torchrun -m dfad.train`` as a user meets it: what survives and what is refused; losses in the hands of others."""

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from dfad import train
from dfad.distillation.round import Round
from dfad.losses import ActivationBoundaryLoss, BatchNormStatisticsLoss, Discrepancy, InterpolatedKLDivLoss
from dfad.ranks import TIME_LIMIT
from dfad.runs import checkpoint
from tests.processes import HANGING
from tests.ranks import run_command, run_ranks
from tests.test_train_command import SMALL, assert_same_networks, environment, lines_of, wait_until

RANKS = 2

RUN = [*SMALL, "--no_evaluate", "--run_dir=run"]

ROUNDS = 24

ON_ONE_HOST = ["--standalone", f"--nproc-per-node={RANKS}", "--max-restarts=1"]


def start(
    *given: object, cwd: Path, launch: Sequence[str] = ON_ONE_HOST, within: Sequence[str] = (), **variables: str
) -> subprocess.Popen[str]:
    launcher = [*within, sys.executable, "-m", "torch.distributed.run", *launch, "-m", "dfad.train"]
    return subprocess.Popen(
        [*launcher, *map(str, given)],
        cwd=cwd,
        env=environment(**{TIME_LIMIT: str(HANGING)}, **variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def draw_nothing(rank: int) -> None:
    """As without matplotlib: pictures take longer than these runs."""
    sys.modules["matplotlib.figure"] = None  # type: ignore[assignment]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The folder of an uninterrupted run of ranks on one host."""
    folder = tmp_path_factory.mktemp("whole")
    done = run_command(train.main, [[*RUN, f"--method.rounds={ROUNDS}"]] * RANKS, folder, prepare=draw_nothing)
    assert [rank.exit_code for rank in done] == [0] * RANKS, done
    return folder / "run"


def process_of_rank(launcher: int, rank: int) -> int:
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    variables = {int(child): Path(f"/proc/{child}/environ").read_bytes().split(b"\0") for child in children}
    return next(child for child, given in variables.items() if f"RANK={rank}".encode() in given)


@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
def test_ranks_that_are_killed_started_again_and_stopped_end_with_the_same_bits(whole, tmp_path):
    metrics = tmp_path / "run" / "metrics.jsonl"
    with start(*RUN, f"--method.rounds={ROUNDS}", cwd=tmp_path) as process:
        wait_until(lambda: lines_of(metrics) >= 3, process, every=0.005)
        os.kill(process_of_rank(process.pid, 1), signal.SIGKILL)
        killed_after = lines_of(metrics)
        wait_until(lambda: lines_of(metrics) >= killed_after + 3, process, every=0.005)
        process.terminate()
        _, errors = process.communicate(timeout=HANGING)
    assert process.returncode == 1, errors  # the launcher's; that of the ranks is tested below
    (stopped,) = re.findall(rf"Stopped after round (\d+) of {ROUNDS}\. Continue with --resume run\.", errors)
    assert checkpoint.load(tmp_path / "run")["round"] == int(stopped) == lines_of(metrics) < ROUNDS
    done = run_command(train.main, [["--resume=run"]] * RANKS, tmp_path, prepare=draw_nothing)
    assert [rank.exit_code for rank in done] == [0] * RANKS, done
    assert lines_of(metrics) == ROUNDS
    assert_same_networks(tmp_path / "run", whole)


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """Names of two network namespaces that reach one another as two hosts do, at 10.213.7.1 and 10.213.7.2."""
    names = [f"dfad-{os.getpid()}-{number}" for number in (1, 2)]

    def ip(*given: str) -> None:
        subprocess.run(["ip", *given], check=True, capture_output=True, text=True)

    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("needs iproute2 and root")
    with ExitStack() as stack:
        try:
            for name in names:
                ip("netns", "add", name)
                stack.callback(ip, "netns", "del", name)
            ip("link", "add", "wire", "netns", names[0], "type", "veth", "peer", "name", "wire", "netns", names[1])
            for number, name in enumerate(names, start=1):
                ip("-n", name, "addr", "add", f"10.213.7.{number}/24", "dev", "wire")
                for device in ("lo", "wire"):
                    ip("-n", name, "link", "set", device, "up")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces cannot be made here: {error.stderr.strip()}")
        yield names


def test_two_hosts_end_with_the_bits_of_one(hosts, whole, tmp_path):
    processes = []
    for number, host in enumerate(hosts, start=1):
        (tmp_path / host).mkdir()  # which the other one does not see
        meeting = ["--rdzv-backend=c10d", "--rdzv-endpoint=10.213.7.1:29500", f"--local-addr=10.213.7.{number}"]
        meeting.append(f"--rdzv-conf=is_host={int(number == 1)}")  # both have one hostname, by which it is found out
        process = start(
            *(*RUN, f"--method.rounds={ROUNDS}"),
            cwd=tmp_path / host,
            launch=[f"--nnodes={RANKS}", "--nproc-per-node=1", *meeting],
            within=["ip", "netns", "exec", host],
            GLOO_SOCKET_IFNAME="wire",
        )
        processes.append(process)
    try:
        ended = [process.communicate(timeout=HANGING) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * RANKS, ended
    assert sum(output.count("Distilled without data") for output, _ in ended) == 1
    (found,) = tmp_path.glob("*/run")  # of the first rank, on whichever host that is
    assert_same_networks(found, whole)


def test_a_signal_to_one_rank_stops_all_after_one_checkpoint(tmp_path):
    def stop(ranks: Sequence[BaseProcess]) -> None:
        while lines_of(tmp_path / "run" / "metrics.jsonl") < 2 and ranks[0].is_alive():
            time.sleep(0.001)
        os.kill(ranks[1].pid or 0, signal.SIGTERM)

    first, second = run_command(train.main, [[*RUN, "--method.rounds=1000"]] * RANKS, tmp_path, meanwhile=stop)
    assert (first.exit_code, second.exit_code) == (128 + signal.SIGTERM, 128 + signal.SIGTERM)
    (stopped,) = re.findall(r"Stopped after round (\d+) of 1000", first.errors)
    assert second.errors == ""
    assert checkpoint.load(tmp_path / "run")["round"] == int(stopped)


def fail_in_the_second_round(rank: int) -> None:
    if rank == 1:
        steps = iter([Round.generator_step])
        Round.generator_step = lambda self: next(steps)(self)


def fill_the_disk(rank: int) -> None:
    if rank == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))  # less than a checkpoint


def go_elsewhere(rank: int) -> None:
    if rank == 1:
        os.chdir("/")


@pytest.mark.parametrize(
    ("of_first", "of_second", "message"),
    [
        ("--method.batch_size=10", "--method.batch_size=10", "batch_size is 10, and 2 ranks share it"),
        ("--optimizer.backend=apex", "--optimizer.backend=apex", "optimizer.backend is apex, which runs on CUDA alone"),
        ("--engine.fuse_batchnorm=on", "--engine.fuse_batchnorm=on", "BatchNorms take their statistics of the images"),
        ("--method.rounds=4", "--method.rounds=5", "Rank 1 of 2 has another method.rounds than rank 0"),
    ],
    ids=["batch", "apex", "kernels", "different"],
)
def test_an_error_that_all_have_is_the_first_ranks(of_first, of_second, message, tmp_path):
    given = [[*RUN, "--device=cpu", flag] for flag in (of_first, of_second)]
    first, second = run_command(train.main, given, tmp_path)
    assert (first.exit_code, second.exit_code) == (2, 2)
    assert first.errors.count(message) == 1
    assert second.errors == ""
    assert not (tmp_path / "run").exists()


def test_a_rank_that_fails_is_named_and_says_why(tmp_path):
    first, second = run_command(train.main, [RUN] * RANKS, tmp_path, prepare=fail_in_the_second_round, grace=0.5)
    assert (first.exit_code, second.exit_code) == (8, 1)
    assert "Rank 1 of 2 took no part any more" in first.errors
    assert "rank 1: Traceback" in second.errors
    assert "rank 1: StopIteration" in second.errors


def test_a_full_disk_is_the_first_ranks_error(tmp_path):
    first, second = run_command(train.main, [RUN] * RANKS, tmp_path, prepare=fill_the_disk)
    assert (first.exit_code, second.exit_code) == (4, 8)
    assert "checkpoint.pt cannot be written: File too large" in first.errors
    assert second.errors == ""


def test_a_folder_that_a_rank_does_not_see_is_its_error(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("seed: 0\n")
    given = [["--resume=run", *SMALL]] * RANKS
    first, second = run_command(train.main, given, tmp_path, prepare=go_elsewhere, grace=0.5)
    assert (first.exit_code, second.exit_code) == (8, 2)
    assert "Rank 1 of 2 took no part any more" in first.errors
    assert "rank 1: run holds no config.yaml" in second.errors


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


def gradients(wrap: Any, rank: int, *, fused: bool = True) -> dict[str, Tensor]:
    """Of a network in eval mode, on a rank's images."""
    torch.manual_seed(7)
    network = Small().eval()
    norm = nn.BatchNorm2d(4)
    wrapped = wrap(network)
    images = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(10 + rank))
    losses(wrapped(images), norm, fused=fused).backward()
    found = {}
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None
        gradient = parameter.grad
        found[name] = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
    return {name: gradient.detach().clone() for name, gradient in found.items()}


def in_the_hands_of_others() -> dict[str, dict[str, Tensor]]:
    mesh = torch.distributed.init_device_mesh("cpu", (RANKS,))
    rank = torch.distributed.get_rank()
    return {
        "DistributedDataParallel": gradients(DistributedDataParallel, rank),
        "fully_shard": gradients(lambda network: fully_shard(network, mesh=mesh), rank),
    }


@pytest.fixture(scope="module")
def in_others_hands(tmp_path_factory) -> list[dict[str, dict[str, Tensor]]]:
    return run_ranks(RANKS, in_the_hands_of_others, tmp_path_factory.mktemp("others"))


@pytest.mark.parametrize("wrapper", ["DistributedDataParallel", "fully_shard"])
def test_losses_work_in_the_hands_of_others(wrapper, in_others_hands):
    of_each = [gradients(lambda network: network, rank, fused=False) for rank in range(RANKS)]
    for rank in in_others_hands:
        for name, gradient in rank[wrapper].items():
            average = sum(alone[name] for alone in of_each) / RANKS
            torch.testing.assert_close(gradient, average, rtol=1e-4, atol=1e-6)
            assert all((gradient - alone[name]).abs().max() > 1e-3 for alone in of_each), name
