"""Deep copies of any network."""

import copy
import logging
from collections.abc import Iterator
from types import CellType, CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch import nn

from dfad.errors import name_of
from dfad.trees import tensors_in

log = logging.getLogger(__name__)


def copy_network(network: nn.Module, *, share_parameters: bool = False) -> nn.Module:
    """A deep copy of a network that has run.

    PyTorch does not copy tensors that were computed with a gradient. Pruned and weight-normed layers keep such a
    tensor, their weight, and compute it again before each call; the copy gets its value. Python does not copy
    functions: a hook, or the forward of an instance, whose closure holds a part of the network becomes one that holds
    the copied part.

    Args:
        network: left as it is.
        share_parameters: the copy shares the network's parameters; everything else is copied.

    Raises:
        TypeError: if such a function refers to the network by a global name, which a copy cannot change.
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
        for module in copied.modules():
            _rebind(vars(module), memo)
    for parameter, original in zip(copied.parameters(), network.parameters(), strict=True):
        if parameter.requires_grad != original.requires_grad:
            parameter.requires_grad = original.requires_grad
    return copied


def in_float32(network: nn.Module, *, copied: bool, announced: bool = True) -> nn.Module:
    """A network whose floating-point parameters and buffers are float32, as distilling needs them.

    Args:
        network: returned as it is where they are so already.
        copied: cast a copy, and leave the network as it is.
        announced: say in the log that they are cast.
    """
    tensors = [tensor for tensor in (*network.parameters(), *network.buffers()) if tensor.is_floating_point()]
    others = {tensor.dtype for tensor in tensors} - {torch.float32}
    if not others:
        return network
    if announced:
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in others))
        log.info("%s has weights in %s; distilling casts them to float32.", name_of(network), names)
    if copied:
        return in_float32(copy_network(network), copied=False, announced=False)
    for tensor in tensors:  # Module.float() would put other tensors in the place of buffers
        tensor.data = tensor.data.float()
    return network


def _rebind(container: Any, memo: dict[int, Any]) -> None:
    """Let the functions in a copied module's attributes hold what was copied."""
    entries = container.items() if isinstance(container, dict) else enumerate(container)
    for key, entry in list(entries):
        if isinstance(entry, FunctionType):
            container[key] = _rebound(entry, memo)
        elif isinstance(entry, (dict, list)):
            _rebind(entry, memo)


def _rebound(function: FunctionType, memo: dict[int, Any]) -> FunctionType:
    """A function that holds copies where the given one holds originals; itself where it holds none."""
    if id(function) in memo:
        known: FunctionType = memo[id(function)]
        return known
    for name in _global_names(function.__code__):
        if isinstance(function.__globals__.get(name), nn.Module) and id(function.__globals__[name]) in memo:
            raise TypeError(f"its {function.__qualname__} refers to it by the global name {name!r}")
    cells = tuple(CellType() for _ in function.__closure__ or ())
    rebound = FunctionType(function.__code__, function.__globals__, function.__name__, None, cells)
    memo[id(function)] = rebound  # before what it holds, which may be itself
    held = [_held(cell) for cell in function.__closure__ or ()]
    held = [*held, function.__defaults__, function.__kwdefaults__]
    copies = [_copy_of(value, memo) for value in held]
    if all(one is other for one, other in zip(copies, held, strict=True)):
        memo[id(function)] = function
        return function
    *contents, rebound.__defaults__, rebound.__kwdefaults__ = copies
    for cell, value in zip(cells, contents, strict=True):
        if value is not _EMPTY:
            cell.cell_contents = value
    rebound.__dict__.update(function.__dict__)
    rebound.__qualname__ = function.__qualname__
    return rebound


_EMPTY = object()


def _held(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a name without a value yet
        return _EMPTY


def _copy_of(value: Any, memo: dict[int, Any]) -> Any:
    """What was copied of a value with the network; what is not the network's stays itself."""
    if isinstance(value, MethodType):
        return MethodType(value.__func__, _copy_of(value.__self__, memo))
    if isinstance(value, FunctionType):
        return _rebound(value, memo)
    if isinstance(value, (list, tuple)) and id(value) not in memo and type(value) in (list, tuple):
        copies = [_copy_of(entry, memo) for entry in value]
        changed = any(one is not other for one, other in zip(copies, value, strict=True))
        return type(value)(copies) if changed else value
    return memo.get(id(value), value)


def _global_names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _global_names(constant)
