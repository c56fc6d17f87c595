"""Calls that stand in for a network's own."""

import copy
import io

import pytest
import torch
from torch import nn

from dfad.engine.calls import CHECKED_WITH, present_call, replace_call, replaced_call


def test_the_private_attribute_is_the_one_that_was_checked():
    """Read in a newer version where nn.Module looks for it, and that copies and files leave it out; then name that."""
    assert torch.__version__.rpartition(".")[0] in CHECKED_WITH
    assert vars(nn.Module)["_compiled_call_impl"] is None
    network = nn.Identity()
    network.compile(backend="eager")
    assert replaced_call(network) is network._compiled_call_impl is not None


def test_a_call_is_replaced_and_given_back():
    network = nn.Identity()
    before = dict(vars(network))
    assert replaced_call(network) is None
    own = present_call(network)
    replace_call(network, lambda x: 2 * own(x))
    doubled = present_call(network)
    assert replaced_call(network) is doubled
    replace_call(network, lambda x: doubled(x) + 1)
    assert nn.Sequential(network)(3) == 7
    replace_call(network, None)
    assert network(3) == 3
    replace_call(network, None)
    assert dict(vars(network)) == before


def test_copies_and_files_go_without():
    network = nn.Identity()
    replace_call(network, lambda x: x + 1)
    file = io.BytesIO()
    torch.save(network, file)
    file.seek(0)
    for other in (copy.copy(network), copy.deepcopy(network), torch.load(file, weights_only=False)):
        assert replaced_call(other) is None
        assert other(3) == 3
    assert network(3) == 4


def test_a_version_without_it_says_so(monkeypatch):
    network = nn.Identity()
    monkeypatch.delattr(nn.Module, "_compiled_call_impl")
    assert replaced_call(network) is None
    replace_call(network, None)
    with pytest.raises(RuntimeError, match="has no place for a call that replaces a network's own.*--no-fused"):
        replace_call(network, abs)
