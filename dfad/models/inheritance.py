"""A student's initial weights, selected from its teacher's."""

import logging
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, fx, nn

from dfad.errors import ModelError, name_of
from dfad.models.probing import parameter_count

log = logging.getLogger(__name__)

STATISTICS = ("running_mean", "running_var")
"""Buffers that are learned; others may be constants of an architecture, such as indices and masks."""

ENOUGH = 0.9
"""Share of a student's learned tensors that its teacher has in the same shape, from which on they are proposed."""


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
    whole, selected, left = 0, 0, []
    for name, value, source in _pairs(student, teacher):
        if source is None:
            left.append(name)
            continue
        whole, selected = whole + (source.shape == value.shape), selected + (source.shape != value.shape)
        value.copy_(_evenly_spaced(source, value.shape))
    if not whole + selected:
        raise ModelError(
            f"The student {name_of(student)} cannot start from the weights of its teacher {name_of(teacher)}: no layer "
            "of the same name and class is as large as the student's, or larger. Choose a student of the teacher's "
            "family, or leave --student.initial_weights at random. Of TorchScript and DataParallel, give the network "
            "inside."
        )
    rest = f"; {len(left)} keep their own values, first {left[0]}" if left else ""
    log.info(
        "Initial weights of the student: %d tensors of its teacher's whole, %d selected from larger ones%s.",
        whole,
        selected,
        rest,
    )
    return left


def suits(student: nn.Module, teacher: nn.Module) -> bool:
    """Whether to propose :func:`inherit`: the student is smaller, and nearly all of its tensors are there in the same
    shape. Those of narrower layers help little (docs/experiments.md), and tensors are counted, not their values,
    because the classifier of a VGG outweighs its convolutions. Neither network is changed."""
    if parameter_count(student) >= parameter_count(teacher):
        return False
    whole = [source is not None and source.shape == value.shape for _, value, source in _pairs(student, teacher)]
    return sum(whole) >= ENOUGH * max(1, len(whole))


def _pairs(student: nn.Module, teacher: nn.Module) -> Iterator[tuple[str, Tensor, Tensor | None]]:
    """Everything learned in a student: its name, its value, and the teacher's tensor from which it can be selected."""
    partners = dict(teacher.named_modules(remove_duplicate=False))
    for path, module in student.named_modules():
        partner = partners.get(path)
        offered = _learned(partner) if partner is not None and _of_one_class(partner, module) else {}
        for name, value in _learned(module).items():
            if isinstance(value, nn.Parameter) and not value.requires_grad:
                continue
            source = offered.get(name)
            found = source if source is not None and _contains(source, value.shape, _places(module, value)) else None
            yield f"{path}.{name}".lstrip("."), value, found


def _of_one_class(one: nn.Module, other: nn.Module) -> bool:
    """Whether two modules have the same class, or one is part of a graph of torch.fx or torch.export, which keeps
    names alone."""
    classless = any(type(module) is nn.Module or isinstance(module, fx.GraphModule) for module in (one, other))
    return classless or name_of(one) == name_of(other)


def _learned(module: nn.Module) -> dict[str, Tensor]:
    """A module's own parameters and statistics, without its submodules'."""
    statistics = {name: value for name, value in module.named_buffers(recurse=False) if name in STATISTICS}
    return {**dict(module.named_parameters(recurse=False)), **statistics}


def _places(module: nn.Module, value: Tensor) -> Sequence[int]:
    """Dimensions that are taken whole or not at all, because they are places and no channels: those of a kernel, and
    the positions of an embedding ``(1, positions, channels)``."""
    is_embedding = value.dim() == 3 and not isinstance(module, nn.Conv1d)
    return (1,) if is_embedding else range(2, value.dim())


def _contains(source: Tensor, shape: Sequence[int], places: Sequence[int]) -> bool:
    """Whether a selection from a tensor has that shape."""
    if source.dim() != len(shape):
        return False
    return all(
        shorter == longer if dimension in places else shorter <= longer
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
