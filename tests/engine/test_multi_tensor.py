"""Many tensors in one launch."""

import pytest
import torch

from dfad.engine.multi_tensor import CHECKED_WITH, add_to_all, copy_to_all


def test_the_private_names_are_those_that_were_checked():
    """Look for public ones in a newer version, then name that."""
    assert torch.__version__.rpartition(".")[0] in CHECKED_WITH
    assert torch._foreach_add_
    assert torch._foreach_copy_


@pytest.fixture(params=["one launch", "one by one"])
def each_way(request, monkeypatch):
    if request.param == "one by one":  # as in a version without them
        monkeypatch.delattr(torch, "_foreach_add_")
        monkeypatch.delattr(torch, "_foreach_copy_")


@pytest.mark.usefixtures("each_way")
def test_addition():
    counters = [torch.tensor(3), torch.tensor(5)]
    versions = [counter._version for counter in counters]
    add_to_all(counters, 2)
    assert counters == [torch.tensor(5), torch.tensor(7)]
    assert all(counter._version > version for counter, version in zip(counters, versions, strict=True))
    add_to_all([], 1)


@pytest.mark.usefixtures("each_way")
def test_copies_to_another_dtype():
    sources = [torch.randn(3, 4, 5, 5).contiguous(memory_format=torch.channels_last), torch.randn(7)]
    tensors = [torch.empty_like(source, dtype=torch.bfloat16) for source in sources]
    copy_to_all(tensors, sources)
    for tensor, source in zip(tensors, sources, strict=True):
        assert torch.equal(tensor, source.bfloat16())
    copy_to_all([], [])
