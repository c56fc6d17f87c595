"""Mixing coefficients."""

import pytest
import torch

from dfad.distillation.beta import CHECKED_WITH, symmetric_beta


def test_the_private_sampler_is_the_one_that_was_checked():
    """Look its signature up in a newer version, then name that."""
    assert torch.__version__.rpartition(".")[0] in CHECKED_WITH
    assert str(torch.ops.aten._sample_dirichlet.default._schema) == (
        "aten::_sample_dirichlet(Tensor self, Generator? generator=None) -> Tensor"
    )


@pytest.mark.parametrize("concentration", [0.3, 1.0, 4.0])
def test_has_the_moments_of_the_distribution(concentration):
    drawn = symmetric_beta(torch.full((20_000, 2), concentration), torch.Generator().manual_seed(0))
    assert drawn.shape == (20_000,)
    assert ((drawn >= 0) & (drawn <= 1)).all()
    assert drawn.mean().item() == pytest.approx(0.5, abs=0.01)
    assert drawn.var().item() == pytest.approx(1 / (4 * (2 * concentration + 1)), rel=0.03)


def test_draws_of_its_own_stream_alone():
    before = torch.get_rng_state()
    first, second = (symmetric_beta(torch.ones(5, 2), torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_version_without_it_says_so(monkeypatch):
    monkeypatch.delattr(torch, "_sample_dirichlet")
    with pytest.raises(RuntimeError, match="has no sampler of the Dirichlet distribution.*interpolation.weight 0"):
        symmetric_beta(torch.ones(5, 2), torch.Generator())
