"""Memory of tensors on a CPU, where PyTorch has no counter as on a GPU."""

import weakref
from collections.abc import Sequence
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode

from dfad.trees import tensors_in

CHECKED_WITH = ("2.11", "2.13")
"""Versions of PyTorch for which ``TorchDispatchMode`` was checked: no public module exports it."""


class TensorMemory(TorchDispatchMode):
    """Counts the bytes of new tensors, and the largest number alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(
        self, function: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        self.count(result)
        return result

    def count(self, value: Any) -> None:
        """Count the memory of a tensor, or of all in nested lists and dictionaries, until it is freed; views of one
        storage count once."""
        for tensor in tensors_in(value):
            storage = tensor.untyped_storage()
            address = storage.data_ptr()
            if address not in self._seen:
                self._seen.add(address)
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._free, address, storage.nbytes()).atexit = False

    def _free(self, address: int, size: int) -> None:
        self._seen.discard(address)
        self.live -= size
