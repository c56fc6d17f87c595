"""Connectors: along the channels, wherever a network has them."""

import pytest
import torch
from torch import nn

from dfad.errors import ModelError
from dfad.models.connectors import Connectors


def built(student: tuple[int, ...], teacher: tuple[int, ...]) -> Connectors:
    torch.manual_seed(0)
    return Connectors([torch.zeros(2, *student)], [torch.zeros(2, *teacher)])


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        ((4, 6, 6), (8, 6, 6)),
        ((5, 4), (5, 8)),  # tokens
        ((6, 6, 4), (6, 6, 8)),  # channels last
        ((4,), (8,)),
    ],
    ids=str,
)
def test_a_tap_comes_to_the_teachers_width(student, teacher):
    connectors = built(student, teacher)
    tap = torch.randn(3, *student)
    (connected,) = connectors([tap])
    assert connected.shape == (3, *teacher)
    # by hand: a matrix over the channels, then standardised over everything else
    axis = 1 + next(axis for axis, (s, t) in enumerate(zip(student, teacher, strict=True)) if s != t)
    weight = connectors.connectors[0][0].weight.flatten(1)
    mixed = torch.einsum("n...c,dc->n...d", tap.movedim(axis, -1), weight).flatten(0, -2)
    expected = (mixed - mixed.mean(0)) / (mixed.var(0, correction=0) + 1e-5).sqrt()
    torch.testing.assert_close(connected.movedim(axis, -1).flatten(0, -2), expected)


@pytest.mark.parametrize("shape", [(4, 6, 6), (5, 4), (2, 3, 4, 5)], ids=str)
def test_taps_of_one_shape_need_none(shape):
    assert isinstance(built(shape, shape).connectors[0], nn.Identity)


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        ((4, 6, 6), (8, 3, 3), r"\(4, 6, 6\) \(channels, height, width\) .* height and width must match"),
        ((5, 4), (7, 4), r"\(5, 4\) \(tokens, channels\) .* tokens must match"),
        ((5, 4), (7, 8), "tokens must match"),
        ((6, 5, 4), (6, 5, 8), r"\(channels, height, width\) .* height and width must match"),
        ((36, 4), (8, 6, 6), r"\(36, 4\) \(tokens, channels\) .* \(8, 6, 6\) \(channels, height, width\) .* same axes"),
        ((2, 3, 4, 5), (2, 3, 4, 6), r"\(2, 3, 4, 5\) in the student .* same axes"),
    ],
    ids=str,
)
def test_taps_that_differ_in_more_are_refused_by_their_axes(student, teacher, message):
    with pytest.raises(ModelError, match=message):
        built(student, teacher)
