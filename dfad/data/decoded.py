"""Images that are already decoded."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class DecodedSplit:
    """Images in memory."""

    images: Tensor
    """``uint8 (N, channels, height, width)``."""

    labels: Tensor
    """``int64 (N,)``."""

    source: str = ""
    """Source files, for messages."""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """``(channels, height, width)``."""
        _, channels, height, width = self.images.shape
        return channels, height, width

    def decoded(self) -> "DecodedSplit":
        """Itself."""
        return self

    def subset(self, indices: Sequence[int]) -> "DecodedSplit":
        """The images at these indices."""
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        return DecodedSplit(self.images[chosen], self.labels[chosen], self.source)

    def content_hash(self) -> bytes:
        """SHA-256 of pixels and labels."""
        digest = hashlib.sha256(str(tuple(self.images.shape)).encode())
        digest.update(self.images.contiguous().numpy().tobytes())
        digest.update(self.labels.numpy().tobytes())
        return digest.digest()
