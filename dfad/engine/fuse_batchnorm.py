"""BatchNorms in training mode computed together with the addition and the activation after them."""

import functools
import logging
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from dfad.engine.calls import present_call, replace_call
from dfad.engine.multi_tensor import add_to_all
from dfad.engine.tracing import Parts, Trace, is_written_in_place, plain_parts
from dfad_kernels import batch_norm
from dfad_kernels.registration import compute_dtype

log = logging.getLogger(__name__)


SMALLEST = 1 << 18
"""Number of elements from which it is faster on a CPU; below, PyTorch's operations have less overhead. On a GPU a round
is captured, and calls cost nothing."""


class FusedBatchNorm(nn.Module):
    """A BatchNorm, the addition of an optional residual, and a leaky ReLU, in as few passes as possible.

    Args:
        norm: provides parameters and statistics, which are updated as the BatchNorm itself would.
        negative_slope: of the leaky ReLU; 1 is none.
        smallest: number of elements; smaller features are computed by PyTorch on a CPU.
        counted: list to which BatchNorms are added whose batch still has to be counted.
    """

    def __init__(
        self, norm: nn.BatchNorm2d, negative_slope: float, smallest: int, counted: list[nn.BatchNorm2d]
    ) -> None:
        super().__init__()
        self.norm = norm
        self.negative_slope = negative_slope
        self.smallest = smallest
        self.counted = counted

    def forward(self, features: Tensor, residual: Tensor | None = None) -> Tensor:
        norm = self.norm
        reason = self._reason_against(features, residual)
        if reason is not None:
            say_once(f"A BatchNorm is computed by PyTorch's own operations: {reason}.")
            y = norm(features)
            y = y if residual is None else y + residual
            return y if self.negative_slope == 1 else F.leaky_relu(y, self.negative_slope)
        assert norm.momentum is not None
        self.counted.append(norm)
        return batch_norm(
            *(features, *statistics_to_move(norm), norm.weight, norm.bias),
            residual=residual,
            momentum=norm.momentum,
            epsilon=norm.eps,
            negative_slope=self.negative_slope,
        )

    def _reason_against(self, features: Tensor, residual: Tensor | None) -> str | None:
        norm = self.norm
        if not norm.training:
            return "it is in eval mode"
        if norm.momentum is None:
            return "its statistics are averages over all batches"
        if features.numel() <= features.shape[1]:
            return "of a single value there is no variance"  # PyTorch's own error
        if not features.is_contiguous(memory_format=torch.channels_last):
            return "its features are not channels last in memory"
        if norm.weight is not None and norm.weight.dtype != compute_dtype(features):
            return "its weights are of another precision"
        if residual is not None and (residual.shape != features.shape or residual.dtype != features.dtype):
            return "what is added to it is of another shape or dtype"
        if features.device.type == "cpu" and features.numel() < self.smallest:
            return f"of fewer than {self.smallest} elements on a CPU it is as fast"
        return None


@functools.cache
def say_once(message: str) -> None:
    """Log once that a call falls back, with the reason."""
    log.info(message)


def statistics_to_move(norm: nn.BatchNorm2d) -> tuple[Tensor | None, Tensor | None]:
    """A BatchNorm's running mean and variance; None if they are not to be updated."""
    return (norm.running_mean, norm.running_var) if norm.track_running_stats else (None, None)


def count_batch(*norms: nn.BatchNorm2d) -> None:
    """Count a batch that updated the running statistics."""
    tracked = (norm.num_batches_tracked for norm in norms if norm.track_running_stats)
    add_to_all([counter for counter in tracked if counter is not None], 1)


def fuse_batchnorm(
    network: nn.Module,
    *,
    refine: Callable[[fx.GraphModule, Trace], object] | None = None,
    smallest: int | None = None,
    parts: Parts = plain_parts,
) -> None:
    """Make a network compute its BatchNorms this way in training mode; parameters, buffers and modules stay the same.

    If a network must not be rewritten as a whole, its plain parts are (:mod:`dfad.engine.tracing`).

    Args:
        network: any.
        refine: further changes to the graph, whose modules are used nowhere else.
        smallest: number of elements from which it is used on a CPU; :data:`SMALLEST` if None.
        parts: finds the plain ones.
    """
    smallest = SMALLEST if smallest is None else smallest
    for traced in parts(network, training=True):
        fused = Rewriting(traced)
        without_identities(fused)
        counted: list[nn.BatchNorm2d] = []
        for node in list(fused.graph.nodes):
            if node.op == "call_module" and str(node.target) in traced.replaceable and node.args:
                norm = fused.get_submodule(str(node.target))
                if type(norm) is nn.BatchNorm2d:
                    made = functools.partial(FusedBatchNorm, norm, smallest=smallest, counted=counted)
                    replace_with_following(fused, node, node.args[0], made, "fused")
        if refine is not None:
            refine(fused, traced)
        call_rewritten(traced, fused, in_training=True, counted=counted)


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
    counted: list[nn.BatchNorm2d] | None = None,
) -> None:
    """Make calls of a network use its rewritten graph, whenever its trace is valid.

    Args:
        traced: the network.
        rewritten: its graph.
        in_training: in training mode alone.
        counted: list of the BatchNorms whose batches a call has to count, all at once.
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
                if counted:
                    count_batch(*counted)
                    counted.clear()
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
