"""Placement of a network: the engine's form of it on the engine's device, and back.

Before the first round the placed network is compared with the plain one: a part of the engine that changes the results
by more than rounding explains is left out for that network.
"""

from __future__ import annotations

import io
import logging
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from dfad.copies import copy_network, in_float32
from dfad.engine.calls import compile_call, present_call, replace_call, replaced_call
from dfad.engine.cast_weights import cast_in, cast_weights
from dfad.engine.distributed import require_reachable
from dfad.engine.fold_batchnorm import fold_batchnorm
from dfad.engine.fuse_batchnorm import fuse_batchnorm
from dfad.engine.fuse_convolutions import fuse_convolutions
from dfad.engine.fuse_epilogues import fuse_epilogues
from dfad.engine.precision import float32_products
from dfad.engine.tracing import NotPlain, Trace, Traces, calls_are_fixed
from dfad.errors import ConfigurationError, ModelError, first_line, name_of
from dfad.modes import modes_of, random_state_kept, restore_modes, set_mode
from dfad.trees import tree_leaves, tree_map

if TYPE_CHECKING:
    from dfad.engine.engine import Engine

log = logging.getLogger(__name__)

Values = dict[str, Tensor]
Change = Callable[[nn.Module], None]

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


class Placement:
    """A network with those parts of the engine that do not change its results.

    Args:
        engine: provides the parts and the device.
        network: placed by :meth:`take`, plain again after :meth:`give_back`.
        role: its name in messages.
        input_shape: of one input, without the batch; without it, nothing is compared.
        batch_size: of the rounds.
        read: converts what the network returns to tensors, or raises.
        own: parts for this kind of network only: ``fold_batchnorm`` and ``weights``, for frozen networks.
        changes: further parts, each with the function that applies it.

    Raises:
        ConfigurationError: if a part that is explicitly on changes the network's results.
        ModelError: if the plain network fails, or must not be rewritten although that is explicitly on.
    """

    def __init__(
        self,
        engine: Engine,
        network: nn.Module,
        *,
        role: str = "network",
        input_shape: Sequence[int] | None = None,
        batch_size: int = 8,
        read: Callable[[Any], Any] = lambda result: result,
        own: Sequence[str] = (),
        changes: Mapping[str, Change] | None = None,
    ) -> None:
        self.engine = engine
        self.network = network
        self.name = f"the {role} {name_of(network)}"
        self.own = own
        self.changes = dict(changes or {})
        self.learns = any(parameter.requires_grad for parameter in network.parameters())
        self._traces: dict[tuple[str, ...], Traces] = {(): Traces()}
        """By the parts that change the network's graph."""
        self.is_plain = False
        """Whether it is known that each forward pass does the same, in both modes, and changes nothing but buffers."""
        self.parts = self._parts()
        self.writes_inputs = False
        """Whether it changes the images that it is given, which others are to see as well."""
        if input_shape is not None:
            comparison = _Comparison(self, tuple(input_shape), batch_size, read)
            # two orders of the same TF32 products differ by more than rounding explains
            with random_state_kept(), _state_kept(network), float32_products("ieee"):
                self.parts = comparison.choose(self.parts)
        self._before: _State | None = None

    def take(self) -> nn.Module:
        """Place the network; returns what to call instead of it, which may be the network itself."""
        if self._before is None:
            self._before = _State(self.network)
            self.placed = self.arrange(in_float32(self.network, copied=False, announced=False), self.parts)
            self._traces = {(): Traces()}  # its owner may change it before it is placed again
        return self.placed

    def give_back(self) -> None:
        """Restore the network's own call, memory, dtypes, modes and flags, with its current weights. It stays on a GPU
        if it was taken there, and its gradients are dropped."""
        if self._before is not None:
            self._before.restore(keep_device=self.engine.device.type != "cpu")
            self._before = None

    def arrange(self, network: nn.Module, parts: Sequence[str], *, smallest: int | None = None) -> nn.Module:
        """Place a network on the device, with parts of the engine; for ``smallest`` see
        :func:`~dfad.engine.fuse_batchnorm.fuse_batchnorm`."""
        engine = self.engine
        if "fold_batchnorm" in parts:
            folded = fold_batchnorm(network, self._traces[()].whole(network, training=False))
            self._traces.setdefault(("fold_batchnorm",), Traces({False: Trace.of_rewritten(folded)}))
            network = _frozen(folded)
        network.to(engine.device)
        if "channels_last" in parts:
            for tensor in _of_their_own(network):
                if tensor.ndim == 4:
                    # contiguous() would not change tensors of one channel, whose strides fit both formats
                    tensor.data = torch.empty_like(tensor, memory_format=torch.channels_last).copy_(tensor.data)
        for name, change in self.changes.items():
            if name in parts:
                change(network)
        form = tuple(name for name in parts if name == "fold_batchnorm" or name in self.changes)
        plain_parts = self._traces.setdefault(form, Traces()).parts
        if "weights" in parts:
            # cast once; autocast would cast the weights again at each step
            for part in plain_parts(network, training=False):
                for name in part.replaceable:
                    layer = part.network.get_submodule(name)
                    if type(layer) in (nn.Conv2d, nn.Linear):
                        layer.to(engine.dtype)
        if "fuse_convolutions" in parts:
            fuse_convolutions(network, smallest=smallest, parts=plain_parts)
        elif "fuse_batchnorm" in parts and self.learns:
            refine = [cast_in] * ("cast_weights" in parts)
            fuse_batchnorm(network, *refine, smallest=smallest, parts=plain_parts)
        elif "fuse_batchnorm" in parts:
            fuse_epilogues(network, parts=plain_parts)
        elif "cast_weights" in parts:
            cast_weights(network, parts=plain_parts)
        if "compile" in parts:
            compile_call(network, dynamic=False)
        formats = engine.channels_last and "channels_last" not in parts
        exact = engine.dtype != torch.float32 and "precision" not in parts
        if formats or exact or self.writes_inputs:
            _convert_inputs(network, formats=formats, exact=exact, copied=self.writes_inputs)
        return network

    def _parts(self) -> list[str]:
        """The parts that the engine has for such a network, in the order in which they are tried."""
        engine = self.engine
        norms, products = ({type(module) for module in self.network.modules()} & kinds for kinds in (NORMS, PRODUCTS))
        has_epilogues = not self.learns and engine.device.type == "cuda"
        available = {
            "precision": engine.dtype != torch.float32,
            "channels_last": engine.channels_last,
            **{name: getattr(engine, name) for name in self.changes},
            "fold_batchnorm": engine.fold_batchnorm and "fold_batchnorm" in self.own and norms,
            "weights": engine.dtype != torch.float32 and "weights" in self.own and products,
            "cast_weights": engine.cast_weights and self.learns and products,
            "fuse_batchnorm": engine.fuse_batchnorm and (norms or (has_epilogues and nn.Conv2d in products)),
            "fuse_convolutions": engine.fuse_convolutions and nn.Conv2d in products,
            "compile": engine.compile,
        }
        parts = [name for name, there in available.items() if there]
        if self.learns and engine.whole_batch_norms:  # which the engine has said
            require_reachable(self.network, self.name)
            for part in (part for part in parts if part in OWN_NORMS and self._demanded(part)):
                self.leave_out(part, "its BatchNorms take their statistics of the images of all ranks")
            parts = [part for part in parts if part not in OWN_NORMS]
        rewriting = [name for name in parts if name in REWRITING]
        if rewriting:
            try:
                traced = self._traces[()].whole(self.network, training=self.learns)
                self.is_plain = not traced.modes
            except NotPlain as reason:
                demanded = [name for name in rewriting if self._demanded(name)]
                parts_are_plain = next(self._traces[()].parts(self.network, training=self.learns), None) is not None
                if demanded and (demanded[0] == "fold_batchnorm" or not parts_are_plain):
                    raise ModelError(f"engine.{demanded[0]} is on, but {reason} Leave it on auto.") from reason
                log.info("Without %s for %s as a whole: %s", _listed(rewriting), self.name, str(reason))
                parts = [name for name in parts if name != "fold_batchnorm"]
        if "compile" in parts and calls_are_fixed(self.network):
            self.leave_out("compile", "hooks are called in it, which compilation may drop")
            parts.remove("compile")
        return parts

    def _demanded(self, part: str) -> bool:
        if part == "precision":
            return self.engine.config.precision not in ("auto", "float32")
        return getattr(self.engine.config, part, "auto") == "on"

    def leave_out(self, part: str, reason: str) -> None:
        """Log why a part is left out, or raise an error if it is explicitly on."""
        if self._demanded(part):
            value = self.engine.config.precision if part == "precision" else "on"
            raise ConfigurationError(
                f"engine.{part} is {value}, but not for {self.name}: {reason}. Leave it on auto, or switch it off."
            )
        log.info("Without %s for %s: %s.", _listed([part]), self.name, reason)


NORMS = {nn.BatchNorm2d}
PRODUCTS = {nn.Conv2d, nn.Linear}
REWRITING = ("fold_batchnorm", "weights", "cast_weights", "fuse_batchnorm", "fuse_convolutions")
"""The parts that need a plain network."""


OWN_NORMS = ("fuse_batchnorm", "fuse_convolutions", "compile")
"""Parts that compute the BatchNorms of networks that learn in a way of their own, of one rank's images."""


def _listed(parts: Sequence[str]) -> str:
    return ", ".join("weights that are cast once" if part == "weights" else f"engine.{part}" for part in parts)


def _frozen(network: nn.Module) -> nn.Module:
    for parameter in network.parameters():
        parameter.requires_grad = False
    return network


def _convert_inputs(network: nn.Module, *, formats: bool, exact: bool, copied: bool) -> None:
    """Make a network run on contiguous inputs, in float32, or on copies, among networks that do not."""
    call = present_call(network)

    def convert(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        value = value.clone() if copied else value
        value = value.float() if exact else value
        return value.contiguous() if formats else value

    def converting(*inputs: Any, **options: Any) -> Any:
        inputs, options = tree_map(convert, (inputs, options))
        with torch.autocast(inputs[0].device.type, enabled=False) if exact else nullcontext():
            return call(*inputs, **options)

    replace_call(network, converting)


@contextmanager
def _state_kept(network: nn.Module) -> Iterator[None]:
    """Restore a network's buffers and gradients after its copies ran, whose closures may still refer to the network."""
    buffers = [(buffer, buffer.clone()) for buffer in network.buffers()]
    gradients = [(p, None if p.grad is None else p.grad.clone()) for p in network.parameters()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in buffers:
                if not torch.equal(buffer, value):  # BatchNorm updates its statistics without changing their version
                    buffer.copy_(value)
        for parameter, gradient in gradients:
            parameter.grad = gradient


class _State:
    """The state of a network that placing changes, to be restored."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.modes = modes_of(network)
        self.calls = {module: replaced_call(module) for module in (network, *network.modules())}
        self.tensors = [(tensor, tensor.data) for tensor in _tensors(network) if not is_lazy(tensor)]
        """Each with its memory, which its owner may hold under other names, or share with other processes."""
        self.learning = {parameter: parameter.requires_grad for parameter in network.parameters()}

    def restore(self, *, keep_device: bool) -> None:
        for module, call in self.calls.items():
            replace_call(module, call)
        for tensor, before in self.tensors:
            now = tensor.data
            if now.shape != before.shape or before.layout != torch.strided:
                tensor.data = now.to(before.dtype) if keep_device else now.to(before)
            elif keep_device and now.device != before.device:
                tensor.data = torch.empty_like(before, device=now.device).copy_(now)
            elif now.data_ptr() != before.data_ptr() or now.dtype != before.dtype:
                tensor.data = before.copy_(now)
        for parameter, learns in self.learning.items():
            parameter.requires_grad = learns
            parameter.grad = None
        restore_modes(self.modes)


def _tensors(network: nn.Module) -> list[Tensor]:
    return [*network.parameters(), *network.buffers()]


def _of_their_own(network: nn.Module) -> list[Tensor]:
    """The tensors of a network whose memory is no other's of its: the others would move apart."""
    tensors = [tensor for tensor in _tensors(network) if tensor.layout == torch.strided and not is_lazy(tensor)]
    shared = set()
    furthest, owner = -1, -1
    for start, end, number in sorted((*_span(tensor), number) for number, tensor in enumerate(tensors)):
        if start < furthest:
            shared |= {owner, number}
        if end > furthest:
            furthest, owner = end, number
    return [tensor for number, tensor in enumerate(tensors) if number not in shared]


def _span(tensor: Tensor) -> tuple[int, int]:
    """Addresses of a tensor's first byte and of that after its last."""
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (reach + 1) * tensor.element_size() * bool(tensor.numel())


class _Comparison:
    """Comparison of a network with parts of the engine against the plain one."""

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
        """The parts that do not change the network's results."""
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
