"""The path of ``make proof`` on a stand-in for torchvision."""

from tests.compat import proof


def test_a_stand_in_comes_from_inspection_to_a_delivered_student(torchvision, tmp_path, monkeypatch):
    monkeypatch.setattr(proof, "SIZE", 16)
    row = proof.quietly(
        lambda: proof.prove("torchvision:small", {"num_classes": 10}, tmp_path, proof.make_images(tmp_path / "images"))
    )
    assert row.difference.weights < 1e-3
    assert 0 < row.rounding.logits < 1e-3
    assert row.taps == 1
    page = proof.page([row, ("timm:other", "ValueError: no")], ())
    assert f"| torchvision:small | {row.parameters:,} | 1 BatchNorm2d | 1 |" in page
    assert "| timm:other | | | | | | | failed: ValueError: no |" in page


def test_a_difference_is_explained_by_rounding_in_both_of_its_numbers_or_not_at_all():
    little = proof.Difference(0.0, 0.0)
    assert proof.Difference(9e-3, 9e-4).explained_by(little)
    assert not proof.Difference(2e-2, 0.0).explained_by(little)
    assert not proof.Difference(0.0, 2e-3).explained_by(little)
    assert proof.Difference(2e-2, 2e-3).explained_by(proof.Difference(1e-2, 1e-3))
