"""The precision of convolutions and matrix products."""

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch

from dfad.config import Precision
from dfad.errors import ConfigurationError

log = logging.getLogger(__name__)


def choose_precision(wanted: Precision, device: torch.device, *, fused: bool) -> Precision:
    """The precision to use; ``auto`` is bfloat16 if the hardware supports it and ``fused`` is on, else float32.

    Raises:
        ConfigurationError: if the device does not support it.
    """
    if wanted == "auto":
        if not fused:
            return "float32"
        if has_bfloat16(device):
            return "bfloat16"
        log.info("Without bfloat16: %s does not compute it in hardware; float32.", device)
        return "float32"
    if wanted in ("float16", "tf32") and device.type == "cpu":
        raise ConfigurationError(
            f"engine.precision is {wanted}, which a CPU does not compute in hardware. Use bfloat16 or float32 "
            "there, or --device cuda."
        )
    return wanted


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 in hardware."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return bool(torch.cpu.get_capabilities().get("avx512_bf16", False))


def dtype_of(precision: Precision) -> torch.dtype:
    """Dtype of the inputs of convolutions and matrix products."""
    return {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(precision, torch.float32)


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """A context for forward passes in a precision."""
    dtype = dtype_of(precision)
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


@contextmanager
def float32_products(precision: Literal["ieee", "tf32"]) -> Iterator[None]:
    """Set the precision of float32 products for a block: TF32, or that of float32.

    PyTorch has two interfaces for it, the older of which can be read only while both agree; so both are set. By default
    cuDNN's convolutions are TF32, and callers may have chosen TF32 or bfloat16 for the rest.
    """
    backends: Any = torch.backends
    settings = [backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn]
    settings += [backends.mkldnn.matmul, backends.mkldnn.conv, backends.mkldnn.rnn]
    before = [setting.fp32_precision for setting in settings]
    try:
        flags = torch.get_float32_matmul_precision(), backends.cudnn.allow_tf32
    except RuntimeError:  # the caller set one interface alone
        flags = None
    try:
        if flags:
            _set_flags("high" if precision == "tf32" else "highest", precision == "tf32")
        for setting in settings:
            setting.fp32_precision = precision
        yield
    finally:
        if flags:
            _set_flags(*flags)
        for setting, value in zip(settings, before, strict=True):
            setting.fp32_precision = value


def _set_flags(matmul: str, cudnn_tf32: bool) -> None:
    torch.set_float32_matmul_precision(matmul)
    torch.backends.cudnn.allow_tf32 = cudnn_tf32
