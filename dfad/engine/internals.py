"""What PyTorch keeps of a module, a tensor and the thread that decides whether a graph is all of a network.

There is no public way to ask for hooks, for versions of tensors, nor for what intercepts operations.
"""

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_globals

CHECKED_WITH = ("2.11", "2.13")
"""Versions of PyTorch whose ``nn.Module`` and autograd were read for where hooks are."""

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
    """Names that this version of PyTorch has not; of what they would show nothing is known then."""
    places: dict[Any, tuple[str, ...]] = {
        nn.Module(): HOOKS,
        module_globals: GLOBAL_HOOKS,
        torch.Tensor: (*PARAMETER_HOOKS, "_version"),
        torch._C: ("_len_torch_function_stack",),
        getattr(torch._C, "_autograd", None): ("_top_saved_tensors_default_hooks",),
    }
    return tuple(name for place, names in places.items() for name in names if not hasattr(place, name))


def has_hooks(module: nn.Module) -> bool:
    """Whether anything is called together with a module, or with its state."""
    return any(getattr(module, hooks, None) for hooks in HOOKS)


def hooks_for_all_modules() -> bool:
    """Whether anything is called together with each module that there is."""
    return any(getattr(module_globals, hooks) for hooks in GLOBAL_HOOKS)


def parameter_has_hooks(parameter: Tensor) -> bool:
    """Whether anything is called with a parameter's gradient."""
    return any(getattr(parameter, hooks, None) for hooks in PARAMETER_HOOKS)


def version(tensor: Tensor) -> int:
    """How often a tensor was written."""
    return tensor._version


def interceptors() -> tuple[Any, ...]:
    """What sees operations or saved tensors before PyTorch: modes that are entered; checkpointing, offloading."""
    return torch._C._len_torch_function_stack(), torch._C._autograd._top_saved_tensors_default_hooks(True) is None
