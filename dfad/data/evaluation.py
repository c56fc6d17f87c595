"""How good a classifier is on a data set."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from dfad.data import BatchSource, DataConfig, batch_source, in_order, open_dataset
from dfad.metrics import top_k_accuracy
from dfad.models.probing import as_outputs
from dfad.modes import evaluating

BATCH_SIZE = 500


def predict(network: nn.Module, source: BatchSource, count: int) -> tuple[Tensor, Tensor]:
    """Logits ``float32 (count, classes)`` in eval mode for every image once, and the labels; both on the CPU."""
    logits, labels = [], []
    with evaluating(network), torch.inference_mode():
        for images, truth in source.batches(in_order(count), BATCH_SIZE, drop_last=False):
            logits.append(as_outputs(network(images)).logits.float())
            labels.append(truth)
        return torch.cat(logits).cpu(), torch.cat(labels).cpu()


class Evaluator:
    """Accuracy on the test split of a data set.

    Args:
        config: the data set, opened at once.
        device: where the networks to be measured are.
        normalisation: mean and standard deviation per channel that their images are normalised with, of pixels in
            0–1; the data set's own where not given.
    """

    def __init__(
        self,
        config: DataConfig,
        device: torch.device,
        normalisation: tuple[Sequence[float], Sequence[float]] | None = None,
    ) -> None:
        self.dataset = open_dataset(config)
        if normalisation and normalisation[0]:
            mean, std = map(tuple, normalisation)
            self.dataset = replace(self.dataset, mean=mean, std=std)
        self.source = batch_source(self.dataset, self.dataset.test, config.backend, device)

    def __call__(self, network: nn.Module) -> float:
        """Fraction of the test images that a network classifies right."""
        return top_k_accuracy(*self.predict(network))

    def predict(self, network: nn.Module) -> tuple[Tensor, Tensor]:
        """Logits of the test images and their labels."""
        return predict(network, self.source, len(self.dataset.test))
