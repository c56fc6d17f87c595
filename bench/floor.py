"""The floor of a round: only its convolutions, matrix products and the memory traffic of its optimizers."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bench.device import seconds_of
from dfad.distillation.distiller import Distiller
from dfad.distillation.tensor_memory import TorchDispatchMode
from dfad.models.probing import parameter_count

aten = torch.ops.aten
COUNTED = {aten.convolution, aten.convolution_backward, aten.addmm, aten.mm}
ACCESSES = {"sgd": 5, "adam": 7, "adamw": 7}
"""Reads and writes per parameter in one update: gradient, parameter and moments are read, the last two written."""


class _Recorder(TorchDispatchMode):
    """Counts each distinct call of an operation: its shapes, dtypes and other arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[tuple[Any, ...]] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function.overloadpacket in COUNTED:
            self.calls[(function, *map(_signature, args))] += 1
        return function(*args, **(kwargs or {}))


def _signature(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        # the speed of a product depends on which factor is transposed; the format of images is chosen below
        transposed = argument.ndim == 2 and not argument.is_contiguous()
        return ("tensor", tuple(argument.shape), argument.dtype, transposed)
    return tuple(argument) if isinstance(argument, list) else argument


def _argument(signature: Any, device: torch.device, memory_format: torch.memory_format) -> Any:
    if not (isinstance(signature, tuple) and signature and signature[0] == "tensor"):
        return list(signature) if isinstance(signature, tuple) else signature
    _, shape, dtype, transposed = signature
    if transposed:
        return torch.randn(shape[::-1], device=device).to(dtype).t()
    tensor = torch.randn(shape, device=device).to(dtype)
    return tensor.contiguous(memory_format=memory_format) if tensor.ndim == 4 else tensor


class Floor:
    """Runs the indispensable part of a round: each of its convolutions and matrix products in the faster of the two
    memory formats, and copies of as many bytes as the optimizers move.

    Args:
        distiller: its round is recorded.
    """

    def __init__(self, distiller: Distiller) -> None:
        device = distiller.device
        recorder = _Recorder()
        with recorder:
            distiller.round()
        self.work: list[tuple[Callable[[], object], int]] = []
        for (function, *signatures), count in recorder.calls.items():
            formats = (torch.contiguous_format, torch.channels_last)
            calls = [_call(function, [_argument(s, device, f) for s in signatures]) for f in formats]
            self.work.append((min(calls, key=_seconds), count))
        config = distiller.config
        trained = [
            (config.optimizer.student, [distiller.student, distiller.round.connectors], config.method.student_steps),
            (config.optimizer.generator, [distiller.generator], 1),
        ]
        for optimizer, networks, steps in trained:
            size = ACCESSES[optimizer.name] * sum(parameter_count(network) for network in networks)
            source, target = torch.randn(-(-size // 2), device=device), torch.empty(-(-size // 2), device=device)
            self.work.append((_call(target.copy_, [source]), steps))

    def __call__(self) -> None:
        for call, count in self.work:
            for _ in range(count):
                call()


def _call(function: Callable[..., object], arguments: Sequence[Any]) -> Callable[[], object]:
    return lambda: function(*arguments)


def _seconds(call: Callable[[], object], repetitions: int = 5) -> float:
    call()
    return min(seconds_of(call) for _ in range(repetitions))
