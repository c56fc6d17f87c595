"""What a test of code for a GPU can watch for on a CPU."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class NoWaiting(TorchDispatchMode):
    """Fails on whatever would make the host wait for a GPU, or copy between devices."""

    WAITING = frozenset(
        (
            "_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "masked_select", "unique", "_unique2",
            "bincount",
            "lift_fresh",  # a tensor of numbers that the host has
        )
    )  # fmt: skip

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        indices = args[1] if name.startswith("index") and isinstance(args[1], list) else []
        by_mask = any(index is not None and index.dtype == torch.bool for index in indices)
        waits = by_mask or name in self.WAITING
        assert not waits, f"{name} waits for the device"
        devices = {value.device for value in args if isinstance(value, Tensor)}
        if devices and kwargs.get("device") is not None:
            devices.add(torch.device(kwargs["device"]))
        if name in ("_to_copy", "copy_"):
            assert len(devices) <= 1, f"{name} copies between devices"
        return function(*args, **kwargs)
