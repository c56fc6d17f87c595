"""Tracing with torch.fx: which networks may be rewritten, and their graphs.

A network is rewritten only if it is plain, that is, if its graph represents everything it does. A graph does not
contain what else modules and Python code may do in a forward pass: call hooks, compute weights, draw random numbers,
change buffers, count calls or switch gradients off.
"""

import copy
import operator
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy

from dfad.copies import copy_network
from dfad.engine import internals
from dfad.engine.calls import replaced_call
from dfad.engine.side_effects import Snapshot, own_buffers, own_parameters
from dfad.errors import ModelError, first_line, name_of
from dfad.modes import evaluating
from dfad.modes import training as in_training
from dfad.seeds import random_state_kept

LAYERS = frozenset(
    (
        *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
        *(nn.Linear, nn.Identity, nn.Embedding, nn.Flatten, nn.Unflatten),
        *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm, nn.LayerNorm, nn.LocalResponseNorm, nn.RMSNorm),
        *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
        *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish),
        *(nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Sigmoid, nn.LogSigmoid, nn.Tanh, nn.Softplus, nn.Softsign),
        *(nn.Softmax, nn.Softmax2d, nn.LogSoftmax, nn.Threshold, nn.GLU),
        *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
        *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
        *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
        *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout),
        *(nn.Upsample, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle),
        *(nn.ZeroPad2d, nn.ConstantPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d, nn.CircularPad2d),
    )
)
"""PyTorch's modules that are nodes of a graph, by exact type; subclasses are traced through."""

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict, fx.GraphModule)
"""PyTorch's modules that are traced through."""


class NotPlain(ModelError):
    """The reason why a network must not be rewritten."""


@dataclass(frozen=True)
class Trace:
    """The graph of a plain network in one mode.

    Its one input is the images; further arguments of the forward pass have their defaults.
    """

    network: nn.Module
    graph: fx.Graph
    modes: dict[nn.Module, bool]
    """Modes of the modules that were traced through, if the graph depends on them; else empty."""
    replaceable: frozenset[str]
    """Names of the layers that are called once and whose parameters are used nowhere else."""

    def holds(self) -> bool:
        """Whether the modules that the graph depends on are in the modes of the trace."""
        return all(module.training == mode for module, mode in self.modes.items())

    def takes(self, inputs: tuple[Any, ...], options: dict[str, Any]) -> bool:
        """Whether the graph may replace a call with these arguments."""
        return len(inputs) == 1 and not options and isinstance(inputs[0], Tensor) and self.holds()

    @classmethod
    def of_rewritten(cls, network: fx.GraphModule) -> "Trace":
        """The trace of what a plain network was rewritten to."""
        return cls(network, network.graph, {}, _replaceable(network, network.graph))

    def of(self, network: nn.Module) -> "Trace":
        """The trace of a copy of the network, with a graph of its own."""
        copies = dict(zip(self.network.modules(), network.modules(), strict=True))
        modes = {copies[module]: mode for module, mode in self.modes.items()}
        return Trace(network, copy.deepcopy(self.graph), modes, self.replaceable)


def trace(network: nn.Module, *, training: bool) -> Trace:
    """The graph of a plain network's forward pass: PyTorch's modules are nodes, others are traced through.

    Args:
        network: not changed; a copy that shares its parameters is traced.
        training: whether it is traced in training mode.

    Raises:
        NotPlain: if the network does anything that a graph cannot represent.
    """
    name = name_of(network)
    if internals.missing():
        names = ", ".join(internals.missing())
        raise NotPlain(f"{name} is not rewritten: PyTorch {torch.__version__} has no {names}, which would show hooks.")
    for path, module in ("", network), *network.named_modules():
        against = reason_to_leave(module)
        if against:
            raise NotPlain(f"{name} is not rewritten: {_place(network, path)}{against}.")
    try:
        scratch = copy_network(network, share_parameters=True)
    except Exception as error:  # whatever a user's attributes raise
        raise NotPlain(f"{name} is not rewritten: it cannot be copied ({_said(error)}).") from error
    with random_state_kept(), torch.enable_grad():
        try:
            with _in_mode(scratch, training):
                modes = {path: module.training for path, module in scratch.named_modules()}
                graph = _graph(scratch)
                if all(type(module) in (*LAYERS, nn.Sequential) for module in scratch.modules()):
                    return Trace(network, graph, {}, _replaceable(network, graph))  # there is no other code in it
                text = str(graph)
                with torch.no_grad(), _all_autocast():  # two traces: a switched global state shows in one of them
                    again = _graph(scratch)
        except _Refusal as reason:
            raise NotPlain(f"{name} is not rewritten: {reason}.") from reason.__cause__
        try:
            with _in_mode(scratch, not training):
                other = str(_graph(scratch))
        except _Refusal:
            other = ""
    if text != str(again):
        raise NotPlain(f"{name} is not rewritten: its forward pass differs from call to call.")
    modules = dict(network.named_modules())
    sensitive = [path for path, module in modules.items() if type(module) not in LAYERS and text != other]
    return Trace(network, graph, {modules[path]: modes[path] for path in sensitive}, _replaceable(network, graph))


def plain_parts(network: nn.Module, *, training: bool) -> Iterator[Trace]:
    """The graph of a plain network; otherwise the graphs of its largest submodules that are plain and whose calls may
    be replaced."""
    if type(network) in LAYERS:  # a single layer has nothing to be fused with
        return
    try:
        yield trace(network, training=training)
    except NotPlain:
        yield from _plain_parts_inside(network, training=training)


def _plain_parts_inside(network: nn.Module, *, training: bool) -> Iterator[Trace]:
    if calls_its_children(network):
        for child in network.children():
            yield from plain_parts(child, training=training)


Parts = Callable[..., Iterator[Trace]]
"""What finds the plain parts of a network: :func:`plain_parts`, or :meth:`Traces.parts`."""


class Traces:
    """Traces of networks that are copies of one another: each is made once, of the first copy that it is asked for.

    Args:
        known: by training mode.
    """

    def __init__(self, known: Mapping[bool, Trace] | None = None) -> None:
        self._wholes: dict[bool, Trace | str] = dict(known or {})
        self._parts: dict[bool, dict[str, Trace]] = {}

    def whole(self, network: nn.Module, *, training: bool) -> Trace:
        """As :func:`trace`."""
        if training not in self._wholes:
            try:
                self._wholes[training] = trace(network, training=training)
            except NotPlain as reason:  # its words: an exception would keep what its frames hold
                self._wholes[training] = str(reason)
        known = self._wholes[training]
        if isinstance(known, str):
            raise NotPlain(known)
        return known.of(network)

    def parts(self, network: nn.Module, *, training: bool) -> Iterator[Trace]:
        """As :func:`plain_parts`."""
        if type(network) in LAYERS:
            return
        try:
            yield self.whole(network, training=training)
        except NotPlain:
            if training not in self._parts:
                paths = {module: path for path, module in network.named_modules()}
                inside = _plain_parts_inside(network, training=training)
                self._parts[training] = {paths[part.network]: part for part in inside}  # a shared one is there once
            for path, part in self._parts[training].items():
                yield part.of(network.get_submodule(path))


def calls_its_children(network: nn.Module) -> bool:
    """Whether a network that is not plain calls its children from Python, so that their calls may be replaced."""
    kind = type(network)
    if calls_are_fixed(network) or hasattr(network, "parametrizations") or replaced_call(network) is not None:
        return False
    containers = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    return kind.__module__.partition(".")[0] != "torch" or isinstance(network, containers)


def calls_are_fixed(network: nn.Module) -> bool:
    """Whether a network registers hooks itself, so that its modules must be called normally."""
    return bool(getattr(network, "calls_are_fixed", False))


def reason_to_leave(module: nn.Module) -> str | None:
    """Why a module must not be rewritten, regardless of its children; None if it may."""
    kind = type(module)
    if isinstance(module, (torch.jit.ScriptModule, torch.jit.ScriptFunction)):
        return "is TorchScript"
    if hasattr(module, "parametrizations"):
        return "has a parametrisation"
    if internals.has_hooks(module):
        return "has hooks"
    if internals.hooks_for_all_modules():
        return "runs while hooks are registered for all modules"
    if calls_are_fixed(module):
        return "registers hooks for each call"
    if "forward" in vars(module) or "__call__" in vars(module):
        return "has a forward that is set on the instance"
    if replaced_call(module) is not None:
        return "is compiled"
    graph = isinstance(module, fx.GraphModule)
    if kind.__getattr__ is not nn.Module.__getattr__ or (kind.__call__ is not nn.Module.__call__ and not graph):
        return f"is a {kind.__name__}, which changes how modules are called"
    for own in own_parameters(module).values():
        if is_lazy(own):
            return "has parameters without a shape"
        if internals.parameter_has_hooks(own):
            return "has a parameter with hooks"
    known = kind in LAYERS or kind is nn.Module or isinstance(module, CONTAINERS)
    if kind.__module__.partition(".")[0] == "torch" and not known:
        return f"is a {kind.__module__.partition('.')[0]} {kind.__name__}, which is not known to be plain"
    return None


def is_written_in_place(node: fx.Node, root: nn.Module) -> bool:
    """Whether a node may overwrite its input."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if node.op == "call_module":
        return bool(getattr(root.get_submodule(str(node.target)), "inplace", False))
    written = node.op in ("call_function", "call_method") and name.endswith("_") and not name.endswith("__")
    operators = (operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.setitem)
    return written or node.target in operators or bool(node.kwargs.get("inplace"))


def _place(network: nn.Module, path: str) -> str:
    return f"its {path} ({type(network.get_submodule(path)).__name__}) " if path else "it "


def _in_mode(network: nn.Module, mode: bool) -> AbstractContextManager[None]:
    return in_training(network) if mode else evaluating(network)


@contextmanager
def _all_autocast() -> Iterator[None]:
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cuda", enabled=torch.cuda.is_available()):
        yield


class _Refusal(Exception):
    """A forward pass does something that its graph would not represent."""


def _graph(scratch: nn.Module) -> fx.Graph:
    tracer = _Tracer()
    before = Snapshot.of(scratch)
    try:
        graph = tracer.trace(scratch)
    except Exception as error:  # tracing runs user code on proxies, which may fail in any way
        raise _Refusal(tracer.reason or f"it cannot be traced by torch.fx ({_said(error)})") from error
    reason = tracer.reason or before.difference(Snapshot.of(scratch))
    if reason:
        raise _Refusal(reason)
    if _context() != tracer.context:
        raise _Refusal("its forward pass changes global settings of PyTorch")
    if any(node.op == "get_attr" and str(node.target).startswith("_tensor_constant") for node in graph.nodes):
        raise _Refusal("its forward pass creates tensors")
    return graph


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


def _replaceable(network: nn.Module, graph: fx.Graph) -> frozenset[str]:
    calls = Counter(str(node.target) for node in graph.nodes if node.op == "call_module")
    owners = {str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}
    uses = Counter(id(tensor) for module in network.modules() for tensor in _own_tensors(module))
    modules = dict(network.named_modules(remove_duplicate=False))
    return frozenset(
        name
        for name, count in calls.items()
        if count == 1 and name not in owners and all(uses[id(tensor)] == 1 for tensor in _own_tensors(modules[name]))
    )


def _own_tensors(module: nn.Module) -> list[Tensor]:
    return [*own_parameters(module).values(), *own_buffers(module).values()]


def _context() -> tuple[Any, ...]:
    """PyTorch's global computation state, which a forward pass may change temporarily, and a graph does not contain."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        *((torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in ("cpu", "cuda")),
        torch.get_default_dtype(),
        *internals.interceptors(),
    )


class _Tracer(fx.Tracer):
    """Refuses operations that a graph would not represent."""

    def __init__(self) -> None:
        super().__init__()
        self.reason: str | None = None
        """Stored, because a forward pass may catch the exception."""
        self.context = _context()

    def refuse(self, reason: str) -> None:
        self.reason = self.reason or reason
        raise _Refusal(reason)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        # a single proxy: for others, `is None` would give another result than in a call
        return root_fn, [self.root, self.create_proxy("placeholder", "images", (), {})]

    def create_node(self, *args: Any, **options: Any) -> fx.Node:
        if _context() != self.context:
            self.refuse(
                "a part of its forward pass turns gradients off, changes the precision, is a torch.autograd.Function, "
                "or uses activation checkpointing"
            )
        return super().create_node(*args, **options)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m) in LAYERS

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _StandIn(node, self)


class _StandIn(fx.Proxy):
    """A proxy that refuses questions for its type, which is not that of the value."""

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # isinstance asks for it
        frame = sys._getframe(1)
        by_torch = str(frame.f_globals.get("__name__", "")).partition(".")[0] == "torch"
        if not by_torch or frame.f_code.co_name == "is_tensor":
            tracer = object.__getattribute__(self, "tracer")
            tracer.refuse(f"its forward pass tests the type of a value (in {frame.f_code.co_name})")
        return _StandIn
