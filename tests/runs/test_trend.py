"""Whether a student still gets better."""

import pytest

from dfad.runs.trend import direction, duration, improves, recent_change, verdict


def history(*agreements: float) -> list[dict[str, float]]:
    records = [{"round": 10.0 * (index + 1), "agreement": value} for index, value in enumerate(agreements)]
    return [*records, {"round": 999.0, "student_loss": 1.0}]


def test_the_change_is_that_of_the_last_half():
    change, span = recent_change(history(0.1, 0.2, 0.3, 0.5, 0.5, 0.5))
    assert (change, span) == (pytest.approx(0), 20)
    change, span = recent_change(history(0.9, 0.1, 0.5, 0.6, 0.7, 0.8))
    assert (change, span) == (pytest.approx(0.2), 20)


def test_one_lucky_evaluation_is_less_of_a_trend_than_its_height():
    change, _ = recent_change(history(0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.6))
    assert 0 < change < 0.1


@pytest.mark.parametrize("agreements", [(), (0.5,), (0.5, 0.6)])
def test_of_too_few_evaluations_nothing_is_said(agreements):
    assert recent_change(history(*agreements)) is None
    assert not improves(history(*agreements))
    assert "too seldom" in verdict(history(*agreements))


@pytest.mark.parametrize(
    ("agreements", "word", "better"),
    [
        ((0.5, 0.6, 0.7), "still rose by 20.0% of the images over the last 20 rounds", True),
        ((0.7, 0.6, 0.5), "fell by 20.0% of the images over the last 20 rounds", False),
        ((0.7, 0.7, 0.701), "was steady over the last 20 rounds", False),
    ],
)
def test_the_verdict(agreements, word, better):
    assert word in verdict(history(*agreements))
    assert improves(history(*agreements)) is better


def test_words():
    assert [direction(change) for change in (0.02, 0.001, -0.001, -0.02)] == ["rising", "steady", "steady", "falling"]
    assert [duration(seconds) for seconds in (0.4, 59, 61, 3600, 7322)] == [
        "0 s", "59 s", "1 min 01 s", "1 h 00 min", "2 h 02 min",
    ]  # fmt: skip
