"""The equations of the method as functions of tensors."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dfad_kernels import activation_boundary_loss as activation_boundary_loss
from dfad_kernels import batchnorm_distance as batchnorm_distance
from dfad_kernels import interpolated_kl_div as interpolated_kl_div
from dfad_kernels import normalized_squared_error as normalized_squared_error


def one_hot_loss(teacher_logits: Tensor) -> Tensor:
    r"""Cross-entropy of the teacher's prediction against its own argmax, averaged over the batch.

    Chen et al., "Data-Free Learning of Student Networks" (DAFL), ICCV 2019.

    Args:
        teacher_logits: ``(B, classes)``.
    """
    return F.cross_entropy(teacher_logits.float(), teacher_logits.argmax(dim=1))


def diversity_loss(teacher_logits: Tensor, average: Callable[[Tensor], Tensor] = lambda mean: mean) -> Tensor:
    r"""Negative entropy of the batch's mean prediction, in nats: lowest if all classes are equally frequent.

    .. math:: \sum_c \bar p_c \log \bar p_c, \quad \bar p = \frac1B \sum_i \operatorname{softmax}(t_i)

    "Information entropy loss" of Chen et al. (DAFL), ICCV 2019, with the natural logarithm.

    Args:
        teacher_logits: ``(B, classes)``.
        average: makes the whole batch's mean of that of these logits, where they are a share of it.
    """
    mean_prediction = average(teacher_logits.float().softmax(dim=1).mean(dim=0))
    return -torch.special.entr(mean_prediction).sum()


def class_entropy(logits: Tensor) -> Tensor:
    """Entropy of the histogram of predicted classes, relative to its maximum: 1 is uniform, 0 is a single class.

    The maximum is the logarithm of the number of classes or of images, whichever is smaller.
    """
    images, classes = logits.shape
    predicted = logits.argmax(dim=1, keepdim=True) == torch.arange(classes, device=logits.device)
    frequencies = predicted.float().mean(dim=0)
    return torch.special.entr(frequencies).sum() / math.log(max(min(classes, images), 2))


def pairwise_diversity(images: Tensor) -> Tensor:
    """Mean absolute difference between a batch and its reverse, relative to the batch's standard deviation.

    Images are independent, so the reverse pairs them as well as a random permutation would.
    """
    images = images.float()
    # biased: a single image has deviation 0, not NaN
    return (images - images.flip(0)).abs().mean() / images.std(correction=0).clamp_min(1e-12)


def mix(images: Tensor, mixing_coefficient: Tensor) -> Tensor:
    """Images interpolated with those of the reversed batch.

    Args:
        images: ``(B, ...)``.
        mixing_coefficient: of the image itself, in [0, 1]; shape ``()`` or ``(B,)``.
    """
    weight = mixing_coefficient.to(images.dtype).view(-1, *[1] * (images.ndim - 1))
    return torch.lerp(images.flip(0), images, weight)
