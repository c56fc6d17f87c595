"""Deep copies of any network."""

import copy
from typing import Any

import torch
from torch import nn

from dfad.trees import tensors_in


def copy_network(network: nn.Module, *, share_parameters: bool = False) -> nn.Module:
    """A deep copy of a network that has run.

    PyTorch does not copy tensors that were computed with a gradient. Pruned and weight-normed layers keep such a
    tensor, their weight, and compute it again before each call; the copy gets its value.

    Args:
        network: left as it is.
        share_parameters: the copy shares the network's parameters; everything else is copied.

    Raises:
        Exception: what the network's attributes raise when they are copied.
    """
    memo: dict[int, Any] = {}
    for module in network.modules():
        for tensor in tensors_in(vars(module)):
            if tensor.requires_grad and not tensor.is_leaf:
                memo[id(tensor)] = tensor.detach().clone()
    if share_parameters:
        memo |= {id(parameter): parameter for parameter in network.parameters()}
    with torch.no_grad():  # TorchScript's parameters would be computed from the network's
        copied: nn.Module = copy.deepcopy(network, memo)
    for parameter, original in zip(copied.parameters(), network.parameters(), strict=True):
        if parameter.requires_grad != original.requires_grad:
            parameter.requires_grad = original.requires_grad
    return copied
