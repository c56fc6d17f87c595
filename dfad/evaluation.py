"""How good a classifier is on a data set."""

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
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


def top_k_accuracy(logits: Tensor, labels: Tensor, k: int = 1) -> float:
    """Fraction of the images whose label is among the ``k`` highest logits."""
    return (logits.topk(k, dim=1).indices == labels[:, None]).any(dim=1).double().mean().item()


def confusion_matrix(logits: Tensor, labels: Tensor) -> Tensor:
    """``int64 (classes, classes)``: images of each class (rows) by the class that they were taken for (columns)."""
    classes = logits.shape[1]
    return torch.bincount(labels * classes + logits.argmax(dim=1), minlength=classes**2).view(classes, classes)


def expected_calibration_error(logits: Tensor, labels: Tensor, bins: int = 15) -> float:
    r"""How far confidence is from accuracy.

    .. math:: \sum_b \frac{|B_b|}{n} \left| \operatorname{acc}(B_b) - \operatorname{conf}(B_b) \right|

    Guo et al., ICML 2017, with bins of equal width.

    Args:
        logits: ``(B, classes)``.
        labels: ``(B,)``.
        bins: into which confidences are sorted.
    """
    confidences, predictions = logits.double().softmax(dim=1).max(dim=1)
    gaps = (predictions == labels).double() - confidences
    # a bin holds its upper edge, so that full confidence is in the last
    places = (confidences * bins).ceil().long().clamp(1, bins) - 1
    return torch.zeros(bins, dtype=torch.float64).index_add(0, places, gaps).abs().sum().item() / len(labels)


def agreement(logits: Tensor, teacher_logits: Tensor) -> float:
    """Fraction of the images that both take for the same class."""
    return (logits.argmax(dim=1) == teacher_logits.argmax(dim=1)).double().mean().item()


def teacher_divergence(logits: Tensor, teacher_logits: Tensor) -> float:
    """Mean Kullback-Leibler divergence KL(teacher ‖ student) of the predictions, in nats."""
    log_student, log_teacher = (x.double().log_softmax(dim=1) for x in (logits, teacher_logits))
    return F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True).item()
