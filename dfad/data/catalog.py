"""Data sets by name."""

from collections.abc import Callable

from dfad.data.config import DataConfig
from dfad.data.dataset import Dataset
from dfad.data.digits import read_digits
from dfad.errors import DataError, nearest

READERS: dict[str, Callable[[DataConfig], Dataset]] = {
    "digits": lambda config: read_digits(),
}


def open_dataset(config: DataConfig) -> Dataset:
    """The data set that a configuration names.

    Raises:
        DataError: if it is unknown, missing or damaged.
    """
    if config.name not in READERS:
        raise DataError(
            f"There is no data set {config.name!r}.{nearest(config.name, READERS)} Choose one of: {', '.join(READERS)}."
        )
    return READERS[config.name](config)
