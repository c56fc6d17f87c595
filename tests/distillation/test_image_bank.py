"""The store of generated images."""

import pytest
import torch

from dfad.config import ImageBankConfig, InterpolationConfig, MethodConfig, RegularizerConfig
from dfad.distillation.image_bank import RANGE, ImageBank
from dfad.errors import ConfigurationError
from tests.waiting import NoWaiting

SHAPE = (3, 4, 6)


def numbered(first: int, count: int) -> torch.Tensor:
    """Images of one value each, which the quantisation keeps."""
    values = torch.arange(first, first + count) * (RANGE / 127)
    return values.view(-1, 1, 1, 1).expand(-1, *SHAPE).clone()


def numbers(images: torch.Tensor) -> list[int]:
    assert (images == images[:, :1, :1, :1]).all()
    return (images[:, 0, 0, 0] / (RANGE / 127)).round().int().tolist()


@pytest.fixture
def bank() -> ImageBank:
    return ImageBank(10, SHAPE, torch.device("cpu"))


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def test_only_what_was_added_is_drawn(bank, rng):
    bank.add(numbered(1, 4))
    assert set(numbers(bank.sample(200, 0, 4, rng))) == {1, 2, 3, 4}


def test_the_oldest_give_way(bank, rng):
    for first in (1, 5, 9):
        bank.add(numbered(first, 4))
    assert set(numbers(bank.sample(400, 0, 4, rng))) == set(range(3, 13))
    assert bank.written == 12
    bank.add(numbered(20, 10))  # as many as it holds
    assert set(numbers(bank.sample(400, 0, 4, rng))) == set(range(20, 30))


def test_all_are_drawn_alike(bank, rng):
    for first in (0, 5, 10):
        bank.add(numbered(first, 5))
    counts = torch.tensor(numbers(bank.sample(20000, 0, 5, rng))).bincount(minlength=15)
    assert not counts[:5].any()
    assert counts[5:].float() / 20000 == pytest.approx(0.1, abs=0.011)  # five standard errors


def test_a_share_is_of_the_newest(bank, rng):
    for first in (1, 5, 9):
        bank.add(numbered(first, 4))
    drawn = numbers(bank.sample(300, 100, 4, rng))
    assert set(drawn[:100]) == {9, 10, 11, 12}
    assert set(drawn[100:]) == set(range(3, 13))


def test_images_come_back_within_half_a_step_of_the_quantisation(rng):
    bank = ImageBank(8, SHAPE, torch.device("cpu"))
    images = torch.rand(8, *SHAPE) * 2 * RANGE - RANGE
    bank.add(images)
    for image in bank.sample(32, 0, 8, rng):
        distances = (images - image).abs().amax(dim=(1, 2, 3))
        assert distances.min() <= bank.scale[0] / 2 + 1e-6


def test_more_images_than_memory_holds_are_refused():
    with pytest.raises(ConfigurationError, match=r"no room on cpu for 1[0,]+ images of the bank, which take [\d,]+ MB"):
        ImageBank(10**15, SHAPE, torch.device("cpu"))


def test_each_channel_and_pixel_keeps_its_place(rng):
    bank = ImageBank(1, SHAPE, torch.device("cpu"))
    image = (torch.randint(-127, 128, (1, *SHAPE)) * (RANGE / 127)).float()
    bank.add(image)
    torch.testing.assert_close(bank.sample(1, 0, 1, rng), image)


def test_values_beyond_the_range_are_cut_off(bank, rng):
    bank.add(torch.full((1, *SHAPE), 100.0))
    bank.add(torch.full((1, *SHAPE), -100.0))
    drawn = bank.sample(50, 0, 1, rng)
    assert (drawn.amin().item(), drawn.amax().item()) == pytest.approx((-RANGE, RANGE))


def test_it_takes_a_byte_per_channel_and_pixel():
    bank = ImageBank(100, SHAPE, torch.device("cpu"))
    assert bank.state_dict()["images"].untyped_storage().nbytes() == 100 * 3 * 4 * 6


def test_a_restored_bank_goes_on_with_the_same_bits_and_on_the_same_memory(bank, rng):
    bank.add(torch.randn(7, *SHAPE))
    other = ImageBank(10, SHAPE, torch.device("cpu"))
    addresses = [tensor.data_ptr() for tensor in other.state_dict().values()]
    other.load_state_dict({name: tensor.clone() for name, tensor in bank.state_dict().items()})
    assert [tensor.data_ptr() for tensor in other.state_dict().values()] == addresses
    more = torch.randn(7, *SHAPE)
    drawn = []
    for one in (bank, other):
        one.add(more)
        drawn.append(one.sample(40, 10, 7, torch.Generator().manual_seed(5)))
    assert torch.equal(*drawn)


def test_nothing_waits_for_the_device(bank, rng):
    addresses = [tensor.data_ptr() for tensor in bank.state_dict().values()]
    with NoWaiting():
        for _ in range(3):
            bank.add(torch.randn(4, *SHAPE))
            bank.sample(8, 2, 4, rng)
    assert [tensor.data_ptr() for tensor in bank.state_dict().values()] == addresses


class TestConfiguration:
    def test_it_holds_a_batch_or_more(self):
        with pytest.raises(ValueError, match=r"image_bank\.size is 64; it must be at least the batch size, 128"):
            MethodConfig(warm_up=1, image_bank=ImageBankConfig(size=64))

    def test_the_warm_up_fills_it(self):
        with pytest.raises(ValueError, match="warm_up is 0; it must be 1 or more to fill the image bank"):
            MethodConfig(image_bank=ImageBankConfig(size=1000))

    def test_a_share_is_a_share(self):
        with pytest.raises(ValueError, match=r"newest is 1\.5; it must be in \[0, 1\]"):
            ImageBankConfig(newest=1.5)

    def test_what_a_round_counts(self):
        method = MethodConfig(
            student_steps=10,
            generator_steps=2,
            batch_size=16,
            warm_up=3,
            image_bank=ImageBankConfig(size=64),
            regularizers=RegularizerConfig(one_hot=1.0),
        )
        assert method.images_per_round == 2 * 16
        assert method.student_images_per_round == 10 * 16
        assert method.queries_per_round == 12 * 16

    @pytest.mark.parametrize(
        ("form", "student_images", "queries"),
        [
            (InterpolationConfig(), 5, 6),
            (InterpolationConfig(weight=1), 10, 6),
            (InterpolationConfig(weight=1, labels="teacher"), 10, 11),
            (InterpolationConfig(weight=1, labels="teacher", step="own"), 10, 11),
            (InterpolationConfig(weight=0.5, labels="teacher", step="within"), 5, 6),
        ],
    )
    def test_mixed_images_count_where_they_come_on_top(self, form, student_images, queries):
        method = MethodConfig(batch_size=2, interpolation=form)
        assert method.images_per_round == 2 * 6
        assert method.student_images_per_round == 2 * student_images
        assert method.queries_per_round == 2 * queries
