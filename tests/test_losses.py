"""The losses as modules."""

import pytest
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from dfad import functional
from dfad.losses import ActivationBoundaryLoss, FeatureMatchingLoss, InterpolatedKLDivLoss, weighted


@pytest.fixture
def generator() -> Generator:
    return Generator().manual_seed(0)


def taps(generator: Generator, *shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape, generator=generator) for shape in shapes]


each_path = pytest.mark.parametrize("fused", [True, False], ids=["operator", "reference"])
SHAPES = ((4, 3, 8, 8), (4, 5, 4, 4), (4, 7, 2, 2))


@each_path
def test_the_activation_regularizer_as_published(fused: bool, generator: Generator) -> None:
    """Heo et al.'s expression, with its sum over the batch, halved for each stage towards the input."""
    student, teacher = taps(generator, *SHAPES), taps(generator, *SHAPES)
    margin = 0.7
    expected = torch.zeros(())
    for weight, s, t in zip((0.25, 0.5, 1.0), student, teacher, strict=True):
        wrong_above = (s + margin) ** 2 * ((s > -margin) & (t <= 0))
        wrong_below = (s - margin) ** 2 * ((s <= margin) & (t > 0))
        expected = expected + weight * (wrong_above + wrong_below).sum() / s.shape[0]
    loss = ActivationBoundaryLoss(margin, weights="halving", reduction="batchmean", fused=fused)
    torch.testing.assert_close(loss(student, teacher), expected)


def test_weights_of_taps(generator: Generator) -> None:
    student, teacher = taps(generator, *SHAPES), taps(generator, *SHAPES)
    each = [functional.activation_boundary_loss(s, t) for s, t in zip(student, teacher, strict=True)]
    torch.testing.assert_close(ActivationBoundaryLoss()(student, teacher), sum(each))
    torch.testing.assert_close(ActivationBoundaryLoss(weights="uniform")(student, teacher), sum(each))
    torch.testing.assert_close(ActivationBoundaryLoss(weights=[1, 0, 2])(student, teacher), each[0] + 2 * each[2])
    torch.testing.assert_close(ActivationBoundaryLoss()(student[0], teacher[0]), each[0])


@each_path
def test_matched_features_are_relative_to_the_teachers(fused: bool, generator: Generator) -> None:
    student, teacher = taps(generator, *SHAPES), taps(generator, *SHAPES)
    expected = sum(((s - t) ** 2).sum() / (t**2).sum() for s, t in zip(student, teacher, strict=True))
    loss = FeatureMatchingLoss(fused)
    torch.testing.assert_close(loss(student, teacher), expected)
    torch.testing.assert_close(loss([10 * s for s in student], [10 * t for t in teacher]), expected)
    assert loss(teacher, teacher) == 0
    assert loss([torch.zeros_like(t) for t in teacher], teacher).item() == pytest.approx(3)
    assert loss([teacher[0]], [torch.zeros_like(teacher[0])]).isfinite()
    with pytest.raises(ValueError, match=r"\(4, 3, 8, 8\).*\(4, 3, 8, 1\)"):
        loss(student[:1], [teacher[0][..., :1]])


@each_path
def test_shares_of_a_batch_are_relative_to_all_of_it(fused: bool, generator: Generator) -> None:
    student, teacher = (taps(generator, *SHAPES) for _ in range(2))
    teacher[0][:1] *= 100  # no share is as large as another
    whole = FeatureMatchingLoss(fused)(student, teacher)
    sizes = iter([t.square().sum() / 4 for t in teacher] * 4)
    loss = FeatureMatchingLoss(fused, average=lambda own: next(sizes))
    each = [loss([s[k : k + 1] for s in student], [t[k : k + 1] for t in teacher]) for k in range(4)]
    torch.testing.assert_close(sum(each) / 4, whole)


@each_path
def test_matching_features_moves_the_student_alone(fused: bool, generator: Generator) -> None:
    student, teacher = (tap.requires_grad_() for tap in taps(generator, SHAPES[0], SHAPES[0]))
    (3 * FeatureMatchingLoss(fused)([student], [teacher])).backward()
    torch.testing.assert_close(student.grad, 6 * (student - teacher).detach() / teacher.detach().square().sum())
    assert teacher.grad is None


@each_path
def test_matched_features_in_bfloat16_are_near_those_in_float64(fused: bool, generator: Generator) -> None:
    student, teacher = (tap.bfloat16() for tap in taps(generator, SHAPES[0], SHAPES[0]))
    gradients = []
    for dtype in (torch.bfloat16, torch.float64):
        s = student.to(dtype).requires_grad_()
        loss = FeatureMatchingLoss(fused)([s], [teacher.to(dtype)])
        gradients.append(torch.autograd.grad(3 * loss, s)[0].double())
    assert loss.dtype == torch.float64
    torch.testing.assert_close(gradients[0], gradients[1], rtol=2**-8, atol=0)


def test_taps_that_do_not_fit_are_refused(generator: Generator) -> None:
    student = taps(generator, *SHAPES)
    with pytest.raises(ValueError, match="2 taps, the teacher 3"):
        ActivationBoundaryLoss()(student[:2], student)
    with pytest.raises(ValueError, match="2 weights for 3 taps"):
        ActivationBoundaryLoss(weights=[1, 2])(student, student)
    with pytest.raises(ValueError, match="'thirds'.*'halving'"):
        ActivationBoundaryLoss(weights="thirds")
    with pytest.raises(ValueError, match="no taps"):
        ActivationBoundaryLoss()([], [])
    with pytest.raises(ValueError, match="'none' for 3 taps"):
        ActivationBoundaryLoss(reduction="none")(student, student)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum", "batchmean"])
@each_path
def test_the_divergence_replaces_the_usual_one(fused: bool, reduction: str, generator: Generator) -> None:
    student, teacher = taps(generator, (6, 5, 3), (6, 5, 3))
    usual = nn.KLDivLoss(reduction=reduction)
    expected = 4.0**2 * usual((student / 4).log_softmax(dim=1), (teacher / 4).softmax(dim=1))
    torch.testing.assert_close(InterpolatedKLDivLoss(4.0, reduction, fused)(student, teacher, 1.0), expected)


@each_path
def test_soft_labels_are_mixed_with_a_partners(fused: bool, generator: Generator) -> None:
    student, teacher = taps(generator, (6, 5), (6, 5))
    coefficient = torch.rand(6, generator=generator)
    soft = teacher.softmax(dim=1)
    loss = InterpolatedKLDivLoss(fused=fused)
    for partner in (None, torch.randperm(6, generator=generator)):
        other = soft.flip(0) if partner is None else soft[partner]
        label = coefficient[:, None] * soft + (1 - coefficient[:, None]) * other
        expected = F.kl_div(student.log_softmax(dim=1), label, reduction="batchmean")
        torch.testing.assert_close(loss(student, teacher, coefficient, partner), expected)


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16)], ids=str)
def test_networks_may_end_in_different_precisions(dtypes):
    student, teacher = (torch.randn(4, 3, 5, 5).to(dtype) for dtype in dtypes)
    torch.testing.assert_close(
        ActivationBoundaryLoss()(student, teacher), ActivationBoundaryLoss()(student.float(), teacher.float())
    )
    torch.testing.assert_close(
        FeatureMatchingLoss()([student], [teacher]), FeatureMatchingLoss()([student.float()], [teacher.float()])
    )
    student, teacher = student[:, :, 0, 0].requires_grad_(), teacher[:, :, 0, 0]
    loss = InterpolatedKLDivLoss()(student, teacher, 1.0)
    torch.testing.assert_close(loss, InterpolatedKLDivLoss()(student.float(), teacher.float(), 1.0))
    loss.backward()
    assert student.grad.dtype == dtypes[0]


def test_a_weight_of_one_is_not_multiplied_by():
    loss = torch.tensor(3.0)
    assert weighted(1.0, loss) is loss
    assert weighted(0.5, loss) == 1.5
    assert weighted(0.0, loss) == 0
