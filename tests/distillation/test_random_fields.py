"""Images drawn at random in place of generated ones."""

import math

import pytest
import torch

from dfad.config import ImageBankConfig, InterpolationConfig, MethodConfig, RandomFieldsConfig, RegularizerConfig
from dfad.distillation import random_fields
from dfad.distillation.random_fields import SMOOTHNESS, RandomFields, _smoothing
from tests.distillation.test_recipe import make, with_method
from tests.waiting import NoWaiting

SHAPE = (3, 20, 28)
BATCH = 512


def fields(shape: tuple[int, int, int] = SHAPE, seed: int = 4) -> RandomFields:
    return RandomFields(shape, torch.Generator().manual_seed(seed))


def test_they_have_the_generators_mean_and_variance_and_one_picture_in_all_channels():
    with NoWaiting():
        images = fields().sample(BATCH)
    assert images.shape == (BATCH, *SHAPE)
    assert images.dtype == torch.float32
    assert images.mean() == pytest.approx(0, abs=1e-4)
    assert images.std() == pytest.approx(1, abs=1e-3)
    assert all(torch.equal(images[:, 0], images[:, channel]) for channel in (1, 2))


def test_the_seed_alone_decides_even_under_autocast():
    images = fields().sample(8)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(images, fields().sample(8))
    assert not torch.equal(images, fields(seed=5).sample(8))


def test_smoothing_keeps_the_variance_of_white_noise_up_to_the_edge():
    rng = torch.Generator().manual_seed(1)
    matrix = _smoothing(torch.arange(20) / 20, torch.tensor([[[0.1]]]))
    noise = matrix @ torch.randn(20000, 20, 1, generator=rng)
    assert noise.var(dim=0).flatten().tolist() == pytest.approx([1.0] * 20, abs=0.05)  # five standard errors
    correlation = (noise[:, 8] * noise[:, 10]).mean().item()
    assert correlation == pytest.approx(torch.exp(torch.tensor(-(0.1**2) / (4 * 0.1**2))).item(), abs=0.05)


def test_they_are_bright_shapes_on_a_dark_ground_that_reaches_the_corners():
    images = fields().sample(BATCH)[:, 0]
    dark = images.min()
    assert (images[:, [0, 0, -1, -1], [0, -1, 0, -1]] - dark < 0.01).all()
    bright = images > (dark + images.max()) / 2
    assert bright.float().mean() < 0.3
    assert bright.flatten(1).any(dim=1).float().mean() > 0.9
    # strokes are as wide as the field is smooth, so all but few bright pixels have bright neighbours
    neighbours = bright[:, :, :-1] & bright[:, :, 1:]
    assert neighbours.sum() > 0.5 * bright.sum()
    assert min(SMOOTHNESS) * 20 < 1


@pytest.mark.parametrize("shape", [(1, 8, 8), (4, 1, 9), (1, 1, 1), (1, 96, 64)])
def test_any_size(shape):
    images = fields(shape).sample(4)
    assert images.shape == (4, *shape)
    assert images.isfinite().all()


def test_a_long_image_is_filled_along_its_length():
    images = fields((1, 16, 96)).sample(BATCH)[:, 0]
    bright = (images > 1).float().mean(dim=(0, 1))
    assert bright[24:72].min() > 0.5 * bright[40:56].mean()
    assert images.max() < 5  # as bright as in a square: the ground has not grown


def test_a_batch_without_a_bright_pixel_stays_finite(monkeypatch):
    monkeypatch.setattr(random_fields, "SHARPNESS", (1e4, 2e4))
    pairs = torch.stack([fields((1, 1, 1), seed).sample(2) for seed in range(40)])
    assert (pairs == 0).all(dim=1).any()
    assert pairs.isfinite().all()


class TestShare:
    @pytest.fixture
    def config(self, config):
        return with_method(
            config, warm_up=1, batch_size=16, image_bank=ImageBankConfig(size=32),
            regularizers=RegularizerConfig(one_hot=1.0),
        )  # fmt: skip

    @pytest.mark.parametrize("share", [0.25, 0.5, 0.7, 1.0])
    def test_of_each_student_batch_are_drawn_and_the_others_come_from_the_bank(self, teacher, config, share):
        drawing = make(teacher, with_method(config, random_fields=RandomFieldsConfig(share=share)))
        plain = make(teacher, config)
        expected = fields((1, 8, 8))
        for distiller in (drawing, plain):
            distiller.round.warm_up()
        expected.rng.set_state(drawing.round.rng["random_fields"].get_state())
        images, others = (distiller.round.student_images().float() for distiller in (drawing, plain))
        drawn = expected.sample(16).to(drawing.engine.dtype).float()
        rows = [torch.equal(image, field) for image, field in zip(images, drawn, strict=True)]
        assert sum(rows) == round(share * 16)
        for half in (rows[:8], rows[8:]):  # of which the first has the newest images, and the last the mixed ones
            assert abs(sum(half) - share * 8) <= 1
        assert all(row or torch.equal(image, other) for row, image, other in zip(rows, images, others, strict=True))

    def test_without_a_share_nothing_is_drawn(self, teacher, config):
        distiller = make(teacher, config)
        before = distiller.round.rng["random_fields"].get_state()
        distiller.round.warm_up()
        distiller.run_round()
        assert torch.equal(distiller.round.rng["random_fields"].get_state(), before)

    def test_needs_an_image_bank(self):
        with pytest.raises(ValueError, match=r"random_fields\.share is 0\.5; it must be 0 where there is no"):
            MethodConfig(random_fields=RandomFieldsConfig(share=0.5))

    @pytest.mark.parametrize("share", [1.5, -0.1, math.nan])
    def test_is_a_fraction(self, share):
        with pytest.raises(ValueError, match=f"share is {share}"):
            RandomFieldsConfig(share=share)

    def test_is_enough_for_an_image(self, config):
        with_method(config, random_fields=RandomFieldsConfig(share=0.04))
        with pytest.raises(ValueError, match=r"random_fields\.share is 0\.03; it must be 0, or .* than 0\.03125"):
            with_method(config, random_fields=RandomFieldsConfig(share=0.03))
        mixed = InterpolationConfig(weight=0.03, labels="teacher", step="within")
        with pytest.raises(ValueError, match=r"interpolation\.weight is 0\.03; it must be 0, or enough for an image"):
            with_method(config, interpolation=mixed)
