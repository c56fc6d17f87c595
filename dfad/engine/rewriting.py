"""A network's graph rewritten: nodes and what follows them replaced, and the network's calls sent through it."""

import functools
import logging
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from dfad.engine.calls import present_call, replace_call
from dfad.engine.tracing import Trace, is_written_in_place

log = logging.getLogger(__name__)


@functools.cache
def say_once(message: str) -> None:
    """Log once that a call falls back, with the reason."""
    log.info(message)


class Rewriting(fx.GraphModule):
    """The graph of a plain network, to be rewritten. Its code is generated at the end, by :func:`call_rewritten`."""

    finished = False

    def __init__(self, traced: Trace) -> None:
        super().__init__(traced.network, traced.graph, type(traced.network).__name__)

    def recompile(self) -> Any:
        return super().recompile() if self.finished else None


def without_identities(fused: fx.GraphModule) -> None:
    """Let nothing be between a value and what is done to it."""
    for node in list(fused.graph.nodes):
        if node.op == "call_module" and node.args and type(fused.get_submodule(str(node.target))) is nn.Identity:
            node.replace_all_uses_with(node.args[0])
            fused.graph.erase_node(node)


def call_rewritten(
    traced: Trace,
    rewritten: Rewriting,
    *,
    in_training: bool = False,
    afterwards: Callable[[], None] | None = None,
) -> None:
    """Make calls of a network use its rewritten graph, whenever its trace is valid.

    Args:
        traced: the network.
        rewritten: its graph.
        in_training: in training mode alone.
        afterwards: called after each pass through the graph, also where that raises an error.
    """
    rewritten.graph.lint()
    rewritten.finished = True
    rewritten.recompile()
    network = traced.network
    own = present_call(network)

    def call(*inputs: Any, **options: Any) -> Any:
        if (network.training or not in_training) and traced.takes(inputs, options):
            try:
                return rewritten(*inputs)
            finally:
                if afterwards is not None:
                    afterwards()
        return own(*inputs, **options)

    replace_call(network, call)


def replace_with_following(
    fused: fx.GraphModule, first: fx.Node, source: Any, made: Callable[[float], nn.Module], prefix: str
) -> None:
    """Replace a node, and the addition and the activation after it, by one module.

    Args:
        fused: the graph.
        first: the node.
        source: the first input of the module; the second is the residual, or None.
        made: makes the module for the activation's negative slope.
        prefix: of the module's name.
    """
    nodes, residual, slope = following(fused, first)
    name = f"{prefix}_{first.name}"
    fused.add_submodule(name, made(slope))
    with fused.graph.inserting_before(nodes[-1]):
        nodes[-1].replace_all_uses_with(fused.graph.call_module(name, (source, residual)))
    for node in reversed(nodes):
        fused.graph.erase_node(node)


def following(fused: fx.GraphModule, first: fx.Node) -> tuple[list[fx.Node], fx.Node | None, float]:
    """A node with the addition and the activation after it, if nothing else reads the values in between: the nodes, the
    residual, and the activation's negative slope, 1 if there is none."""
    nodes, residual, slope = [first], None, 1.0
    addition = only_user(first)
    if addition is not None:
        residual = addend(first, addition)
        if residual is not None:
            nodes.append(addition)
    activation = only_user(nodes[-1])
    if activation is not None:
        found = negative_slope(fused, activation)
        if found is not None:
            slope = found
            nodes.append(activation)
    if any(is_written_in_place(node, fused) for node in _between(first, nodes[-1]) if node not in nodes):
        return [first], None, 1.0  # the residual may have been overwritten between the first and the last node
    return nodes, residual, slope


def _between(first: fx.Node, last: fx.Node) -> Iterator[fx.Node]:
    node = first
    while node is not last:
        yield node
        node = node.next


def only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def addend(norm: fx.Node, node: fx.Node) -> fx.Node | None:
    """The residual that a node adds to another's output; None if it is no such addition."""
    if node.kwargs or len(node.args) != 2:
        return None
    first, second = node.args
    if node.target in (operator.add, torch.add) and second is norm:
        first, second = second, first
    if node.target not in (operator.add, operator.iadd, torch.add) or first is not norm or second is norm:
        return None
    return second if isinstance(second, fx.Node) else None


def negative_slope(fused: fx.GraphModule, node: fx.Node) -> float | None:
    """The negative slope of a node that is a leaky ReLU, if that is not itself negative; None for other nodes."""
    module = fused.get_submodule(str(node.target)) if node.op == "call_module" else None
    slope: Any = None
    if type(module) is nn.ReLU or node.target in (F.relu, torch.relu, F.relu_, torch.relu_, "relu", "relu_"):
        slope = 0.0
    elif type(module) is nn.LeakyReLU:
        slope = module.negative_slope
    elif node.target is F.leaky_relu:
        slope = node.args[1] if len(node.args) > 1 else node.kwargs.get("negative_slope", 0.01)
    # the sign of what a negative slope gives does not show that of its input
    return float(slope) if isinstance(slope, (int, float)) and slope >= 0 else None
