"""What networks are given and return: nested lists, mappings and dataclasses, as far as PyTorch knows them."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves as tree_leaves
from torch.utils._pytree import tree_map as tree_map

CHECKED_WITH = ("2.11", "2.13")
"""Versions of PyTorch in which the two were looked up: other libraries register their outputs with this module, which
has no public name."""


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Those of nested lists and mappings of any kind; what other objects hold is theirs."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for entry in value.values():
            yield from tensors_in(entry)
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from tensors_in(entry)
