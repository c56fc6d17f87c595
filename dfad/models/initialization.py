"""Initialization of the networks' weights."""

from torch import nn


def initialize(network: nn.Module) -> None:
    """He et al.'s normal initialization (ICCV 2015) of every convolution, by its fan-out."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
