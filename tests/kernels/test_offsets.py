"""Offsets beyond 32 bits, on a host without memory for such tensors."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from tests.kernels import implementations

triton = pytest.importorskip("triton")

from triton import language as tl  # noqa: E402
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle  # noqa: E402

from dfad_kernels.gpu.channels import channels_of, offsets_of  # noqa: E402
from dfad_kernels.gpu.interpolated_kl_div import _offsets, _rows  # noqa: E402

pytestmark = implementations.interpreted
ROWS, CLASSES = 4, 32


@triton.jit
def _addresses_kernel(
    out_ptr, samples, classes, sites, REVERSED: tl.constexpr, CLASSES_LAST: tl.constexpr,
    ROWS: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    sample, site, inside = _rows(samples, sites, REVERSED, ROWS)
    c = tl.arange(0, CLASSES)
    offsets = _offsets(sample, site, c, classes, sites, CLASSES_LAST)
    place = tl.arange(0, ROWS)[:, None] * CLASSES + c[None, :]
    tl.store(out_ptr + place, tl.where(inside[:, None], offsets, -1))


@pytest.mark.parametrize("size", [(1 << 17, 32, 1 << 10), (3, 21, 1 << 28), ((1 << 31) - 1, 32, 1)], ids=str)
@pytest.mark.parametrize("reverse", [True, False], ids=["reversed", "permuted"])
@pytest.mark.parametrize("classes_last", [True, False], ids=["classes last", "sites last"])
def test_addresses_past_32_bits(
    size: tuple[int, int, int], reverse: bool, classes_last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the kernels' own functions, in the first program, one in the middle, and the last."""
    samples, classes, sites = size
    programs = -(-samples * sites // ROWS)
    for program in (0, programs // 2, programs - 1):

        def program_id(self: Any, axis: int, program: int = program) -> TensorHandle:
            return TensorHandle(np.array([program], dtype=np.int32), tl.int32)

        monkeypatch.setattr(InterpreterBuilder, "create_get_program_id", program_id)
        out = torch.zeros(ROWS, CLASSES, dtype=torch.int64)
        _addresses_kernel[(1,)](out, *size, REVERSED=reverse, CLASSES_LAST=classes_last, ROWS=ROWS, CLASSES=CLASSES)
        for i, c in itertools.product(range(ROWS), range(classes)):
            sample, site = divmod(program * ROWS + i, sites)
            inside = sample < samples
            if reverse:
                sample = sample // 2 if sample % 2 == 0 else samples - 1 - sample // 2
            step, class_step = (classes, 1) if classes_last else (1, sites)
            address = sample * classes * sites + site * step + c * class_step
            assert out[i, c] == (address if inside else -1)


@triton.jit
def _features_kernel(out_ptr, channels, stretch, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    channel = channels_of(tl.program_id(1), CHANNELS)
    start = tl.program_id(0).to(tl.int64) * stretch
    offsets, row = offsets_of(start, channel, channels, ROWS)
    place = tl.arange(0, ROWS)[:, None] * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    tl.store(out_ptr + place, offsets)
    tl.store(out_ptr + ROWS * CHANNELS + tl.arange(0, ROWS), row)


@pytest.mark.parametrize(("program", "stretch", "channels"), [(1 << 17, 1 << 10, 64), (3, 1 << 30, 37), (0, 64, 5)])
def test_addresses_of_features_past_32_bits(
    program: int, stretch: int, channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def program_id(self: Any, axis: int) -> TensorHandle:
        return TensorHandle(np.array([program if axis == 0 else 1], dtype=np.int32), tl.int32)

    monkeypatch.setattr(InterpreterBuilder, "create_get_program_id", program_id)
    out = torch.zeros(ROWS * CLASSES + ROWS, dtype=torch.int64)
    _features_kernel[(1,)](out, channels, stretch, ROWS=ROWS, CHANNELS=CLASSES)
    rows = program * stretch + torch.arange(ROWS)
    offsets = rows[:, None] * channels + CLASSES + torch.arange(CLASSES)
    torch.testing.assert_close(out, torch.cat([offsets.flatten(), rows]), rtol=0, atol=0)
