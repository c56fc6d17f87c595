"""Two networks that do not wait for each other, each on a CUDA stream of its own."""

from collections.abc import Callable
from typing import TypeVar

import torch

One = TypeVar("One")
Other = TypeVar("Other")


class TwoStreams:
    """Runs two works at once, for networks that are too small to fill a GPU.

    The side stream begins after all that was launched before, and everything launched later comes after it. So memory
    that either work frees is used again only when both have done with it, in a captured graph as well.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.side = torch.cuda.Stream(device)

    def both(self, aside: Callable[[], One], ahead: Callable[[], Other]) -> tuple[One, Other]:
        """What two works return.

        Args:
            aside: on the side stream; nothing in it takes a gradient, whose pass would run there too.
            ahead: on the current stream.
        """
        current = torch.cuda.current_stream(self.device)
        self.side.wait_stream(current)
        with torch.cuda.stream(self.side):
            one = aside()
        other = ahead()
        current.wait_stream(self.side)
        return one, other
