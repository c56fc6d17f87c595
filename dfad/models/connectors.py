"""Connectors from the student's taps to the teacher's widths."""

from collections.abc import Sequence

from torch import Tensor, nn

from dfad.errors import ModelError

AXES = {
    1: ("channels",),
    2: ("tokens", "channels"),
    3: ("channels", "height", "width"),
}
"""Meaning of a tap's axes, by their number without the batch."""

WITHOUT_TAPS = "set --method.activation.weight and --method.feature_matching.weight to 0"
"""How to run without taps, for messages."""

CHANNELS_LAST = ("height", "width", "channels")


class Connectors(nn.Module):
    """One per tap: the identity where the widths match, else a 1×1 convolution and BatchNorm (Heo et al., AAAI 2019).

    Taps of transformers have their channels last, ``(B, tokens, channels)`` or ``(B, height, width, channels)``; there
    a linear layer takes the place of the convolution.

    Args:
        student_taps: from a trial forward pass, ``(B, channels, height, width)`` each unless their channels are last.
        teacher_taps: of the teacher, in the same form.

    Raises:
        ModelError: if the taps differ in number, or in more than their channels.
    """

    def __init__(self, student_taps: Sequence[Tensor], teacher_taps: Sequence[Tensor]) -> None:
        super().__init__()
        sizes = [[tuple(tap.shape[1:]) for tap in taps] for taps in (student_taps, teacher_taps)]
        if len(student_taps) != len(teacher_taps) or not student_taps:
            raise ModelError(
                f"The student has the taps {sizes[0]} and the teacher {sizes[1]}: both need the same number, "
                f"at least one. Name them with --student.taps and --teacher.taps, or {WITHOUT_TAPS}."
            )
        self.connectors = nn.ModuleList(
            _connector(stage, student, teacher) for stage, (student, teacher) in enumerate(zip(*sizes, strict=True))
        )

    def forward(self, taps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The student's taps at the teacher's widths."""
        return tuple(connector(tap) for connector, tap in zip(self.connectors, taps, strict=True))


def _connector(stage: int, student: tuple[int, ...], teacher: tuple[int, ...]) -> nn.Module:
    if student == teacher:
        return nn.Identity()
    if len(student) != len(teacher) or len(student) not in AXES:
        raise ModelError(
            f"Tap {stage} is {_named(student)} in the student and {_named(teacher)} in the teacher: both must have the "
            f"same axes. Choose other taps, or {WITHOUT_TAPS}."
        )
    axes = _axes(student, teacher)
    channels = axes.index("channels")
    if any(s != t for axis, (s, t) in enumerate(zip(student, teacher, strict=True)) if axis != channels):
        others = " and ".join(axis for axis in axes if axis != "channels")
        raise ModelError(
            f"Tap {stage} is {student} ({', '.join(axes)}) in the student and {teacher} in the teacher: {others} must "
            f"match. Choose other taps, or {WITHOUT_TAPS}."
        )
    if axes == AXES[3]:
        convolution = nn.Conv2d(student[0], teacher[0], kernel_size=1, bias=False)
        nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
        return nn.Sequential(convolution, nn.BatchNorm2d(teacher[0]))
    linear = nn.Linear(student[-1], teacher[-1], bias=False)
    nn.init.kaiming_normal_(linear.weight, mode="fan_out", nonlinearity="relu")
    return _AlongLastAxis(linear, nn.BatchNorm1d(teacher[-1]))


def _axes(student: tuple[int, ...], teacher: tuple[int, ...]) -> tuple[str, ...]:
    """Channels come first in a feature map, unless only its last axis differs and its other axes are a square."""
    if len(student) == 3 and student[:2] == teacher[:2] and student[0] == student[1]:
        return CHANNELS_LAST
    return AXES[len(student)]


def _named(size: tuple[int, ...]) -> str:
    axes = AXES.get(len(size))
    return f"{size} ({', '.join(axes)})" if axes else str(size)


class _AlongLastAxis(nn.Sequential):
    """Layers for ``(N, channels)``, applied to taps with any axes between."""

    def forward(self, tap: Tensor) -> Tensor:
        return super().forward(tap.flatten(0, -2)).unflatten(0, tap.shape[:-1])
