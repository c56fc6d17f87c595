"""Teacher and student on two streams."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from dfad.config import EngineConfig
from dfad.engine import Engine
from dfad.engine.two_streams import TwoStreams
from dfad.errors import ConfigurationError
from tests.engine.test_engine import ALL_OFF, CPU, make


class Stream:
    """Records what it waits for."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def wait_stream(self, other: "Stream") -> None:
        self.log.append(f"{self.name} waits for {other.name}")


@pytest.fixture
def log(monkeypatch) -> list[str]:
    """What the streams were given, in order."""
    log: list[str] = []
    main = Stream("main", log)
    current = [main]

    @contextmanager
    def used(stream: Stream):
        current.append(stream)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("side", log))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: current[-1])
    monkeypatch.setattr(torch.cuda, "stream", used)
    return log


def test_each_runs_on_its_stream_between_a_fork_and_a_join(log):
    def work(name: str) -> str:
        log.append(f"{name} on {torch.cuda.current_stream().name}")
        return name

    streams = TwoStreams(torch.device("cuda"))
    assert streams.both(lambda: work("teacher"), lambda: work("student")) == ("teacher", "student")
    assert log == ["side waits for main", "teacher on side", "student on main", "main waits for side"]


def test_a_round_computes_the_same_bits(log, teacher, config):
    weights = []
    for streams in (None, TwoStreams(torch.device("cuda"))):
        distiller = make(teacher, config)
        distiller.engine._streams = streams
        for _ in range(3):
            distiller.run_round()
        weights.append(distiller.student.state_dict())
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name])
    # a fork and a join in each step of the student, and none in the generator's
    assert log == ["side waits for main", "main waits for side"] * (3 * config.method.student_steps)


def test_the_teacher_takes_no_gradient_there(log, teacher, config):
    distiller = make(teacher, config)
    images = torch.randn(2, 1, 8, 8, requires_grad=True)
    outputs = distiller.teacher.without_gradient(images)
    assert not any(x.requires_grad for x in (outputs.logits, *outputs.taps))


def test_needs_a_graph():
    with pytest.raises(ConfigurationError, match=r"engine\.two_streams is on, but .*engine\.cuda_graph is off"):
        Engine(replace(ALL_OFF, two_streams="on"), fused=True, device=CPU)
    assert not Engine(EngineConfig(precision="float32"), fused=True, device=CPU).two_streams
