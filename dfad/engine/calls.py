"""Replacement of a network's call while the engine runs it.

The replacement is stored where ``nn.Module.compile`` stores its own; PyTorch has no public access to that place. The
network's own hooks are not called then, and copies and files of the network do not contain it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

CHECKED_WITH = ("2.11", "2.13")
"""Versions of PyTorch for which the call of ``nn.Module`` was checked."""

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
