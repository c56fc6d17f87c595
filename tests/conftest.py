"""Small networks and settings that the tests share."""

import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from dfad import models
from dfad.config import (
    ActivationConfig,
    DistillConfig,
    EngineConfig,
    GeneratorConfig,
    InterpolationConfig,
    MethodConfig,
    RecordingConfig,
    RegularizerConfig,
    SelectionConfig,
)
from tests.hubs import timm, torchvision, transformers  # noqa: F401

IMAGE_SHAPE = (1, 8, 8)

RUN_FILES = {
    "config.yaml", "metrics.jsonl", "tensorboard", "checkpoint.pt", "checkpoint-previous.pt", "result.json",
    "student.safetensors", "student_best.safetensors", "generator.safetensors", "samples.png", "curves.png",
    "samples", "report.html",
}  # fmt: skip
"""Names in the folder of a finished run."""

if not torch.cuda.is_available() and "triton" not in sys.modules:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported, whichever test does that

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts what runs in its background
    signal.signal(signal.SIGINT, signal.default_int_handler)  # or no child process of a test could be interrupted

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # workers that each take all cores wait for one another


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fill new memory with NaN, so that unwritten elements show."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # without it, the next line has no effect
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def log_handlers() -> Iterator[None]:
    """Remove a command's log handlers after its test, because their streams are closed by then."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory) -> Path:
    """One cache folder for all workers and their subprocesses, so that the digits' teacher is trained once."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cache"
    os.environ["DFAD_CACHE"] = str(folder)
    return folder


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real data and trained networks: ``$DFAD_DATA``, or ``shared/data`` beside the checkout."""
    folder = Path(os.environ.get("DFAD_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"the development data are not in {folder}; set DFAD_DATA")
    return folder


@pytest.fixture
def teacher() -> nn.Module:
    """A small network whose BatchNorms have seen data; in train mode, which no caller may rely on."""
    torch.manual_seed(1)
    network = models.convnet(channels=(8, 16), num_classes=4, in_channels=1)
    with torch.no_grad():
        for _ in range(20):
            network(torch.randn(32, *IMAGE_SHAPE))
    return network


@pytest.fixture
def student() -> nn.Module:
    """Narrower than the teacher, so that its taps need connectors."""
    torch.manual_seed(2)
    return models.convnet(channels=(4, 8), num_classes=4, in_channels=1)


@pytest.fixture
def config() -> DistillConfig:
    """A whole run in a second, every part of the method in use; one precision wherever the tests run."""
    return DistillConfig(
        device="cpu",
        engine=EngineConfig(precision="float32"),
        generator=GeneratorConfig(noise_dim=8, width=4),
        method=MethodConfig(
            rounds=6,
            student_steps=2,
            batch_size=16,
            activation=ActivationConfig(weight=0.1, generator_weight=0.05),
            interpolation=InterpolationConfig(weight=0.5),
            regularizers=RegularizerConfig(batchnorm=0.1, one_hot=0.2, diversity=0.3),
        ),
        selection=SelectionConfig(bank_size=32, every=2),
        recording=RecordingConfig(log_every=2, checkpoint_every=2),
    )


def with_method(config: DistillConfig, **changes) -> DistillConfig:
    """A configuration with other settings of the method."""
    return replace(config, method=replace(config.method, **changes))


@contextmanager
def threads(number: int) -> Iterator[None]:
    """Let PyTorch compute on so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
