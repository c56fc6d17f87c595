"""Replacement of a network's call while the engine runs it.

The replacement is stored where ``nn.Module.compile`` stores its own; PyTorch has no public access to that place. The
network's own hooks are not called then, and copies and files of the network do not contain it.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

CHECKED_WITH = ("2.11", "2.13")
"""Versions of PyTorch for which the call of ``nn.Module`` and the result of ``torch.compile`` were checked."""

Call = Callable[..., Any]


def replaced_call(module: nn.Module) -> Call | None:
    """The replacement of a module's call; None if there is none."""
    call: Call | None = getattr(module, "_compiled_call_impl", None)
    return call


def present_call(module: nn.Module) -> Call:
    """The current call of a module: its replacement, or its own."""
    call: Call = replaced_call(module) or module._call_impl
    return call


def replace_call(module: nn.Module, call: Call | None) -> None:
    """Replace a module's call; None restores its own.

    Raises:
        RuntimeError: if this version of PyTorch has no place for it.
    """
    if call is None:
        vars(module).pop("_compiled_call_impl", None)
    elif hasattr(nn.Module, "_compiled_call_impl"):
        module._compiled_call_impl = call
    else:
        raise RuntimeError(
            f"PyTorch {torch.__version__} has no place for a call that replaces a network's own; "
            f"{' and '.join(CHECKED_WITH)} have one. Leave the engine off (--no-fused), or use one of these."
        )


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
