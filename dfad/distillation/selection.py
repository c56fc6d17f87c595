"""Selection of the best student without labels: agreement with the teacher on a fixed bank of generated images."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

SLICES = 8
"""Number of points of the run whose generators contribute to the bank, so that its images are diverse."""


class AgreementBank:
    """Generated images with the teacher's predictions, held out from training.

    It fills in equal slices over the first half of the rounds and never changes after that: agreements before and
    after could not be compared otherwise. So a student is a candidate from the middle of a run on. A run that is
    extended keeps the bank of its first plan.

    Args:
        size: total number of images.
        rounds: total number of the run.
        device: of the images.
    """

    def __init__(self, size: int, rounds: int, device: torch.device) -> None:
        self.device = device
        slices = min(SLICES, size, max(1, rounds // 2))
        self.due_rounds = [round(rounds * (i + 1) / (2 * slices)) for i in range(slices)]
        self.slice_size = -(-size // slices)
        self.images: list[Tensor] = []
        self.labels: list[Tensor] = []

    @property
    def complete(self) -> bool:
        """Whether the bank is complete."""
        return len(self.images) == len(self.due_rounds)

    def is_due(self, round_index: int) -> bool:
        """Whether the next slice is due after this number of rounds."""
        return not self.complete and round_index >= self.due_rounds[len(self.images)]

    def add(self, images: Tensor, teacher_logits: Tensor) -> None:
        """Add the next slice."""
        self.images.append(images)
        self.labels.append(teacher_logits.argmax(dim=1))

    def agreement(self, classify: Callable[[Tensor], Tensor]) -> float:
        """Fraction of the bank to which a student, a function from images to logits, gives the teacher's class."""
        agreeing = [
            (classify(images).argmax(dim=1) == labels).float().mean()
            for images, labels in zip(self.images, self.labels, strict=True)
        ]
        return torch.stack(agreeing).mean().item()

    def state_dict(self) -> dict[str, Any]:
        """State for a checkpoint."""
        plan = {"due_rounds": self.due_rounds, "slice_size": self.slice_size}
        return {"images": self.images, "labels": self.labels, **plan}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the state of a checkpoint."""
        self.images = [images.to(self.device) for images in state["images"]]
        self.labels = [labels.to(self.device) for labels in state["labels"]]
        if "due_rounds" in state:  # checkpoints of version 0.1.0 have none
            self.due_rounds, self.slice_size = state["due_rounds"], state["slice_size"]
