"""Optimizers that can be part of a CUDA graph, and that a loss scaler may skip a step of."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dfad.config import EngineConfig, OptimizerConfig
from dfad.engine import Engine
from dfad.engine.optimizers import load_optimizer_state, torch_optimizer

CPU = torch.device("cpu")
each_kind = pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])


def optimizer_of(
    name: str, *, fused: bool = True, capturable: bool = True
) -> tuple[nn.Parameter, torch.optim.Optimizer]:
    parameter = nn.Parameter(torch.ones(3))
    config = OptimizerConfig(name=name, lr=0.1)  # type: ignore[arg-type]
    optimizer = torch_optimizer(config, [parameter], CPU, fused=fused, capturable=capturable)
    parameter.grad = torch.full((3,), 2.0)
    return parameter, optimizer


@pytest.fixture
def capturing(monkeypatch) -> None:
    """Make PyTorch assume that the current stream is being captured."""
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *_, **__: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda *_: SimpleNamespace(is_capturing=lambda: True))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)


@pytest.mark.usefixtures("capturing")
class TestUnderCapture:
    @each_kind
    def test_steps_are_captured(self, name):
        parameter, optimizer = optimizer_of(name)
        optimizer.step()
        assert (parameter < 1).all()

    @pytest.mark.parametrize("name", ["adam", "adamw"])
    def test_without_the_option_pytorch_refuses(self, name):
        _, optimizer = optimizer_of(name, capturable=False)
        with pytest.raises(RuntimeError, match="capturable is False"):
            optimizer.step()

    @each_kind
    def test_a_checkpoint_does_not_take_the_option_away(self, name):
        """Neither the learning rate nor the step counts keep the device of the checkpoint."""
        _, written = optimizer_of(name, fused=False, capturable=False)
        with pytest.MonkeyPatch.context() as elsewhere:
            elsewhere.setattr(torch.accelerator, "current_accelerator", lambda *_, **__: None)
            elsewhere.setattr(torch.cuda, "is_available", lambda: False)
            written.step()
        parameter, optimizer = optimizer_of(name)
        rate = optimizer.param_groups[0]["lr"]
        load_optimizer_state(optimizer, written.state_dict())
        assert optimizer.param_groups[0]["lr"] is rate
        assert optimizer.param_groups[0]["fused"]
        assert optimizer.param_groups[0].get("capturable", True)
        optimizer.step()
        assert (parameter < 1).all()
        assert optimizer.state[parameter].get("step", torch.tensor(2.0)).item() == 2


def test_only_an_engine_with_graphs_pays_for_it():
    parameter = nn.Parameter(torch.ones(3))
    engine = Engine(EngineConfig(precision="float32", fused_optimizers="on"), fused=True, device=CPU)
    for engine.cuda_graph in (False, True):
        optimizer = engine.optimizer(OptimizerConfig(name="adam"), [parameter])
        assert optimizer.param_groups[0]["capturable"] == engine.cuda_graph


@each_kind
@pytest.mark.parametrize("overflows", [1, 2])
def test_steps_that_overflow_leave_no_trace(name, overflows):
    """New memory is NaN here, so memory that a skipped first step does not initialise would show."""
    expected, plain = optimizer_of(name)
    plain.step()
    parameter, optimizer = optimizer_of(name)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for factor in (*[torch.inf] * overflows, 2.0):
        optimizer.zero_grad()
        scaler.scale((parameter * factor).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
    torch.testing.assert_close(parameter, expected)


def test_momentum_of_zero_is_no_momentum_yet():
    steps = []
    for fused in (False, True):
        parameter, optimizer = optimizer_of("sgd", fused=fused)
        for _ in range(3):
            optimizer.step()
        steps.append(parameter.detach())
    assert torch.equal(*steps)
