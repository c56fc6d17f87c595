"""Random views of images."""

import itertools

import pytest
import torch

from dfad.config import AugmentationConfig
from dfad.distillation.augmentation import Augmentation, pixels_at
from tests.waiting import NoWaiting

SHAPE = (3, 6, 8)


def augment(images: torch.Tensor, seed: int = 4, **views) -> torch.Tensor:
    return Augmentation(AugmentationConfig(**views), torch.Generator().manual_seed(seed))(images)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(64, *SHAPE)


def test_without_views_images_are_as_they_were(images):
    assert augment(images) is images


def test_half_of_the_images_are_mirrored(images):
    images = images[:1].expand(2000, -1, -1, -1)
    view = augment(images, flip=True)
    mirrored = (view == images.flip(3)).flatten(1).all(dim=1)
    as_it_was = (view == images).flatten(1).all(dim=1)
    assert (mirrored ^ as_it_was).all()
    assert mirrored.float().mean() == pytest.approx(0.5, abs=0.056)  # five standard errors


@pytest.mark.parametrize("padding", ["reflect", "zero"])
def test_a_crop_is_a_window_of_the_padded_image(padding, images):
    view = augment(images, crop=0.4, padding=padding)
    mode = {"reflect": "reflect", "zero": "constant"}[padding]
    down, right = 2, 3  # of 6 and 8 pixels
    padded = torch.nn.functional.pad(images, (right, right, down, down), mode=mode)
    height, width = SHAPE[1:]
    found = torch.zeros(2 * down + 1, 2 * right + 1)
    for number, image in enumerate(view):
        windows = [
            (y, x)
            for y in range(2 * down + 1)
            for x in range(2 * right + 1)
            if torch.equal(padded[number, :, y : y + height, x : x + width], image)
        ]
        assert len(windows) == 1
        found[windows[0]] += 1
    # each shift, both ways
    assert (found.sum(dim=0) > 0).all()
    assert (found.sum(dim=1) > 0).all()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_pixels_are_taken_from_rows_and_columns(memory_format):
    images = torch.arange(2 * 3 * 4 * 5.0).view(2, 3, 4, 5).contiguous(memory_format=memory_format).movedim(1, -1)
    rows, columns = torch.tensor([[3, 0], [1, 1]]), torch.tensor([[4, 0, 2], [0, 1, 3]])
    taken = pixels_at(images, rows, columns)
    for b, i, j in itertools.product(range(2), range(2), range(3)):
        assert torch.equal(taken[b, i, j], images[b, rows[b, i], columns[b, j]])
    assert taken.shape == (2, 2, 3, 3)


def test_a_crop_of_nothing_and_a_flip_keep_every_value(images):
    view = augment(images, flip=True)
    assert torch.equal(view.flatten(1).sort(dim=1).values, images.flatten(1).sort(dim=1).values)


def test_crops_bring_in_no_other_values(images):
    view = augment(images, flip=True, crop=0.5)
    for before, after in zip(images, view, strict=True):
        assert torch.isin(after, before).all()


def test_a_square_is_cut_out():
    view = augment(torch.ones(500, *SHAPE), cutout=0.5)
    hidden = view == 0
    assert torch.equal(hidden[:, 0], hidden[:, 2])
    rows, columns = hidden[:, 0].any(dim=2).sum(dim=1), hidden[:, 0].any(dim=1).sum(dim=1)
    assert torch.equal(rows * columns, hidden[:, 0].sum(dim=(1, 2)))  # a rectangle
    # 3 of 6 by 4 of 8 pixels, whole inside or cut by an edge: never without its centre
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (2, 3, 2, 4)
    assert hidden.any(dim=0).all()  # it comes everywhere
    assert ((view == 0) | (view == 1)).all()


def test_colours_change_within_bounds(images):
    view = augment(images, colour=0.2)
    spreads = []
    for before, after in zip(images, view, strict=True):
        shifts = []
        for channel in range(3):
            x, y = before[channel].flatten(), after[channel].flatten()
            slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
            offset = y.mean() - slope * x.mean()
            torch.testing.assert_close(y, slope * x + offset, rtol=1e-4, atol=1e-4)
            assert abs(slope - 1) <= 0.2001
            assert abs(offset) <= 0.2001
            shifts.append((slope.item(), offset.item()))
        slopes, offsets = zip(*shifts, strict=True)
        assert max(slopes) - min(slopes) < 1e-3  # one contrast for all channels
        spreads.append(max(offsets) - min(offsets))
    assert sum(spread > 0.01 for spread in spreads) > 55  # a shift for each
    assert (view - images).abs().max() > 0.1


EVERY_VIEW = {"flip": True, "crop": 0.4, "cutout": 0.5, "colour": 0.1}


def test_the_largest_crop_still_has_a_reflection():
    images = torch.randn(50, *SHAPE)
    view = augment(images, crop=0.99)
    assert all(torch.isin(after, before).all() for before, after in zip(images, view, strict=True))


def test_an_image_of_one_pixel_has_one_view():
    images = torch.randn(4, 3, 1, 1)
    assert torch.equal(augment(images, flip=True, crop=0.9, cutout=0.9), images)


def test_a_seed_decides(images):
    first, again, other = (augment(images, seed, **EVERY_VIEW) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padding", ["reflect", "zero"])
def test_dtype_and_shape_stay_and_the_view_is_channels_last(dtype, padding, images):
    view = augment(images.to(dtype), padding=padding, **EVERY_VIEW)
    assert view.dtype == dtype
    assert view.shape == images.shape
    assert view.is_contiguous(memory_format=torch.channels_last)


def test_nothing_waits_for_the_device(images):
    with NoWaiting():
        for padding in ("reflect", "zero"):
            augment(images, padding=padding, **EVERY_VIEW)


@pytest.mark.parametrize(
    ("views", "message"),
    [
        ({"crop": -0.1}, r"crop is -0\.1; it must be in \[0, 1\)"),
        ({"cutout": 1.0}, r"cutout is 1\.0; it must be in \[0, 1\)"),
        ({"colour": 1.0}, r"colour is 1\.0; it must be in \[0, 1\)"),
    ],
)
def test_impossible_views_are_refused(views, message):
    with pytest.raises(ValueError, match=message):
        AugmentationConfig(**views)
