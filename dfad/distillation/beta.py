"""The symmetric Beta distribution, drawn from a given random generator."""

import torch
from torch import Tensor

CHECKED_WITH = ("2.11", "2.13")
"""Versions of PyTorch for which the signature of the private sampler was checked."""


def symmetric_beta(concentration: Tensor, rng: torch.Generator) -> Tensor:
    """Numbers between 0 and 1 from the Beta distribution with two equal parameters.

    The first of two Dirichlet components is Beta distributed. PyTorch's public samplers take no generator, so their
    draws can be neither resumed nor replayed in a graph independently of other draws.

    Args:
        concentration: the parameter, ``(..., 2)``, repeated along the last dimension; on the generator's device.
        rng: the random stream.

    Returns:
        ``(...)``.

    Raises:
        RuntimeError: if this version of PyTorch has no such sampler.
    """
    sample = getattr(torch, "_sample_dirichlet", None)
    if sample is None:
        raise RuntimeError(
            f"PyTorch {torch.__version__} has no sampler of the Dirichlet distribution that takes a generator; "
            f"{' and '.join(CHECKED_WITH)} have one. Set --method.interpolation.weight 0, or use one of these."
        )
    drawn: Tensor = sample(concentration, rng)
    return drawn[..., 0]
