"""How good a classifier's predictions are."""

import torch
import torch.nn.functional as F
from torch import Tensor


def top_k_accuracy(logits: Tensor, labels: Tensor, k: int = 1) -> float:
    """Fraction of the images whose label is among the ``k`` highest logits."""
    return (logits.topk(k, dim=1).indices == labels[:, None]).any(dim=1).double().mean().item()


def confusion_matrix(logits: Tensor, labels: Tensor) -> Tensor:
    """``int64 (classes, classes)``: number of images by true class (rows) and predicted class (columns)."""
    classes = logits.shape[1]
    return torch.bincount(labels * classes + logits.argmax(dim=1), minlength=classes**2).view(classes, classes)


def expected_calibration_error(logits: Tensor, labels: Tensor, bins: int = 15) -> float:
    r"""Expected calibration error: the mean gap between confidence and accuracy.

    .. math:: \sum_b \frac{|B_b|}{n} \left| \operatorname{acc}(B_b) - \operatorname{conf}(B_b) \right|

    Guo et al., ICML 2017, with bins of equal width.

    Args:
        logits: ``(B, classes)``.
        labels: ``(B,)``.
        bins: number of bins of equal width for the confidences.
    """
    confidences, predictions = logits.double().softmax(dim=1).max(dim=1)
    gaps = (predictions == labels).double() - confidences
    # a bin includes its upper edge, so that a confidence of 1 is in the last one
    places = (confidences * bins).ceil().long().clamp(1, bins) - 1
    return torch.zeros(bins, dtype=torch.float64).index_add(0, places, gaps).abs().sum().item() / len(labels)


def agreement(logits: Tensor, teacher_logits: Tensor) -> float:
    """Fraction of the images to which both give the same class."""
    return (logits.argmax(dim=1) == teacher_logits.argmax(dim=1)).double().mean().item()


def teacher_divergence(logits: Tensor, teacher_logits: Tensor) -> float:
    """Mean Kullback-Leibler divergence KL(teacher ‖ student) of the predictions, in nats."""
    log_student, log_teacher = (x.double().log_softmax(dim=1) for x in (logits, teacher_logits))
    return F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True).item()
