"""PyTorch's internal state of modules, tensors and threads that decides whether a graph represents a network.

There is no public access to hooks, to versions of tensors, or to what intercepts operations.
"""

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_globals

CHECKED_WITH = ("2.11", "2.13")
"""Versions of PyTorch for which the hooks of ``nn.Module`` and autograd were checked."""

HOOKS = (
    *("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks"),
    *("_state_dict_pre_hooks", "_state_dict_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"),
)
GLOBAL_HOOKS = (
    "_global_forward_pre_hooks",
    "_global_forward_hooks",
    "_global_backward_pre_hooks",
    "_global_backward_hooks",
)
PARAMETER_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")


@functools.cache
def missing() -> tuple[str, ...]:
    """Names that this version of PyTorch lacks; what they would show is then unknown."""
    places: dict[Any, tuple[str, ...]] = {
        nn.Module(): HOOKS,
        module_globals: GLOBAL_HOOKS,
        torch.Tensor: (*PARAMETER_HOOKS, "_version"),
        torch._C: ("_len_torch_function_stack",),
        getattr(torch._C, "_autograd", None): ("_top_saved_tensors_default_hooks",),
    }
    return tuple(name for place, names in places.items() for name in names if not hasattr(place, name))


def has_hooks(module: nn.Module) -> bool:
    """Whether a module has hooks on its calls or on its state."""
    return any(getattr(module, hooks, None) for hooks in HOOKS)


def hooks_for_all_modules() -> bool:
    """Whether hooks are registered for all modules."""
    return any(getattr(module_globals, hooks) for hooks in GLOBAL_HOOKS)


def parameter_has_hooks(parameter: Tensor) -> bool:
    """Whether a parameter has gradient hooks."""
    return any(getattr(parameter, hooks, None) for hooks in PARAMETER_HOOKS)


def version(tensor: Tensor) -> int:
    """Version of a tensor: the number of writes to it."""
    return tensor._version


def interceptors() -> tuple[Any, ...]:
    """Active modes and hooks that intercept operations or saved tensors, as checkpointing and offloading use."""
    return torch._C._len_torch_function_stack(), torch._C._autograd._top_saved_tensors_default_hooks(True) is None
