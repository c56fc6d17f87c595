"""Random views of images: pixels taken by one index, against an index for each dimension."""

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bench.device import DEVICE, ON_GPU, captured, cold_cache
from bench.race import Rules
from dfad.distillation.augmentation import pixels_at


def published(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """An index for each dimension."""
    samples = torch.arange(len(images), device=images.device).view(-1, 1, 1)
    return images[samples, rows.unsqueeze(2), columns.unsqueeze(1)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.full)], ids=str)
@pytest.mark.parametrize("size", [32, pytest.param(64, marks=pytest.mark.full)])
def test_pixels(size: int, dtype: torch.dtype, race: Callable[..., None], request: pytest.FixtureRequest) -> None:
    """Images flipped and shifted, beside a copy."""
    generator = torch.Generator().manual_seed(0)
    batch = 512 if ON_GPU else 64
    images = torch.randn(batch, size, size, 3, generator=generator).to(DEVICE, dtype)
    shift = torch.randint(-4, 5, (2, batch, 1), generator=generator)
    rows, columns = (torch.arange(size) + shift).clamp(0, size - 1).to(DEVICE)
    budget = request.config.getoption("--seconds")

    def enter(name: str) -> Callable[[], object]:
        if name == "copy":
            return captured(functools.partial(torch.clone, images))
        take = {"PyTorch": published, "ours": pixels_at}[name]
        assert torch.equal(take(images, rows, columns), published(images, rows, columns))
        return captured(functools.partial(take, images, rows, columns))

    rules = Rules(
        rounds=lambda seconds: max(5, min(int(budget / max(seconds, 1e-9)), 500)),
        turns=5,
        warm_up=2,
        prepare=cold_cache(),
    )
    group = f"random views {batch}x3x{size}x{size}, {str(dtype).removeprefix('torch.')}"
    race(group, {name: functools.partial(enter, name) for name in ("PyTorch", "ours", "copy")}, rules)
