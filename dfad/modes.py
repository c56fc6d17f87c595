"""Context managers that change how networks behave, and restore it afterwards."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

from torch import nn

BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm
"""A layer that normalises with the statistics of the batch, or with those that it kept."""


@contextmanager
def frozen(*networks: nn.Module) -> Iterator[None]:
    """Let gradients flow through the networks, but not into their parameters."""
    parameters = [p for network in networks for p in network.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def set_mode(network: nn.Module, *, training: bool) -> None:
    """Put a network into training or eval mode; what torch.export made of it has a single mode, and stays in it."""
    try:
        network.train(training)
    except NotImplementedError:  # raised by what was traced in its mode, before the parts beside it were reached
        for part in network.children():
            set_mode(part, training=training)


def evaluating(*networks: nn.Module) -> AbstractContextManager[None]:
    """Put the networks into eval mode."""
    return _in_mode(networks, training=False)


def training(*networks: nn.Module) -> AbstractContextManager[None]:
    """Put the networks into training mode."""
    return _in_mode(networks, training=True)


@contextmanager
def _in_mode(networks: Sequence[nn.Module], *, training: bool) -> Iterator[None]:
    modes = modes_of(*networks)
    for network in networks:
        set_mode(network, training=training)
    try:
        yield
    finally:
        restore_modes(modes)


def modes_of(*networks: nn.Module) -> dict[nn.Module, bool]:
    """The training flag of each module."""
    return {module: module.training for network in networks for module in network.modules()}


def restore_modes(modes: dict[nn.Module, bool]) -> None:
    """Restore the modes that :func:`modes_of` returned."""
    for module, was_training in modes.items():
        if module.training != was_training:
            module.training = was_training


@contextmanager
def statistics_kept(*networks: nn.Module) -> Iterator[None]:
    """Let BatchNorms in training mode normalise with the batch without updating their running statistics."""
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
