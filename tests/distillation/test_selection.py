"""Selection without labels."""

import pytest
import torch

from dfad.distillation.selection import SLICES, AgreementBank


def fill(bank: AgreementBank, rounds: int) -> list[int]:
    """Run the rounds; returns those after which a slice was added. An image's value is the teacher's class."""
    gathered = []
    for round_index in range(1, rounds + 1):
        if bank.is_due(round_index):
            gathered.append(round_index)
            labels = torch.arange(bank.slice_size) % 3
            bank.add(labels[:, None].float(), torch.nn.functional.one_hot(labels, 3).float())
    return gathered


def test_it_fills_evenly_over_the_first_half_of_the_rounds_and_then_never_changes():
    bank = AgreementBank(size=64, rounds=160, device=torch.device("cpu"))
    assert fill(bank, 160) == [10, 20, 30, 40, 50, 60, 70, 80]
    assert sum(map(len, bank.images)) == 64


@pytest.mark.parametrize(("size", "rounds"), [(1, 1), (3, 2), (5, 7), (64, 3), (100, 300)])
def test_it_is_complete_by_the_middle_and_holds_at_least_its_size(size, rounds):
    bank = AgreementBank(size, rounds, torch.device("cpu"))
    gathered = fill(bank, rounds)
    assert bank.complete
    assert gathered[-1] <= max(1, (rounds + 1) // 2)
    assert size <= sum(map(len, bank.images)) < size + SLICES


def test_agreement_is_the_fraction_of_images_named_alike():
    bank = AgreementBank(size=12, rounds=4, device=torch.device("cpu"))
    fill(bank, 4)
    like_the_teacher = lambda images: torch.nn.functional.one_hot(images[:, 0].long(), 3).float()  # noqa: E731
    always_0 = lambda images: torch.tensor([[1.0, 0.0, 0.0]]).expand(len(images), 3)  # noqa: E731
    assert bank.agreement(like_the_teacher) == 1
    assert bank.agreement(always_0) == pytest.approx(1 / 3)


def test_it_goes_on_from_its_state():
    bank, restored = (AgreementBank(size=8, rounds=16, device=torch.device("cpu")) for _ in range(2))
    fill(bank, 3)
    restored.load_state_dict(bank.state_dict())
    assert not restored.is_due(3)
    assert restored.is_due(4)
    assert all(torch.equal(a, b) for a, b in zip(bank.images, restored.images, strict=True))
