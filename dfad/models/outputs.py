"""The outputs of a network."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dfad.errors import ModelError

LOGITS = ("logits", "out", "output")
"""Names of the entry that holds the logits, in the order in which they are looked for."""

HALF = (torch.float16, torch.bfloat16)


class Outputs(NamedTuple):
    """Logits and taps: the outputs of every network of this project."""

    logits: Tensor
    """Class scores before softmax, ``(B, classes)``."""

    taps: tuple[Tensor, ...] = ()
    """Pre-activation feature maps ``(B, channels, height, width)`` at the end of each stage: after BatchNorm and the
    addition of the shortcut, before ReLU."""


def as_outputs(result: Any) -> Outputs:
    """Converts what a network returned to :class:`~dfad.models.taps.Outputs`; plain logits have no taps.

    In a tuple, mapping or object with several entries, :func:`logits_entry` finds the logits. Logits in half precision
    become float32 outside of autocast.

    Raises:
        ModelError: if it holds no logits.
    """
    taps: tuple[Tensor, ...] = ()
    if isinstance(result, Outputs):
        result, taps = result
    logits = result if isinstance(result, Tensor) else logits_entry(result)[1]
    if logits.dtype in HALF and not torch.is_autocast_enabled(logits.device.type):
        logits = logits.float()
    return Outputs(logits, taps)


def logits_entry(result: Any) -> tuple[str, Tensor]:
    """Name and tensor of the logits in what a network returned: the entry of that name (:data:`LOGITS`), else its first
    matrix.

    Args:
        result: a tuple, list, mapping, or dataclass such as Hugging Face's ``ModelOutput``.

    Raises:
        ModelError: if none of its entries is a tensor ``(batch, classes)``.
    """
    entries = dict(_entries(result))
    if isinstance(entries.get("logits"), Tensor):
        return "logits", entries["logits"]
    found = matrices(result)
    for name in (*LOGITS, *found):
        if name in found:
            return name, found[name]
    shapes = ", ".join(f"{name}: {_shape(value)}" for name, value in entries.items())
    raise ModelError(
        f"A network returned a {type(result).__name__}{f' of {shapes}' if shapes else ''}; it must return logits, a "
        "tensor (batch, classes), alone or in a tuple, a mapping or an object, or dfad.models.taps.Outputs."
    )


def matrices(result: Any) -> dict[str, Tensor]:
    """What may be logits among the entries of what a network returned."""
    return {
        name: value
        for name, value in _entries(result)
        if isinstance(value, Tensor) and value.ndim == 2 and value.is_floating_point()
    }


def _entries(result: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(result, Mapping):
        yield from ((str(name), value) for name, value in result.items())
    elif isinstance(result, (tuple, list)):
        names = getattr(result, "_fields", None) or map(str, range(len(result)))
        yield from zip(names, result, strict=False)
    elif dataclasses.is_dataclass(result):
        yield from ((field.name, getattr(result, field.name, None)) for field in dataclasses.fields(result))
    elif isinstance(getattr(result, "logits", None), Tensor):
        yield "logits", result.logits


def _shape(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__
