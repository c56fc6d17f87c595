"""Students that suit a teacher: smaller networks for the same images, and how their taps pair with the teacher's."""

import inspect
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from dfad import models
from dfad.errors import name_of
from dfad.models.anatomy import Tap, are_own, candidate_taps, names_of_own_taps, paired
from dfad.models.factory import build
from dfad.models.hubs import hub_of
from dfad.models.inheritance import suits
from dfad.models.probing import dry_forward, parameter_count

TRIED, SHOWN = 24, 3
"""Limits: networks of the same family to build and count, and students to return."""


@dataclass(frozen=True)
class Student:
    """A smaller network for the same images and the same number of classes."""

    source: str
    kwargs: dict[str, Any]
    parameters: int
    taps: list[str]
    """Names of the taps that pair with the teacher's; empty if none do, or if the network returns its own."""
    teacher_taps: list[str]
    fit: str
    """A description of how its taps fit the teacher's."""
    pairs: bool
    """Whether the taps can be compared as they are returned."""
    boundary: bool
    """Whether the activation regularizer has a boundary to compare in them."""
    inherits: bool
    """Whether it should start from the teacher's weights, see :func:`dfad.models.inheritance.suits`."""


def suitable_students(
    source: str,
    network: nn.Module,
    image_shape: tuple[int, int, int],
    classes: int,
    taps: Sequence[Tap],
    *,
    boundary: bool,
) -> list[Student]:
    """Up to :data:`SHOWN` networks with fewer parameters than a teacher: those of its family first, and of a hub's,
    those that can start from its weights.

    Args:
        source: of the teacher, see :mod:`dfad.models.sources`.
        network: the teacher.
        image_shape: ``(channels, height, width)`` of its images.
        classes: their number.
        taps: its candidates.
        boundary: whether most of its activations have a boundary at zero.
    """
    largest = parameter_count(network)
    students: list[Student] = []
    for candidate, kwargs in _candidates(source, network, image_shape, classes):
        if len(students) == SHOWN:
            break
        try:
            student = build(candidate, kwargs)
            count = parameter_count(student)
            if count >= largest or dry_forward(student, image_shape).logits.shape[1] != classes:
                continue
            student_taps = candidate_taps(student, image_shape)
            if len(paired(taps, student_taps)) < len(student_taps) and (own := names_of_own_taps(student)):
                named = zip(student_taps, own, strict=True)
                student_taps = [replace(tap, name=name, found="found in the graph") for tap, name in named]
        except Exception:  # a network may raise anything for such images
            continue
        names, teacher_names, fit, all_match = _fit(taps, student_taps)
        shared, inherits = boundary and all_match, suits(student, network)
        students.append(Student(candidate, kwargs, count, names, teacher_names, fit, all_match, shared, inherits))
    return students


def _fit(taps: Sequence[Tap], student_taps: Sequence[Tap]) -> tuple[list[str], list[str], str, bool]:
    """Names of the student's and the teacher's taps to compare, how they fit, and whether they can be compared."""
    pairs = paired(taps, student_taps)
    if not pairs:
        return [], [], "none of its taps has the resolution of one of the teacher's", False
    same = all(one.shape == other.shape for one, other in pairs)
    sizes = ", ".join(f"{one.shape[1]}×{one.shape[2]}" for one, _ in pairs)
    fit = f"{len(pairs)} taps of the same resolution ({sizes})"
    fit += ", of the same width" if same else "; 1×1 connectors to the teacher's width"
    all_match = all(len(pairs) == len(of_one) or not are_own(of_one) for of_one in (taps, student_taps))
    if not all_match:
        fit += "; others that a network returns itself have no partner, so that none can be used"
    names = [] if are_own(student_taps) else [other.name for _, other in pairs]
    return names, [] if are_own(taps) else [one.name for one, _ in pairs], fit, all_match


def _candidates(
    source: str, teacher: nn.Module, image_shape: tuple[int, int, int], classes: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Networks that could be students, of the same family first, the largest first."""
    if hub_of(source) is not None:
        yield from _relatives(source, teacher, image_shape, classes)
    offered = {"num_classes": classes, "in_channels": image_shape[0]}
    found = []
    for name in models.__all__:
        parameters = inspect.signature(getattr(models, name)).parameters
        kwargs = {key: value for key, value in offered.items() if key in parameters}
        network = _on_meta(name, kwargs)
        found.append((name_of(network) != name_of(teacher), -parameter_count(network), name, kwargs))
    yield from ((name, kwargs) for *_, name, kwargs in sorted(found, key=lambda entry: entry[:3]))


def _relatives(
    source: str, teacher: nn.Module, image_shape: tuple[int, int, int], classes: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Those of a hub, by their names; first what can start from the teacher's weights."""
    found = hub_of(source)
    assert found is not None
    hub, name = found
    prefix = source.partition(":")[0]
    kwargs: dict[str, Any] = {"num_classes": classes}
    if image_shape[0] != 3 and prefix == "timm":
        kwargs["in_chans"] = image_shape[0]
    relatives = [other for other in hub.names() if _family(other) == _family(name) and other != name]
    counted = []
    for other in sorted(relatives, key=len)[:TRIED]:
        try:
            network = _on_meta(f"{prefix}:{other}", kwargs)
            counted.append((not suits(network, teacher), -parameter_count(network), other))
        except Exception:  # a network that cannot be built on the meta device, or with these arguments
            continue
    for _, count, other in sorted(counted, key=lambda entry: entry[:2]):
        if -count < 0.9 * parameter_count(teacher):
            yield f"{prefix}:{other}", kwargs


def _family(name: str) -> str:
    """The part of a name before its first digit."""
    return re.split(r"\d", name.partition(".")[0], maxsplit=1)[0]


def _on_meta(source: str, kwargs: dict[str, Any]) -> nn.Module:
    """A network without memory for its parameters."""
    with torch.device("meta"):
        return build(source, kwargs)
