"""Implementations of a loss with a common interface, from arguments and an incoming gradient to loss and gradients."""

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dfad_kernels.registration import instruction_sets
from dfad_kernels.testing import OpCase

Result = tuple[Tensor, list[Tensor]]
Implementation = Callable[..., Result]


def differentiate(op: Callable[..., Tensor], case: OpCase, pair: Any, settings: Any, upstream: Any) -> Result:
    """By autograd; ``upstream`` makes the incoming gradient from the loss."""
    inputs = [
        x.detach().requires_grad_(name in case.gradients) for name, x in zip(("student", "teacher"), pair, strict=True)
    ]
    loss = op(*inputs, **settings)
    wanted = [x for x in inputs if x.requires_grad]
    return loss.detach(), list(torch.autograd.grad(loss, wanted, upstream(loss)))


def reference(case: OpCase, pair: Any, settings: Any, upstream: Any) -> Result:
    return differentiate(case.op.reference, case, pair, settings, upstream)


def operator(case: OpCase, pair: Any, settings: Any, upstream: Any) -> Result:
    return differentiate(case.op, case, pair, settings, upstream)


def kernels(kernels_name: str) -> Implementation:
    """The kernels of a name, called without the dispatcher, which would use C++ for CPU tensors."""

    def run(case: OpCase, pair: Any, settings: Any, upstream: Any) -> Result:
        op = case.op
        arguments = op.prepare(*pair, **settings)
        needed = [name in case.gradients for name in ("student", "teacher")][: op.differentiable]
        loss, saved = op.run_forward(kernels_name, *arguments)
        return loss, op.run_backward(kernels_name, upstream(loss), saved, needed, *arguments)

    return run


interpreted_triton = kernels("triton")
has_triton = importlib.util.find_spec("triton") is not None
interpreted = pytest.mark.skipif(
    not has_triton or torch.cuda.is_available(), reason="interprets Triton kernels where no GPU runs them"
)
CPU_IMPLEMENTATIONS = [
    pytest.param(reference, id="reference"),
    pytest.param(operator, id="cpp"),
    *(pytest.param(kernels(f"cpp.{level}"), id=f"cpp.{level}") for level in instruction_sets()[:-1]),
    pytest.param(interpreted_triton, id="triton", marks=interpreted),
]
FEATURE_KERNELS = [
    pytest.param(None, id="operator"),
    *(pytest.param(f"cpp.{level}", id=f"cpp.{level}") for level in instruction_sets()[:-1]),
    pytest.param("triton", id="triton", marks=interpreted),
]
"""Values for the argument ``kernels`` of an operator over features."""
