"""One step over the parameters of ResNet-18: PyTorch's optimizers, and NVIDIA apex's where they are installed."""

from typing import Any

import pytest
import torch

from bench.device import DEVICE, ON_GPU
from dfad.config import OptimizerConfig
from dfad.engine import wait_for
from dfad.engine.optimizers import apex_optimizer, require_apex, torch_optimizer
from dfad.errors import ConfigurationError
from dfad.models import resnet18


@pytest.mark.parametrize("name", ["sgd", "adam"])
@pytest.mark.parametrize("contender", ["unfused", "ours", "apex"])
def test_step(benchmark: Any, name: str, contender: str) -> None:
    parameters = list(resnet18().to(DEVICE).parameters())
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    config = OptimizerConfig(name=name, weight_decay=5e-4)  # type: ignore[arg-type]
    if contender == "apex":
        try:
            require_apex(DEVICE)
        except ConfigurationError as error:
            pytest.skip(str(error))
        optimizer = apex_optimizer(config, parameters)
    else:
        optimizer = torch_optimizer(config, parameters, DEVICE, fused=contender == "ours")

    def step() -> None:
        optimizer.step()
        wait_for(DEVICE)

    benchmark.group = f"optimizer step of ResNet-18, {name}"
    benchmark.extra_info["contender"] = contender
    benchmark.pedantic(step, rounds=50 if ON_GPU else 10, warmup_rounds=3)
