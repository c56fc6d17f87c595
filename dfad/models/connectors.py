"""Connectors from the student's taps to the teacher's widths."""

from collections.abc import Sequence

from torch import Tensor, nn

from dfad.errors import ModelError


class Connectors(nn.Module):
    """One per tap: the identity where the widths match, else a 1×1 convolution and BatchNorm (Heo et al., AAAI 2019).

    Args:
        student_taps: taps of a dry forward, ``(B, channels, height, width)`` each.
        teacher_taps: the teacher's likewise.

    Raises:
        ModelError: if the taps differ in number or in height and width.
    """

    def __init__(self, student_taps: Sequence[Tensor], teacher_taps: Sequence[Tensor]) -> None:
        super().__init__()
        sizes = [[tuple(tap.shape[1:]) for tap in taps] for taps in (student_taps, teacher_taps)]
        if len(student_taps) != len(teacher_taps) or not student_taps:
            raise ModelError(
                f"The activation regularizer pairs the student's taps {sizes[0]} with the teacher's {sizes[1]}: both "
                "need the same number, at least one. Name them with --student.taps and --teacher.taps, or set "
                "--method.activation.weight 0."
            )
        for stage, (student, teacher) in enumerate(zip(*sizes, strict=True)):
            if student[1:] != teacher[1:]:
                raise ModelError(
                    f"Tap {stage} is {student} (channels, height, width) in the student and {teacher} in the teacher: "
                    "height and width must match. Choose other taps, or set --method.activation.weight 0."
                )
        self.connectors = nn.ModuleList(
            nn.Identity() if student[0] == teacher[0] else _connector(student[0], teacher[0])
            for student, teacher in zip(*sizes, strict=True)
        )

    def forward(self, taps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The student's taps at the teacher's widths."""
        return tuple(connector(tap) for connector, tap in zip(self.connectors, taps, strict=True))


def _connector(student_channels: int, teacher_channels: int) -> nn.Module:
    convolution = nn.Conv2d(student_channels, teacher_channels, kernel_size=1, bias=False)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(convolution, nn.BatchNorm2d(teacher_channels))
