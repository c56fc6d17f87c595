"""How a round runs on the machine at hand: precision, memory format, optimizers, compilation, CUDA graph.

The trainer says what happens in a round; nothing of how it runs is known there, and nothing of the method here.
"""

import copy
import logging
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dfad.config import EngineConfig, OptimizerConfig, OptimizersConfig, Switch
from dfad.errors import ConfigurationError
from dfad.loading import as_outputs
from dfad.models.taps import BatchNormTaps, Outputs

log = logging.getLogger(__name__)

WARM_UP_ROUNDS = 3
"""Rounds before a capture, so that libraries have chosen algorithms and optimizers have allocated their state."""


class Unavailable(Exception):
    """Why a part of the engine cannot run here."""


class Engine:
    """The parts of the engine that a configuration and a machine admit, and what they do.

    Args:
        config: each part's switch.
        fused: what ``auto`` stands for.
        device: where everything runs.

    Raises:
        ConfigurationError: if a part that is explicitly on cannot run here.
    """

    def __init__(self, config: EngineConfig, *, fused: bool, device: torch.device) -> None:
        self.config = config
        self.fused = fused
        self.device = device
        self.precision = self._choose_precision()
        self.channels_last = self._admit("channels_last", config.channels_last, lambda: None)
        self.fused_optimizers = self._admit("fused_optimizers", config.fused_optimizers, lambda: None)
        self.fold_batchnorm = self._admit("fold_batchnorm", config.fold_batchnorm, lambda: None)
        self.compile = self._admit("compile", config.compile, lambda: None)
        self.cuda_graph = self._admit("cuda_graph", config.cuda_graph, self._check_cuda_graph)
        if self.precision == "tf32" and device.type == "cuda":
            torch.backends.cuda.matmul.fp32_precision = "tf32"
            torch.backends.cudnn.fp32_precision = "tf32"
        # dynamic loss scale, on the device; one for both networks, so that an overflow in one is known to the other
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision == "float16")

    def _admit(self, name: str, switch: Switch, check: Callable[[], None]) -> bool:
        if switch == "off" or (switch == "auto" and not self.fused):
            return False
        try:
            check()
        except Unavailable as reason:
            if switch == "on":
                raise ConfigurationError(
                    f"engine.{name} is on, but cannot run here: {reason}. Leave it on auto, or switch it off."
                ) from None
            log.info("Without engine.%s: %s.", name, reason)
            return False
        return True

    def _check_cuda_graph(self) -> None:
        if self.device.type != "cuda":
            raise Unavailable(f"CUDA graphs need an NVIDIA GPU, and the device is {self.device}")

    def _choose_precision(self) -> str:
        chosen = self.config.precision
        if chosen == "auto":
            if self.fused and has_bfloat16(self.device):
                return "bfloat16"
            if self.fused:
                log.info("Without bfloat16: %s has no such arithmetic in hardware; float32.", self.device)
            return "float32"
        if chosen == "float16" and self.device.type == "cpu":
            raise ConfigurationError(
                "engine.precision is float16, but a CPU computes it slower than float32. "
                "Use bfloat16 or float32 there, or --device cuda."
            )
        return chosen

    @property
    def dtype(self) -> torch.dtype:
        """Of convolutions and matrix products."""
        return {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(self.precision, torch.float32)

    def autocast(self) -> AbstractContextManager[object]:
        """The precision of the networks' forward passes."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def place(self, network: nn.Module) -> nn.Module:
        """A network on the device, in the engine's memory format."""
        network.to(self.device)
        if self.channels_last:
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return network

    def optimizers(
        self, config: OptimizersConfig, student: Iterable[nn.Parameter], generator: Iterable[nn.Parameter]
    ) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
        """The student's and the generator's optimizer, with learning rates that live on the device."""
        return self._optimizer(config.student, student), self._optimizer(config.generator, generator)

    def _optimizer(self, config: OptimizerConfig, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        # a float would be baked into a captured graph
        lr = torch.tensor(config.lr, device=self.device) if self.fused_optimizers else config.lr
        options = {"lr": lr, "weight_decay": config.weight_decay, "fused": self.fused_optimizers}
        if config.name == "sgd":
            return torch.optim.SGD(parameters, momentum=config.momentum, nesterov=False, **options)  # type: ignore[arg-type]
        kind = torch.optim.Adam if config.name == "adam" else torch.optim.AdamW
        return kind(parameters, betas=config.betas, capturable=self.cuda_graph, **options)  # type: ignore[arg-type]

    def set_learning_rate(self, optimizer: torch.optim.Optimizer, lr: float) -> None:
        """Set it without waiting for the device."""
        for group in optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr

    def run(self, round_: Callable[[], Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        """One round."""
        return round_()

    def descend(self, loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
        """One step of an optimizer down the gradient of a loss."""
        optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.step(optimizer)
        self.scaler.update()


def choose_device(name: str) -> torch.device:
    """The device of a name; ``auto`` takes a GPU where there is one.

    Raises:
        ConfigurationError: if it is none, or not to be had here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigurationError(f"There is no device {name!r}. Use auto, cpu, cuda or cuda:N.") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigurationError(f"The device {name!r} is not supported. Use auto, cpu, cuda or cuda:N.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigurationError(
            f"The device {name!r} is not to be had: PyTorch {torch.__version__} sees {torch.cuda.device_count()} GPUs. "
            "Use --device auto or cpu."
        )
    return device


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 in hardware."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) and torch.cpu._is_avx512_bf16_supported()


class FrozenTeacher:
    """A teacher that never learns: eval mode, no parameter gradients, a copy of its own.

    Args:
        teacher: copied, so that the caller's network is left as it was.
        engine: where and how it runs.
    """

    def __init__(self, teacher: nn.Module, engine: Engine) -> None:
        teacher = copy.deepcopy(teacher).eval().requires_grad_(False)
        self.network = engine.place(teacher)
        self.measured = BatchNormTaps(copy.deepcopy(self.network))

    @property
    def norms(self) -> list[_BatchNorm]:
        """Its BatchNorms, in the order of what :meth:`with_statistics` returns of them."""
        return self.measured.norms

    def __call__(self, images: Tensor) -> Outputs:
        """Logits and taps."""
        return as_outputs(self.network(images))

    def with_statistics(self, images: Tensor) -> tuple[Outputs, tuple[Tensor, ...]]:
        """Logits, taps and what reached each BatchNorm."""
        outputs, features = self.measured(images)
        return as_outputs(outputs), features
