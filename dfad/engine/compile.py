"""A network compiled by ``torch.compile``, and the network inside the result."""

import functools
import inspect
from typing import Any

import torch
from torch import nn

CHECKED_WITH = ("2.11", "2.13")
"""Versions of PyTorch for which the result of ``torch.compile`` was checked."""


def compile_call(network: nn.Module, **options: Any) -> None:
    """Compile a network's own call.

    PyTorch compiles a function eight times and then runs it as it is. All networks of a class share that function, so
    that a long-lived process would soon compile none; each gets a count of its own where PyTorch can do so.

    Args:
        network: any.
        options: of :func:`torch.compile`.
    """
    network.compile(**options, **_counted_alone())


@functools.cache
def _counted_alone() -> dict[str, bool]:
    option = "isolate_recompiles"  # which older versions do not have
    return {option: True} if option in inspect.signature(torch.compile).parameters else {}


def uncompiled(network: nn.Module) -> nn.Module:
    """The network inside the result of :func:`torch.compile`; any other network itself."""
    given: nn.Module = getattr(network, "_orig_mod", network)
    return given
