"""Who is who among several processes, and what they say to one another."""

import pytest
import torch

from dfad import ranks
from dfad.errors import ConfigurationError
from dfad.ranks import Ranks


def test_the_way_to_the_store_is_the_one_that_was_checked():
    version = torch.__version__.split("+")[0].rpartition(".")[0]
    assert ranks.CHECKED_WITH[0] <= version <= ranks.CHECKED_WITH[1]
    assert callable(torch.distributed.distributed_c10d._get_default_store)


class TestShares:
    @pytest.mark.parametrize("count", [1, 2, 4])
    def test_a_reversed_share_is_the_share_of_the_reversed_batch(self, count):
        batch = torch.arange(24).view(8, 3)
        for rank in range(count):
            ranks = Ranks(rank, count)
            assert torch.equal(ranks.share(batch).flip(0), ranks.share(batch.flip(0)))

    @pytest.mark.parametrize("count", [1, 2, 4])
    def test_shares_are_the_batch(self, count, monkeypatch):
        batch = torch.arange(24).view(8, 3)
        shares = [Ranks(rank, count).share(batch) for rank in range(count)]
        monkeypatch.setattr(Ranks, "gather", lambda self, share: torch.stack(shares))
        assert torch.equal(Ranks(0, count).whole(shares[0]), batch)

    def test_a_batch_that_ranks_do_not_divide_is_refused(self):
        Ranks(0, 1).require_divides("batch_size", 7)
        with pytest.raises(ConfigurationError, match="batch_size is 50, and 4 ranks share it: .* of 8, .* Give 48"):
            Ranks(0, 4).require_divides("batch_size", 50)


@pytest.mark.parametrize("text", ["0", "-1", "soon", "inf", "nan"])
def test_a_time_limit_that_is_none_is_refused(text, monkeypatch):
    monkeypatch.setenv(ranks.TIME_LIMIT, text)
    with pytest.raises(ConfigurationError, match=f"{ranks.TIME_LIMIT} is '{text}'"):
        ranks.time_limit()
