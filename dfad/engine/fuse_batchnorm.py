"""BatchNorms in training mode computed together with the addition and the activation after them."""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from dfad.engine.multi_tensor import add_to_all
from dfad.engine.rewriting import (
    Rewriting,
    call_rewritten,
    replace_with_following,
    say_once,
    without_identities,
)
from dfad.engine.tracing import Parts, Trace, plain_parts
from dfad_kernels import batch_norm
from dfad_kernels.registration import compute_dtype

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
        call_rewritten(traced, fused, in_training=True, afterwards=functools.partial(_count_all, counted))


def _count_all(counted: list[nn.BatchNorm2d]) -> None:
    """Count a batch of each, all at once."""
    if counted:
        count_batch(*counted)
        counted.clear()
