"""Networks in all but their call: what wraps a network without being seen in its names."""

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from dfad.models.outputs import as_outputs

CHECKED_WITH = ("2.11", "2.13")
"""Versions of PyTorch whose ``nn.Module`` was read for where it keeps these, and what moves them to a device."""


class SameNetwork(nn.Module):
    """A network in all but its call: its modules, parameters, buffers, their names and its mode.

    Args:
        network: shared, not a submodule: names would get a prefix.
    """

    network: nn.Module

    def __init__(self, network: nn.Module) -> None:
        training = network.training
        self.__dict__["network"] = network
        super().__init__()
        self._parameters, self._buffers, self._modules = network._parameters, network._buffers, network._modules
        self.training = training

    @property
    def training(self) -> bool:
        """The network's mode."""
        mode: bool = self.__dict__["network"].training
        return mode

    @training.setter
    def training(self, mode: bool) -> None:
        self.__dict__["network"].training = mode

    def train(self, mode: bool = True) -> "SameNetwork":
        self.network.train(mode)
        return self

    def named_modules(self, *args: Any, **options: Any) -> Iterator[tuple[str, nn.Module]]:
        return self.network.named_modules(*args, **options)

    def state_dict(self, *args: Any, **options: Any) -> Any:
        return self.network.state_dict(*args, **options)

    def load_state_dict(self, *args: Any, **options: Any) -> Any:
        return self.network.load_state_dict(*args, **options)

    def _apply(self, *args: Any, **options: Any) -> "SameNetwork":
        self.network._apply(*args, **options)
        return self


class LogitsAlone(SameNetwork):
    """A network that returns logits, made of one that returns a tuple, a mapping or an object that holds them.

    Args:
        network: in :attr:`network` as it was given; see :func:`dfad.models.outputs.as_outputs` for what it may return.
    """

    def __reduce__(self) -> tuple[Callable[..., nn.Module], tuple[Any, ...]]:
        return LogitsAlone, (self.network,)

    def forward(self, images: Tensor) -> Tensor:
        """``(B, classes)``."""
        return as_outputs(self.network(images)).logits
