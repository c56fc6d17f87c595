"""Comparison of a placed network with the plain one, before the first round.

A part of the engine that changes the results by more than rounding explains is left out for that network.
"""

from __future__ import annotations

import io
import logging
import math
import random
from collections.abc import Callable, Sequence
from contextlib import nullcontext, redirect_stderr
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from dfad.copies import copy_network, in_float32
from dfad.errors import ModelError, first_line
from dfad.modes import set_mode
from dfad.trees import tree_leaves

if TYPE_CHECKING:
    from dfad.engine.placement import Placement

log = logging.getLogger(__name__)

Values = dict[str, Tensor]

MODES = ((True, 1), (False, 1), (True, 2), (False, 2))
"""The compared passes: whether in training mode, and the seed of their random numbers."""

AGAIN = ", the second time"
"""What distinguishes the results of the second passes by name."""

PERTURBATION = 1e-6
"""Relative perturbation of the images; its effect in float32 is the tolerance for rounding."""

UNSTEADY = 0.1
"""Relative change of a result that a perturbation of that size never explains."""

FLOOR = 1e-3
"""Share of the largest norm of its kind, the least scale at which a value is compared: it may be mere rounding."""

FLOOR_WITHIN = {False: 0.0, True: 0.03}
"""The same for a parameter's gradient within its module, without and with autocast: that of a bias before a BatchNorm
is a sum whose terms cancel, and those of bfloat16 do so badly."""

MARGIN = 4.0
"""Tolerance for a placed network, as a multiple of the rounding of plain PyTorch."""

REWRITING = ("fold_batchnorm", "weights", "cast_weights", "fuse_batchnorm", "fuse_convolutions")
"""The parts that need a plain network."""


class Comparison:
    """Comparison of a network with parts of the engine against the plain one.

    Args:
        placement: of the network; it arranges copies of it with parts, and logs which are left out.
        input_shape: of one input, without the batch.
        batch_size: of the rounds.
        read: converts what the network returns to tensors, or raises.
    """

    def __init__(
        self, placement: Placement, input_shape: tuple[int, ...], batch_size: int, read: Callable[[Any], Any]
    ) -> None:
        self.placement = placement
        self.engine = placement.engine
        self.name = placement.name
        self.read = read
        # few, so that all of it takes less than two rounds
        count = batch_size if "compile" in placement.parts else max(2, min(4, batch_size // 5))
        self.shape = (count, *input_shape)
        self.modes = [(training, seed) for training, seed in MODES if placement.learns or not training]

    def choose(self, parts: list[str]) -> list[str]:
        """The parts that do not change the network's results.

        Raises:
            ConfigurationError: if a part that is explicitly on changes them.
            ModelError: if the plain network fails.
        """
        placement = self.placement
        try:
            self.plain = self._copied()
        except Exception as error:  # whatever a user's attributes raise
            reason = f"it cannot be copied to be compared ({type(error).__name__}: {first_line(error)})"
            for part in parts:
                if part != "precision":
                    placement.leave_out(part, reason)
            return [part for part in parts if part == "precision"]
        self.exact = self._check_plain()
        self.scales = {autocast: _scales(self.exact, within) for autocast, within in FLOOR_WITHIN.items()}
        if not parts:
            return parts
        self.rounds = "precision" in parts
        self._measure(again=not placement.is_plain)
        unsteady = any(name.startswith("output") and noise > UNSTEADY for name, noise in self.noise.items())
        if not unsteady and self._difference(parts) is None:
            return parts
        if unsteady or self._difference([]) is not None:
            reason = "its results differ from call to call with the same random numbers, so it cannot be compared"
            for part in parts:
                if part in REWRITING:
                    placement.leave_out(part, reason)
            parts = [part for part in parts if part not in REWRITING]
        kept: list[str] = []
        for part in parts:
            if part in ("weights", "cast_weights") and "precision" not in kept:
                continue
            reason_against = self._difference([*kept, part])
            if reason_against is None:
                kept.append(part)
            else:
                placement.leave_out(part, reason_against)
        return kept

    def _copied(self) -> nn.Module:
        return in_float32(copy_network(self.placement.network), copied=False, announced=False).to(self.engine.device)

    def _plain_again(self) -> nn.Module:
        """A plain copy that has not run."""
        if not self.placement.is_plain:
            return self._copied()
        given = self.placement.network.buffers()
        with torch.no_grad():
            for buffer, value in zip(self.plain.buffers(), given, strict=True):
                buffer.copy_(value)
        return self.plain

    def _check_plain(self) -> Values:
        try:
            values = self._run(self.plain, watched=True)
        except ModelError:
            raise
        except Exception as error:
            raise ModelError(
                f"Before the first round {self.name} fails on {self.shape[0]} inputs of random numbers, with gradients "
                f"of them: {type(error).__name__}: {first_line(error)}."
            ) from error
        broken = [name for name, value in values.items() if name.startswith("output") and not value.isfinite().all()]
        if broken:
            raise ModelError(
                f"Before the first round {self.name} returns NaN or infinity for inputs of random numbers. Look at its "
                "weights, and at what it divides by or takes the logarithm of."
            )
        if self.placement.learns and not any(name.startswith("gradient of a parameter") for name in values):
            raise ModelError(
                f"Before the first round no gradient reaches a parameter of {self.name}, so that it cannot learn. Look "
                "for torch.no_grad, detach() or NumPy in its forward pass."
            )
        if not any(name.startswith("gradient of the input") for name in values):
            log.warning("No gradient flows through %s to its input; the generator learns nothing from it.", self.name)
        return values

    def _measure(self, *, again: bool) -> None:
        """Measure what rounding changes in plain PyTorch; the second passes are taken to be like the first if need be.

        Args:
            again: also measure the second passes.
        """
        self.measured_again = again
        self.noise = self._noise(self._run(self._plain_again(), perturbed=True, again=again), autocast=False)
        self.rounding = self._rounding() if self.rounds else {}

    def _noise(self, values: Values, *, autocast: bool) -> dict[str, float]:
        measured = self._names(again=self.measured_again)
        errors = {name: self._error(name, values.get(name), autocast) for name in measured}
        return {name: errors[name if name in errors else name.removesuffix(AGAIN)] for name in self.exact}

    def _names(self, *, again: bool) -> list[str]:
        return [name for name in self.exact if again or not name.endswith(AGAIN)]

    def _rounding(self) -> dict[str, float]:
        try:
            values = self._run(self._plain_again(), autocast=True, again=self.measured_again)
        except Exception:  # the part itself will raise it again, and be left out
            return {}
        return self._noise(values, autocast=True)

    def _difference(self, parts: Sequence[str]) -> str | None:
        """How the results of a network with these parts differ; None if they do not."""
        single = [part for part in parts if part not in ("precision", "weights", "compile")]
        # another comparison has the second passes
        again = not self.placement.is_plain or not {"precision", "compile"} & set(parts)
        difference = self._difference_in(single, autocast=False, again=again) if single or not parts else None
        if difference is None and "precision" in parts:
            difference = self._difference_in(parts, autocast=True)
        elif difference is None and "compile" in parts:
            difference = self._difference_in(parts, autocast=False)
        return difference

    def _difference_in(self, parts: Sequence[str], *, autocast: bool, again: bool = True) -> str | None:
        try:
            # also for small features, because rounds have larger batches
            placed = self.placement.arrange(self._copied(), parts, smallest=0)
            with redirect_stderr(io.StringIO()):  # where graphs print what they raise
                values = self._run(placed, autocast=autocast, channels_last=self.engine.channels_last, again=again)
        except Exception as error:  # a network that is called differently may raise anything
            return f"it raises {type(error).__name__}: {first_line(error)}"
        difference = self._unexplained(values, autocast=autocast, again=again)
        if difference is not None and not self.measured_again:
            self._measure(again=True)
            difference = self._unexplained(values, autocast=autocast, again=again)
        return difference

    def _unexplained(self, values: Values, *, autocast: bool, again: bool) -> str | None:
        """A difference that rounding does not explain."""
        for name in self._names(again=again):
            exact, found = self.exact[name], values.get(name)
            if found is None and name.startswith("state") and not self.placement.learns:
                continue  # of a BatchNorm that is folded
            deviation = self._error(name, found, autocast)
            allowed = MARGIN * self.noise[name] + (1e-2 if name.startswith("gradient") else 1e-3)
            if autocast:
                allowed += MARGIN * self.rounding.get(name, 0.0) + (0.1 if name.startswith("gradient") else 0.03)
            if not deviation <= allowed:
                scale = (
                    ""
                    if exact.numel() == 0
                    else f" by {min(deviation, 1e9):.1%}, where rounding explains {allowed:.1%}"
                )
                return f"it changes {name}{scale}"
        return None

    def _error(self, name: str, found: Tensor | None, autocast: bool) -> float:
        exact = self.exact[name]
        if found is None or found.shape != exact.shape:
            return float("inf")
        difference = _norm(found - exact)
        if not math.isfinite(difference):
            finite, nan = exact.isfinite(), exact.isnan()
            if not torch.equal(finite, found.isfinite()) or not torch.equal(nan, found.isnan()):
                return float("inf")
            difference = _norm(torch.where(finite, found.double() - exact.double(), 0.0))
        scale = self.scales[autocast][name]
        return difference / scale if scale else float(difference > 0)

    def _run(
        self,
        network: nn.Module,
        *,
        autocast: bool = False,
        perturbed: bool = False,
        channels_last: bool = False,
        watched: bool = False,
        again: bool = True,
    ) -> Values:
        values: Values = {}
        for training, seed in self.modes:
            if seed > 1 and not again:
                continue
            where = f"in {'training' if training else 'eval'} mode" + AGAIN * (seed > 1)
            set_mode(network, training=training)
            inputs = self._inputs(seed, perturbed, channels_last)
            # not leaves, which may not be written; copies, of which it shows
            with torch.enable_grad():
                given = inputs.to(self.engine.dtype if autocast else inputs.dtype, copy=True)
            before = given.detach().clone() if watched else None
            for key, value in self._pass(network, inputs, given, seed, autocast).items():
                values[f"{key} {where}"] = value
            if before is not None and not torch.equal(before, given):
                self.placement.writes_inputs = True
        return values

    def _inputs(self, seed: int, perturbed: bool, channels_last: bool) -> Tensor:
        stream = torch.Generator().manual_seed(seed)
        inputs = torch.randn(self.shape, generator=stream)
        if perturbed:
            inputs = inputs * (1 + PERTURBATION * torch.randn(self.shape, generator=stream))
        if channels_last and inputs.ndim == 4:
            inputs = inputs.contiguous(memory_format=torch.channels_last)  # as the generator makes them
        return inputs.to(self.engine.device).requires_grad_()

    def _pass(self, network: nn.Module, inputs: Tensor, given: Tensor, seed: int, autocast: bool) -> Values:
        torch.default_generator.manual_seed(seed)  # torch.manual_seed asks devices that are not used, too
        if inputs.is_cuda:
            torch.cuda.manual_seed_all(seed)
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002 the stream that networks draw from
        with torch.enable_grad():
            with self.engine.autocast() if autocast else nullcontext():
                outputs = [leaf for leaf in tree_leaves(self.read(network(given))) if isinstance(leaf, Tensor)]
            outputs = [output for output in outputs if output.is_floating_point()]
            values = {f"output, number {i}": output.detach().float().cpu() for i, output in enumerate(outputs)}
            differentiable = [output for output in outputs if output.requires_grad]
            upstream = torch.Generator().manual_seed(seed)
            gradients = [
                torch.randn(output.shape, generator=upstream).to(output) / max(output.numel(), 1) ** 0.5
                for output in differentiable
            ]
            if differentiable:
                torch.autograd.backward(differentiable, gradients)
        tensors = {"gradient of the input, once": inputs.grad}
        tensors |= {f"gradient of a parameter, {name}": p.grad for name, p in network.named_parameters()}
        tensors |= {f"state, {name}": buffer for name, buffer in network.named_buffers()}
        for parameter in network.parameters():
            parameter.grad = None
        return values | {name: _real(t.detach()).cpu().clone() for name, t in tensors.items() if t is not None}


def _scales(values: Values, within: float) -> dict[str, float]:
    """The scale of each value's deviation: its norm, or a share of the largest norm of its kind or in its module."""
    lengths = {name: _length(value) for name, value in values.items()}
    largest: dict[tuple[str, ...], float] = {}
    for name, length in lengths.items():
        for group in (_kind(name), _module(name)):
            largest[group] = max(largest.get(group, 0.0), length)
    return {
        name: max(length, FLOOR * largest[_kind(name)], within * largest[_module(name)])
        for name, length in lengths.items()
    }


def _kind(name: str) -> tuple[str]:
    return (name.partition(",")[0],)


def _module(name: str) -> tuple[str, ...]:
    """Of a parameter's gradient, what it shares with the others of its module and pass; of another value, itself."""
    kind, _, rest = name.partition(", ")
    parameter, _, where = rest.partition(" in ")
    return (kind, parameter.rpartition(".")[0], where) if kind == "gradient of a parameter" else (name, "")


def _real(value: Tensor) -> Tensor:
    return (torch.view_as_real(value) if value.is_complex() else value).float()


def _length(value: Tensor) -> float:
    """The norm of the finite elements."""
    norm = _norm(value)
    return norm if math.isfinite(norm) else _norm(torch.where(value.isfinite(), value, 0.0))


def _norm(value: Tensor) -> float:
    return float(torch.linalg.vector_norm(value, dtype=torch.float64))
