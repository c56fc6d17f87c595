"""What a network does when it is called, replaced for as long as the engine has it.

It stands where ``nn.Module.compile`` puts what it makes; PyTorch has no public way to that place. The network's own
hooks are not called then, and copies and files of it go without.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

CHECKED_WITH = ("2.11", "2.13")
"""Versions of PyTorch whose ``nn.Module`` was read for how it is called, and what ``torch.compile`` returns."""

Call = Callable[..., Any]


def replaced_call(module: nn.Module) -> Call | None:
    """What a module does instead of its own when it is called; None if nothing."""
    call: Call | None = getattr(module, "_compiled_call_impl", None)
    return call


def present_call(module: nn.Module) -> Call:
    """What a module does when it is called, as it is now."""
    call: Call = replaced_call(module) or module._call_impl
    return call


def replace_call(module: nn.Module, call: Call | None) -> None:
    """Let a module do something else when it is called; its own again if None.

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


def uncompiled(network: nn.Module) -> nn.Module:
    """The network that :func:`torch.compile` was given, of what it returned; any other one itself."""
    given: nn.Module = getattr(network, "_orig_mod", network)
    return given
