"""The exported student: a function from images to logits."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dfad.errors import ExportError, ModelError
from dfad.models.outputs import as_outputs
from dfad.models.probing import parameter_count

Function = Callable[[Tensor], Tensor]
"""A function from images ``(B, channels, height, width)`` to logits ``(B, classes)``."""


class Classifier(nn.Module):
    """A network that takes images and returns only its logits.

    Args:
        network: in eval mode; shared, not copied.
        mean: per channel, to normalise images in 0–1; empty if images are already normalised.
        std: per channel, or empty.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, mean: Sequence[float] = (), std: Sequence[float] = ()) -> None:
        super().__init__()
        self.network = network
        self.normalises = bool(mean)
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(B, classes)``."""
        if self.normalises:
            images = (images - self.mean) / self.std
        return as_outputs(self.network(images)).logits


@dataclass(frozen=True)
class Delivery:
    """A student and facts about it."""

    network: nn.Module
    """The student in eval mode, without taps, on the CPU."""
    manifest: dict[str, Any]
    """The manifest of its file, see :func:`dfad.models.model_file.read_manifest`."""
    normalise: bool = False
    """Whether the exported network takes pixels in 0–1 and normalises them itself."""
    about: dict[str, Any] = field(default_factory=dict)
    """Settings (``config``) and result of its run, for the model card."""

    def __post_init__(self) -> None:
        if self.normalise and not self.mean:
            raise ModelError(
                "The normalisation cannot be built in: the student's file does not contain it. Distil with "
                "--teacher.mean and --teacher.std, or leave out --normalise."
            )

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """``(channels, height, width)``."""
        channels, height, width = self.manifest["image_shape"]
        return channels, height, width

    @property
    def mean(self) -> list[float]:
        """Mean per channel of the student's images, for pixels in 0–1; empty if unknown."""
        return list(self.manifest.get("mean", ()))

    @property
    def std(self) -> list[float]:
        """Standard deviation per channel; empty if unknown."""
        return list(self.manifest.get("std", ()))

    @property
    def taken_normalisation(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation per channel of the images that the exported network takes; empty if unknown."""
        channels = self.image_shape[0]
        return ([0.0] * channels, [1.0] * channels) if self.normalise else (self.mean, self.std)

    @property
    def classifier(self) -> Classifier:
        """The network to export."""
        return Classifier(self.network, *((self.mean, self.std) if self.normalise else ())).eval()

    @property
    def classes(self) -> int:
        """Number of classes."""
        with torch.no_grad():
            return self.classifier(self.example).shape[1]

    @property
    def example(self) -> Tensor:
        """Two blank images; with one, the export could treat the batch size as a constant."""
        return torch.zeros(2, *self.image_shape)

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return parameter_count(self.network)

    def as_taken(self, normalised: Tensor) -> Tensor:
        """Converts normalised images to the form that the exported network takes."""
        if not self.normalise:
            return normalised
        return normalised * torch.tensor(self.std).view(-1, 1, 1) + torch.tensor(self.mean).view(-1, 1, 1)


def member_of_family(network: nn.Module, package: str) -> nn.Module | None:
    """The network of a package's own class that a network is or wraps; None if there is none."""
    for module in network.modules():
        names = {kind.__module__.partition(".")[0] for kind in type(module).__mro__}
        if package in names and parameter_count(module) == parameter_count(network) and _is_whole(module, package):
            return module
    return None


def _is_whole(module: nn.Module, package: str) -> bool:
    # attributes that models of the packages have, and layers do not
    return hasattr(module, "save_pretrained" if package == "transformers" else "pretrained_cfg")


@torch.no_grad()
def largest_difference(original: Function, delivered: Function, batches: Iterable[Tensor]) -> tuple[float, float]:
    """The largest absolute difference of the logits, and the largest absolute logit.

    Args:
        original: the exported network.
        delivered: the network that was loaded back.
        batches: images of several batch sizes.

    Raises:
        ExportError: if the loaded network refuses a batch, or returns another shape.
    """
    difference = magnitude = 0.0
    for images in batches:
        wanted = original(images)
        try:
            found = delivered(images)
        except Exception as error:  # every runtime has its own errors
            raise ExportError(f"It takes no batch of {len(images)}: {error}") from error
        if found.shape != wanted.shape:
            raise ExportError(f"It returns logits of shape {tuple(found.shape)} instead of {tuple(wanted.shape)}.")
        gap = (found - wanted).abs().max().item()
        if math.isnan(gap):
            raise ExportError("It returns NaN.")
        difference, magnitude = max(difference, gap), max(magnitude, wanted.abs().max().item())
    return difference, magnitude
