"""What a forward pass changes besides its result: random streams, and the state of its modules."""

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from dfad.engine import internals


@dataclass(frozen=True)
class Snapshot:
    """State that a forward pass may change, in a form that can be compared."""

    draws: Any
    attributes: dict[str, Any]

    @classmethod
    def of(cls, network: nn.Module) -> "Snapshot":
        """The state of a network now."""
        return cls(_random_state(), {name: _attributes(module) for name, module in network.named_modules()})

    def difference(self, after: "Snapshot") -> str | None:
        """What a forward pass between the two has changed, as a clause; None if it is nothing."""
        if self.draws != after.draws:
            return "its forward pass draws random numbers in Python"
        if self.attributes.keys() != after.attributes.keys():
            return "its forward pass changes its modules"
        for path, before in self.attributes.items():
            now = after.attributes[path]
            changed = [key for key in (*before, *now) if before.get(key) != now.get(key)]
            if changed:
                return f"its forward pass changes {f'{path}.' if path else ''}{changed[0]}"
        return None


def _random_state() -> tuple[Any, ...]:
    _, keys, *position = np.random.get_state()  # noqa: NPY002 the stream that networks draw from
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    streams = (state.numpy().tobytes() for state in (torch.get_rng_state(), *cuda))
    return random.getstate(), np.asarray(keys).tobytes(), *position, *streams


def _attributes(module: nn.Module) -> dict[str, Any]:
    """Attributes of a module and values of its class."""
    own = {key: value for key, value in vars(module).items() if key not in ("_parameters", "_buffers", "_modules")}
    classes = [kind for kind in type(module).__mro__ if kind.__module__.partition(".")[0] not in ("torch", "builtins")]
    shared = {
        key: value
        for kind in classes
        for key, value in vars(kind).items()
        if isinstance(value, (int, float, str, list, dict, set, Tensor))
    }
    children = dict(nn.Module.named_children(module))
    named = {**shared, **own, **own_parameters(module), **own_buffers(module), **children}
    return {key: _fingerprint(value, 3) for key, value in named.items()}


class _Same:
    """A value that is compared by identity; the reference keeps its address from being reused."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.value is self.value

    __hash__ = None  # type: ignore[assignment]


_SCALARS = (type(None), bool, int, float, complex, str, bytes)


def _fingerprint(value: Any, depth: int) -> Any:
    if type(value) in _SCALARS:  # most values of most modules
        return type(value), repr(value)
    if isinstance(value, fx.Proxy):  # before it is asked for its type
        return _Same(value)
    if isinstance(value, _SCALARS):
        return type(value), repr(value)
    if isinstance(value, (list, tuple)) and depth:
        return type(value), [_fingerprint(entry, depth - 1) for entry in value]
    if isinstance(value, (set, frozenset)):
        return type(value), sorted(map(repr, value))
    return _Same(value), _content(value, depth)


def _content(value: Any, depth: int) -> Any:
    if isinstance(value, Tensor):
        return internals.version(value)
    if isinstance(value, (nn.Module, type)):
        return None
    if isinstance(value, dict):
        entries = value.items() if depth else ()
        return [(_fingerprint(key, 0), _fingerprint(entry, depth - 1)) for key, entry in entries]
    if isinstance(value, torch.Generator):
        return value.get_state().numpy().tobytes()
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, np.random.Generator):
        return repr(value.bit_generator.state)
    if isinstance(value, np.ndarray):
        return value.tobytes()
    attributes = getattr(value, "__dict__", None)
    return _content(attributes, depth - 1) if isinstance(attributes, dict) and depth else None


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Those of a module itself, under each of their names; whatever its class makes of such questions."""
    return dict(nn.Module.named_parameters(module, recurse=False, remove_duplicate=False))


def own_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Likewise."""
    return dict(nn.Module.named_buffers(module, recurse=False, remove_duplicate=False))
