"""Placement of a network: the engine's form of it on the engine's device, and back."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from dfad.copies import in_float32
from dfad.engine.calls import present_call, replace_call, replaced_call
from dfad.engine.cast_weights import cast_in, cast_weights
from dfad.engine.channels_last import to_channels_last
from dfad.engine.comparison import REWRITING, Comparison
from dfad.engine.compile import compile_call
from dfad.engine.distributed import require_reachable
from dfad.engine.fold_batchnorm import fold_batchnorm
from dfad.engine.fuse_batchnorm import fuse_batchnorm
from dfad.engine.fuse_convolutions import fuse_convolutions
from dfad.engine.fuse_epilogues import fuse_epilogues
from dfad.engine.precision import float32_products
from dfad.engine.tracing import NotPlain, Trace, Traces, calls_are_fixed
from dfad.errors import ConfigurationError, ModelError, name_of
from dfad.modes import modes_of, restore_modes
from dfad.seeds import random_state_kept
from dfad.trees import tree_map

if TYPE_CHECKING:
    from dfad.engine.engine import Engine

log = logging.getLogger(__name__)

Change = Callable[[nn.Module], None]


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
            comparison = Comparison(self, tuple(input_shape), batch_size, read)
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
            to_channels_last(network)
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
            refine = cast_in if "cast_weights" in parts else None
            fuse_batchnorm(network, refine=refine, smallest=smallest, parts=plain_parts)
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
