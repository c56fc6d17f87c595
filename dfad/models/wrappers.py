"""Wrappers that change only the call of a network, not the names in it."""

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from dfad.models.outputs import as_outputs

CHECKED_WITH = ("2.11", "2.13")
"""Versions of PyTorch for which ``nn.Module``'s storage of these, and its moves to a device, were checked."""


class SameNetwork(nn.Module):
    """Another call for a network: modules, parameters, buffers, their names and the mode are the network's own.

    Args:
        network: shared, but not a submodule, which would give names a prefix.
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
    """A network that returns logits, made from one that returns a tuple, a mapping or an object with them.

    Args:
        network: unchanged in :attr:`network`; :func:`dfad.models.outputs.as_outputs` lists what it may return.
    """

    def __reduce__(self) -> tuple[Callable[..., nn.Module], tuple[Any, ...]]:
        return LogitsAlone, (self.network,)

    def forward(self, images: Tensor) -> Tensor:
        """``(B, classes)``."""
        return as_outputs(self.network(images)).logits
