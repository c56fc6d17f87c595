"""A student's initial weights, selected from its teacher's."""

import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from dfad.errors import ModelError, name_of

log = logging.getLogger(__name__)

STATISTICS = ("running_mean", "running_var")
"""Buffers that are learned; others may be constants of an architecture, such as indices and masks."""

KERNEL = 2
"""First dimension of a convolution's weight that belongs to its kernel, which is taken whole or not at all."""


@torch.no_grad()
def inherit(student: nn.Module, teacher: nn.Module) -> list[str]:
    """Start a student from its teacher's weights: weight selection (Xu et al., ICLR 2024, arXiv 2311.18823).

    A trainable parameter, or a running statistic, takes its values from the teacher's of the same name in a module of
    the same class: all of them where the shapes are equal; evenly spaced ones along each dimension in which the
    teacher's is longer, so that layers of the same width keep the same channels. Everything else stays as it is.

    Args:
        student: written in place.
        teacher: unchanged.

    Returns:
        Names of the parameters and statistics that stay as they are.

    Raises:
        ModelError: if that is all of them.
    """
    partners = dict(teacher.named_modules())
    whole, selected, left = 0, 0, []
    for path, module in student.named_modules():
        partner = partners.get(path)
        offered = _learned(partner) if partner is not None and name_of(partner) == name_of(module) else {}
        for name, value in _learned(module).items():
            source = offered.get(name)
            if (isinstance(value, nn.Parameter) and not value.requires_grad) or is_lazy(value):
                continue
            if source is None or not _contains(source, value.shape):
                left.append(f"{path}.{name}".lstrip("."))
                continue
            whole, selected = whole + (source.shape == value.shape), selected + (source.shape != value.shape)
            value.copy_(_evenly_spaced(source, value.shape))
    if not whole + selected:
        raise ModelError(
            f"The student {name_of(student)} cannot start from the weights of its teacher {name_of(teacher)}: no layer "
            "of the same name and class has room for one of the student's. Choose a student of the teacher's family, "
            "or leave --student.initial_weights at random."
        )
    rest = f"; {len(left)} keep their own values, first {left[0]}" if left else ""
    log.info(
        "The student starts from its teacher's weights: %d tensors whole, %d selected from larger ones%s.",
        whole,
        selected,
        rest,
    )
    return left


def _learned(module: nn.Module) -> dict[str, Tensor]:
    """A module's own parameters and statistics, without its submodules'."""
    statistics = {name: value for name, value in module.named_buffers(recurse=False) if name in STATISTICS}
    return {**dict(module.named_parameters(recurse=False)), **statistics}


def _contains(source: Tensor, shape: Sequence[int]) -> bool:
    """Whether a selection from a tensor has that shape."""
    if is_lazy(source) or source.dim() != len(shape):
        return False
    is_kernel = len(shape) > KERNEL + 1  # position embeddings have three dimensions
    return all(
        shorter == longer if is_kernel and dimension >= KERNEL else shorter <= longer
        for dimension, (shorter, longer) in enumerate(zip(shape, source.shape, strict=True))
    )


def _evenly_spaced(source: Tensor, shape: Sequence[int]) -> Tensor:
    """A part of that shape."""
    for dimension, length in enumerate(shape):
        longer = source.shape[dimension]
        if length < longer:
            index = torch.arange(length, device=source.device) * longer // length
            source = source.index_select(dimension, index)
    return source
