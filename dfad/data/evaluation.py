"""Accuracy of a classifier on a data set."""

import itertools
import logging
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from dfad.data import BatchSource, DataConfig, batch_source, in_order, open_dataset
from dfad.errors import ModelError, name_of
from dfad.metrics import top_k_accuracy
from dfad.models.outputs import as_outputs
from dfad.models.probing import dry_forward, images_taken, require_same_classes
from dfad.modes import evaluating
from dfad.ranks import Ranks, current_ranks

log = logging.getLogger(__name__)

BATCH_SIZE = 500

OTHER_DATA = "Choose other data with --data.name, or measure nothing with --no_evaluate."


def predict(network: nn.Module, source: BatchSource, count: int, ranks: Ranks | None = None) -> tuple[Tensor, Tensor]:
    """Logits ``float32 (count, classes)`` in eval mode for every image once, and the labels; both on the CPU.

    Args:
        network: in the same state on all ranks.
        source: of the images.
        count: of the images.
        ranks: which each take a part of the images, and all get what is returned; those of the process group where not
            given.
    """
    ranks = ranks or current_ranks()
    each = -(-count // ranks.count)
    own = in_order(count).part(slice(ranks.rank * each, (ranks.rank + 1) * each))
    answers = []
    with evaluating(network), torch.no_grad():  # what networks keep of it, they may train with
        for images, truth in source.batches(own, BATCH_SIZE, drop_last=False) if len(own) else ():
            answers.append((as_outputs(network(images)).logits.float().cpu(), truth.cpu()))
    logits, labels = zip(*itertools.chain(*ranks.all_of(answers)), strict=True)
    return torch.cat(logits), torch.cat(labels)


class Evaluator:
    """Accuracy on the test split of a data set.

    Args:
        config: the data set, opened at once.
        device: of the networks to be measured.
        normalisation: mean and standard deviation per channel of the networks' images, for pixels in 0–1; the data
            set's own by default.
    """

    def __init__(
        self,
        config: DataConfig,
        device: torch.device,
        normalisation: tuple[Sequence[float], Sequence[float]] | None = None,
    ) -> None:
        self._said = False
        self.dataset = open_dataset(config)
        if normalisation and normalisation[0]:
            mean, std = map(tuple, normalisation)
            if not len(mean) == len(std) == self.dataset.image_shape[0]:
                raise ModelError(
                    f"The teacher's images are normalised with mean {mean} and std {std}, and those of "
                    f"{self.dataset.name} have {self.dataset.image_shape[0]} channels. Give --teacher.mean and "
                    "--teacher.std with one value per channel, choose other data, or --no_evaluate."
                )
            self.dataset = replace(self.dataset, mean=mean, std=std)
        elif normalisation is not None:  # a teacher of which it is not known
            log.warning(
                "The normalisation of the teacher's images is not known; those of %s are normalised with its own "
                "mean and standard deviation. If those are wrong, give --teacher.mean and --teacher.std.",
                self.dataset.name,
            )
        self.source = batch_source(self.dataset, self.dataset.test, config.backend, device)

    def require_fitting(self, network: nn.Module, image_shape: tuple[int, int, int]) -> None:
        """Check that a network can be measured on these images.

        Args:
            network: to be measured.
            image_shape: ``(channels, height, width)`` of the images that it was trained on.

        Raises:
            ModelError: if it does not take them, or has another number of classes.
        """
        name, given = self.dataset.name, self.dataset.image_shape
        if given[0] != image_shape[0]:
            raise ModelError(
                f"The images of {name} have {given[0]} channels, those of the teacher {image_shape[0]}. {OTHER_DATA} "
                "Image files are converted by --data.channels."
            )
        remedy = f"{OTHER_DATA} Image files are resized by --data.image_size {image_shape[1]}."
        with images_taken(name_of(network), f"the images of {name}", given, remedy):
            classes = dry_forward(network, given).logits.shape[1]
        require_same_classes(network, classes, name, len(self.dataset.classes), OTHER_DATA)
        if given != tuple(image_shape) and not self._said:
            self._said = True
            log.warning(
                "The accuracy is measured on images of %d×%d pixels, the size of %s; the teacher's images are %d×%d.",
                *given[1:], name, *image_shape[1:],
            )  # fmt: skip

    def __call__(self, network: nn.Module) -> float:
        """Fraction of the test images that a network classifies correctly."""
        return top_k_accuracy(*self.predict(network))

    def predict(self, network: nn.Module) -> tuple[Tensor, Tensor]:
        """Logits of the test images and their labels."""
        return predict(network, self.source, len(self.dataset.test))
