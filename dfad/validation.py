"""Checks of settings: errors that quote the name, the value and what is needed."""

import math


def require(condition: bool, name: str, value: object, need: str) -> None:
    """Check a condition on a value.

    Raises:
        ValueError: if the condition does not hold.
    """
    if not condition:
        raise ValueError(f"{name} is {value}; it must be {need}")


def positive(**values: float) -> None:
    """Check that values are positive and finite."""
    for name, value in values.items():
        require(math.isfinite(value) and value > 0, name, value, "positive and finite")


def not_negative(**values: float) -> None:
    """Check that values are finite and not negative."""
    for name, value in values.items():
        require(math.isfinite(value) and value >= 0, name, value, "finite and not negative")


def fraction(**values: float) -> None:
    """Check that values are in [0, 1)."""
    for name, value in values.items():
        require(0 <= value < 1, name, value, "in [0, 1)")
