"""How a network behaves for the length of a block; afterwards it is as before."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

from torch import nn

BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm
"""A layer that normalises with the statistics of the batch, or with those that it kept."""


@contextmanager
def frozen(*networks: nn.Module) -> Iterator[None]:
    """Gradients flow through the networks, but not into their parameters."""
    parameters = [p for network in networks for p in network.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def evaluating(*networks: nn.Module) -> AbstractContextManager[None]:
    """The networks are in eval mode."""
    return _in_mode(networks, training=False)


def training(*networks: nn.Module) -> AbstractContextManager[None]:
    """The networks are in training mode."""
    return _in_mode(networks, training=True)


@contextmanager
def _in_mode(networks: Sequence[nn.Module], *, training: bool) -> Iterator[None]:
    modes = {module: module.training for network in networks for module in network.modules()}
    for network in networks:
        network.train(training)
    try:
        yield
    finally:
        for module, was_training in modes.items():
            module.training = was_training


@contextmanager
def statistics_kept(*networks: nn.Module) -> Iterator[None]:
    """BatchNorms in training mode normalise with the batch, but do not move their running statistics."""
    norms = [
        module
        for network in networks
        for module in network.modules()
        if isinstance(module, BatchNorm) and module.track_running_stats
    ]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
