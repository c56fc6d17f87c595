"""How good a classifier is on a data set."""

import torch
from torch import Tensor, nn

from dfad.data import BatchSource, DataConfig, batch_source, in_order, open_dataset
from dfad.loading import as_outputs
from dfad.modes import evaluating

BATCH_SIZE = 500


def predict(network: nn.Module, source: BatchSource, count: int) -> tuple[Tensor, Tensor]:
    """Logits ``float32 (count, classes)`` in eval mode for every image once, and the labels; both on the CPU."""
    logits, labels = [], []
    with evaluating(network), torch.inference_mode():
        for images, truth in source.batches(in_order(count), BATCH_SIZE, drop_last=False):
            logits.append(as_outputs(network(images)).logits.float().cpu())
            labels.append(truth.cpu())
    return torch.cat(logits), torch.cat(labels)


class Evaluator:
    """Accuracy on the test split of a data set.

    Args:
        config: the data set, opened at once.
        device: where the networks to be measured are.
    """

    def __init__(self, config: DataConfig, device: torch.device) -> None:
        self.dataset = open_dataset(config)
        self.source = batch_source(self.dataset, self.dataset.test, config.backend, device)

    def __call__(self, network: nn.Module) -> float:
        """Fraction of the test images that a network classifies right."""
        logits, labels = predict(network, self.source, len(self.dataset.test))
        return (logits.argmax(dim=1) == labels).double().mean().item()
