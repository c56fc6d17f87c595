"""Networks from factory paths."""

import importlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from inspect import signature
from typing import Any

from torch import nn

from dfad import models
from dfad.errors import ModelError, nearest, unknown
from dfad.models.hubs import hub_of
from dfad.models.taps import with_taps


def build(factory: str, kwargs: Mapping[str, Any] | None = None, taps: Sequence[str] = ()) -> nn.Module:
    """Call a factory of networks.

    Args:
        factory: ``package.module:callable``, the bare name of one in :mod:`dfad.models`, or a hub's name
            (:mod:`dfad.models.hubs`), whose weights are random here.
        kwargs: its keyword arguments.
        taps: names for :func:`dfad.models.taps.with_taps`, for a network that returns logits alone.

    Raises:
        ModelError: if it cannot be imported or called, or does not return an ``nn.Module``.
    """
    arguments = dict(kwargs or {})
    hub = hub_of(factory)
    callable_ = partial(hub[0].build, hub[1], arguments) if hub else partial(resolve(factory), **arguments)
    try:
        network = callable_()
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(
            f"The factory {factory} called with {arguments} failed: {type(error).__name__}: {error}. "
            "Check its keyword arguments (kwargs, a JSON object)."
        ) from error
    if not isinstance(network, nn.Module):
        raise ModelError(
            f"The factory {factory} returned a {type(network).__name__}; it must return a torch.nn.Module."
        )
    return with_taps(network, taps) if taps else network


def remedy_for_classes(factory: str | None, classes: int, flag: str) -> str:
    """What to do about a network with another number of classes, by the arguments of what builds it.

    Args:
        factory: see :func:`build`, or a file; None for a network that was given in Python.
        classes: that it must have.
        flag: of the network on the command line, such as ``--student``.
    """
    if factory is None:
        return f"Build it with {classes} classes."
    try:
        taken = {} if hub_of(factory) else signature(resolve(factory)).parameters
    except (ModelError, ValueError):  # a file, or a callable that does not say
        return f"Name another network, which has {classes}."
    if hub_of(factory) or "num_classes" in taken or any(one.kind is one.VAR_KEYWORD for one in taken.values()):
        return f"Set {flag}.kwargs '{{\"num_classes\": {classes}}}'."
    arguments = f"takes {', '.join(taken)}, and no num_classes" if taken else "takes no arguments"
    return f"{factory} {arguments}: change its code, or name another network, which has {classes}."


def path_of(kind: type) -> str | None:
    """``package.module:Class``, the path for :func:`resolve`; None if the class cannot be imported."""
    path = f"{kind.__module__}:{kind.__qualname__}"
    if kind.__module__ == "__main__":  # differs from program to program
        return None
    try:
        return path if resolve(path) is kind else None
    except ModelError:
        return None


def resolve(factory: str) -> Callable[..., Any]:
    """The callable of a factory path: ``package.module:callable``, or the bare name of one in :mod:`dfad.models`.

    Raises:
        ModelError: if it cannot be imported, or is not callable.
    """
    module_name, _, attribute = factory.partition(":")
    if not attribute:
        if factory not in models.__all__:
            message = unknown("network", factory, models.__all__)
            raise ModelError(f"{message} Your own is named package.module:callable.")
        return getattr(models, factory)
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:  # a user's module may fail in any way while it is imported
        raise ModelError(
            f"The factory {factory} cannot be imported: {type(error).__name__}: {error}. "
            "It is written package.module:callable, and the package must be in the working directory, on PYTHONPATH or "
            "installed."
        ) from error
    for name in attribute.split("."):
        if not hasattr(found, name):
            raise ModelError(f"The module {module_name} has no {attribute!r}.{nearest(name, dir(found))}")
        found = getattr(found, name)
    if not callable(found):
        raise ModelError(f"The factory {factory} is a {type(found).__name__}; it must be callable.")
    return found
