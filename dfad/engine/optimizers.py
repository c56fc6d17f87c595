"""Optimizers whose step is one kernel, and whose learning rate lives on the device."""

import importlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from dfad.config import OptimizerConfig
from dfad.errors import ConfigurationError

EXECUTION = ("fused", "foreach", "capturable")
"""Options of parameter groups that affect how a step is computed, not its result."""


def torch_optimizer(
    config: OptimizerConfig,
    parameters: Iterable[nn.Parameter],
    device: torch.device,
    *,
    fused: bool,
    capturable: bool = False,
) -> torch.optim.Optimizer:
    """PyTorch's optimizer of a configuration.

    Args:
        config: kind and hyperparameters.
        parameters: to be optimized, on the device.
        device: of the learning rate, if the step is fused: a Python number would be fixed in a captured graph.
        fused: one kernel per step.
        capturable: a step may be part of a CUDA graph, which Adam's otherwise refuses.
    """
    options: dict[str, Any] = {"weight_decay": config.weight_decay, "fused": fused}
    options["lr"] = torch.tensor(config.lr, device=device) if fused else config.lr
    if config.name == "sgd":
        return with_momentum(torch.optim.SGD(parameters, momentum=config.momentum, **options))
    kind = torch.optim.Adam if config.name == "adam" else torch.optim.AdamW
    return kind(parameters, betas=config.betas, capturable=capturable, **options)


def with_momentum(optimizer: torch.optim.SGD) -> torch.optim.SGD:
    """SGD with momentum buffers that start at zero, which is equivalent to none.

    If a loss scaler skips the first step, the fused kernel leaves new buffers uninitialised and continues from them.
    """
    for group in optimizer.param_groups:
        if group["momentum"] and group["fused"]:
            for parameter in group["params"]:
                if parameter.requires_grad:
                    optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def apex_optimizer(config: OptimizerConfig, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """NVIDIA apex's optimizer of a configuration; see :func:`require_apex`."""
    optimizers = importlib.import_module("apex.optimizers")
    if config.name == "sgd":
        optimizer = optimizers.FusedSGD(
            parameters, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay
        )
    else:
        optimizer = optimizers.FusedAdam(
            parameters,
            lr=config.lr,
            betas=config.betas,
            weight_decay=config.weight_decay,
            adam_w_mode=config.name == "adamw",
        )
    return optimizer


def require_apex(device: torch.device) -> None:
    """Check that NVIDIA apex can be used.

    Raises:
        ConfigurationError: if it is not installed, is another package of that name, or there is no GPU for it.
    """
    way_out = "Install NVIDIA apex from its source with CUDA extensions, or set --optimizer.backend torch."
    if device.type != "cuda":
        raise ConfigurationError(f"optimizer.backend is apex, which runs on CUDA alone, not on {device}. {way_out}")
    try:
        importlib.import_module("apex")
    except ImportError:
        raise ConfigurationError(f"optimizer.backend is apex, which is not installed. {way_out}") from None
    try:
        optimizers = importlib.import_module("apex.optimizers")
        importlib.import_module("amp_C")  # the kernels, missing in a build without CUDA extensions
    except ImportError as error:
        raise ConfigurationError(
            f"optimizer.backend is apex, but the installed package of that name is not NVIDIA's, or was built without "
            f"CUDA extensions ({error}). The apex of the package registry is another project. {way_out}"
        ) from None
    missing = [name for name in ("FusedSGD", "FusedAdam") if not hasattr(optimizers, name)]
    if missing:
        raise ConfigurationError(f"The installed apex has no {' and no '.join(missing)}. {way_out}")


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate without waiting for the device."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Moments and step counts, in the order of the parameters; writing to them in place changes the optimizer."""
    states = (optimizer.state[p] for group in optimizer.param_groups for p in group["params"] if p in optimizer.state)
    return [value for state in states for value in state.values() if isinstance(value, Tensor)]


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load a checkpoint's state, without changing how a step is computed on this device.

    Learning rates stay the same tensors; step counts are moved to where ``fused`` and ``capturable`` need them, also if
    the checkpoint was written on another device.
    """
    own = [{key: group[key] for key in EXECUTION if key in group} for group in optimizer.param_groups]
    rates = [group["lr"] for group in optimizer.param_groups]
    groups = [{**saved, **kept} for saved, kept in zip(state["param_groups"], own, strict=True)]
    optimizer.load_state_dict({**state, "param_groups": groups})
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
