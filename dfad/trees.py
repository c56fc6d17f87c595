"""What networks are given and return: nested lists, mappings and dataclasses, as far as PyTorch knows them."""

from torch.utils._pytree import tree_leaves as tree_leaves
from torch.utils._pytree import tree_map as tree_map

CHECKED_WITH = ("2.11", "2.13")
"""Versions of PyTorch in which the two were looked up: other libraries register their outputs with this module, which
has no public name."""
