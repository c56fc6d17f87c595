"""Nested inputs and outputs."""

from collections import OrderedDict, namedtuple

import torch

from dfad.trees import CHECKED_WITH, tensors_in, tree_leaves, tree_map


def test_the_private_module_is_the_one_that_was_checked():
    """Look for a public one in a newer version, then name that."""
    assert torch.__version__.rpartition(".")[0] in CHECKED_WITH


def test_leaves_of_what_networks_return():
    Pair = namedtuple("Pair", "first second")
    nested = Pair([1, (2, None)], OrderedDict(a={"b": 3}))
    assert tree_leaves(nested) == [1, 2, None, 3]
    assert tree_map(lambda leaf: leaf and -leaf, nested) == Pair([-1, (-2, None)], OrderedDict(a={"b": -3}))


def test_tensors_of_state_and_attributes():
    class Held:
        tensor = torch.ones(4)

    first, second, third = (torch.ones(n) for n in (1, 2, 3))
    nested = OrderedDict(a=[first, (second, "text")], b={1: third, 2: Held()}, c=None)
    assert [t.numel() for t in tensors_in(nested)] == [1, 2, 3]
