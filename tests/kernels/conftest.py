from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.kernels.implementations import has_triton


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def interpreted_scalars() -> Iterator[None]:
    """Triton's interpreter reads loop bounds from arrays of one element; version 3.6 does so in a way that NumPy 2.4
    rejects."""
    if not has_triton:
        yield
        return
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patch(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    with pytest.MonkeyPatch.context() as context:
        context.setattr(interpreter, "_patch_lang_tensor", patch)
        yield
