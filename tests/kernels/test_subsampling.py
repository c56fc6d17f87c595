"""The shortcut without parameters, against the operations that it replaces."""

import pytest
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from dfad_kernels.cpu.subsampling import subsample
from dfad_kernels.registration import instruction_sets


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("level", instruction_sets())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    ("shape", "stride", "before", "after"),
    [((2, 16, 8, 8), 2, 8, 8), ((3, 5, 7, 4), 2, 0, 3), ((1, 1, 1, 1), 3, 1, 0), ((2, 4, 5, 9), 1, 2, 2)],
)
def test_is_a_slice_among_zeros(
    shape: tuple[int, ...], stride: int, before: int, after: int, dtype: torch.dtype, level: str, generator: Generator
) -> None:
    x = channels_last(torch.randn(shape, generator=generator).to(dtype)).requires_grad_()
    y = subsample(x, stride, before, after, kernels=f"cpp.{level}")
    expected = F.pad(x[:, :, ::stride, ::stride], (0, 0, 0, 0, before, after))
    torch.testing.assert_close(y, expected, rtol=0, atol=0)
    assert y.is_contiguous(memory_format=torch.channels_last)
    upstream = torch.randn(y.shape, generator=generator).to(dtype)
    gradients = [torch.autograd.grad(value, x, upstream)[0] for value in (y, expected)]
    torch.testing.assert_close(*gradients, rtol=0, atol=0)
    assert gradients[0].is_contiguous(memory_format=torch.channels_last)


def test_other_layouts_are_taken_too(generator: Generator) -> None:
    x = torch.randn(2, 3, 6, 6, generator=generator)
    torch.testing.assert_close(subsample(x, 2, 1, 1), F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 1, 1)), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("x", "numbers", "words"),
    [
        (torch.ones(3, 4, 4), (2, 0, 0), r"features are \(3, 4, 4\)"),
        (torch.ones(1, 3, 4, 4, device="meta"), (2, 0, 0), "on meta"),
        (torch.ones(1, 3, 4, 4), (0, 0, 0), "stride is 0"),
        (torch.ones(1, 3, 4, 4), (2, -1, 0), "before -1"),
    ],
)
def test_bad_calls_are_refused(x: Tensor, numbers: tuple[int, int, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        subsample(x, *numbers)
