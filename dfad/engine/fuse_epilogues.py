"""What follows a convolution of a frozen network, as one pass: BatchNorm in eval mode or a bias, the
addition of a shortcut, and a (leaky) ReLU. A part of ``engine.fuse_batchnorm``."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from dfad.engine.rewriting import (
    Rewriting,
    call_rewritten,
    following,
    replace_with_following,
    say_once,
    without_identities,
)
from dfad.engine.tracing import Parts, plain_parts
from dfad_kernels import frozen_batch_norm
from dfad_kernels.registration import compute_dtype


class FusedEpilogue(nn.Module):
    """A BatchNorm in eval mode or a bias, the addition of an optional residual, and a leaky ReLU.

    Args:
        norm: provides statistics and parameters, or None.
        bias: ``(channels,)``, added if there is no BatchNorm, or None.
        negative_slope: of the leaky ReLU; 1 is none.
    """

    def __init__(self, norm: nn.BatchNorm2d | None, bias: Tensor | None, negative_slope: float) -> None:
        super().__init__()
        self.norm = norm
        self.bias = None if bias is None else bias.detach().to(compute_dtype(bias))  # cast once, because it is frozen
        self.negative_slope = negative_slope

    def forward(self, features: Tensor, residual: Tensor | None = None) -> Tensor:
        norm = self.norm
        reason = self._reason_against(features, residual)
        if reason is not None:
            say_once(f"What follows a frozen convolution is computed by PyTorch's own operations: {reason}.")
            return self._one_by_one(features, residual)
        if norm is None:
            return frozen_batch_norm(features, bias=self.bias, residual=residual, negative_slope=self.negative_slope)
        return frozen_batch_norm(
            *(features, norm.running_mean, norm.running_var, norm.weight, norm.bias),
            residual=residual,
            epsilon=norm.eps,
            negative_slope=self.negative_slope,
        )

    def _reason_against(self, features: Tensor, residual: Tensor | None) -> str | None:
        norm = self.norm
        if not features.is_contiguous(memory_format=torch.channels_last):
            return "its features are not channels last in memory"
        if residual is not None and (residual.shape != features.shape or residual.dtype != features.dtype):
            return "what is added to it is of another shape or dtype"
        if norm is None:
            same = self.bias is None or self.bias.dtype == compute_dtype(features)
            return None if same else "its bias is of another precision"
        if norm.training:
            return "its BatchNorm is in training mode"
        if any(parameter.requires_grad for parameter in norm.parameters()):
            return "its BatchNorm learns"
        tensors = *norm.parameters(), norm.running_mean, norm.running_var
        if any(tensor is None or tensor.dtype != compute_dtype(features) for tensor in tensors):
            return "its BatchNorm is of another precision"
        return None

    def _one_by_one(self, features: Tensor, residual: Tensor | None) -> Tensor:
        if self.norm is not None:
            features = self.norm(features)
        elif self.bias is not None:
            features = features + self.bias.to(features.dtype).view(-1, 1, 1)
        y = features if residual is None else features + residual
        return y if self.negative_slope == 1 else F.leaky_relu(y, self.negative_slope)


class Unbiased(nn.Module):
    """A convolution without its bias.

    Args:
        convolution: zero-padded; provides the kernel.
    """

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.convolution = convolution

    def forward(self, x: Tensor) -> Tensor:
        own = self.convolution
        return F.conv2d(x, own.weight, None, own.stride, own.padding, own.dilation, own.groups)


def fuse_epilogues(network: nn.Module, *, takes_biases: bool | None = None, parts: Parts = plain_parts) -> None:
    """Make a frozen network compute this way; parameters, buffers and modules stay the same.

    If it must not be rewritten as a whole, its plain parts are (:mod:`dfad.engine.tracing`).

    Args:
        network: any; what learns in it is left as it is.
        takes_biases: also replace what follows plain convolutions, and add their biases there; None: on a GPU. On a CPU
            that gains nothing: PyTorch adds a bias within the convolution.
        parts: finds the plain ones.
    """
    for traced in parts(network, training=False):
        fused = Rewriting(traced)
        without_identities(fused)
        _replace_all(fused, traced.replaceable, takes_biases)
        if any(isinstance(module, FusedEpilogue) for module in fused.children()):
            call_rewritten(traced, fused)


def _replace_all(fused: fx.GraphModule, replaceable: frozenset[str], takes_biases: bool | None) -> None:
    for node in list(fused.graph.nodes):
        if node.op != "call_module" or str(node.target) not in replaceable or len(node.args) != 1 or node.kwargs:
            continue
        module, source = fused.get_submodule(str(node.target)), node.args[0]
        if type(module) is nn.BatchNorm2d and module.running_mean is not None:
            replace_with_following(fused, node, source, partial(FusedEpilogue, module, None), "epilogue")
        elif type(module) is nn.Conv2d and module.padding_mode == "zeros":
            on_gpu = module.weight.device.type == "cuda"
            nodes, residual, _ = following(fused, node)
            learns = module.bias is not None and module.bias.requires_grad
            saves = not learns and len(nodes) > 1 and (module.bias is not None or residual is not None)
            if saves and (on_gpu if takes_biases is None else takes_biases):
                name = f"unbiased_{node.name}"
                fused.add_submodule(name, Unbiased(module))
                with fused.graph.inserting_before(node):
                    source = fused.graph.call_module(name, node.args)
                replace_with_following(fused, node, source, partial(FusedEpilogue, None, module.bias), "epilogue")
