"""Two independent networks on two CUDA streams."""

from collections.abc import Callable
from typing import TypeVar

import torch

One = TypeVar("One")
Other = TypeVar("Other")


class TwoStreams:
    """Runs two functions in parallel, for networks that are too small to fill a GPU.

    The side stream starts after everything launched before, and everything launched later runs after it. So memory that
    either function frees is reused only after both are done, also in a captured graph.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.side = torch.cuda.Stream(device)

    def both(self, aside: Callable[[], One], ahead: Callable[[], Other]) -> tuple[One, Other]:
        """The results of two functions.

        Args:
            aside: runs on the side stream, without gradients, whose backward pass would run there too.
            ahead: runs on the current stream.
        """
        current = torch.cuda.current_stream(self.device)
        self.side.wait_stream(current)
        with torch.cuda.stream(self.side):
            one = aside()
        other = ahead()
        current.wait_stream(self.side)
        return one, other
