"""The digits of scikit-learn as tensors, and a teacher that is trained on them; what the other examples start from."""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from dfad.models import convnet

MEAN, STD = 0.3054, 0.3760


def digits() -> tuple[TensorDataset, TensorDataset]:
    """Images ``(1, 8, 8)`` with labels: 1437 to train on, 360 to test."""
    data = load_digits()
    images = (torch.tensor(data.images, dtype=torch.float32) / 16 - MEAN) / STD
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, labels = images[order, None], torch.tensor(data.target)[order]
    return TensorDataset(images[:1437], labels[:1437]), TensorDataset(images[1437:], labels[1437:])


def trained_teacher(train: TensorDataset, epochs: int = 8) -> nn.Module:
    """A network of dfad.models: it returns logits and taps."""
    teacher = convnet(channels=(16, 32, 64), in_channels=1)
    optimizer = torch.optim.SGD(teacher.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    images, labels = train.tensors
    for epoch in range(epochs):
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * (1 - epoch / epochs)
        for batch in torch.randperm(len(images)).split(64):
            loss = F.cross_entropy(teacher(images[batch]).logits, labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return teacher.eval().requires_grad_(False)


@torch.no_grad()
def accuracy(network: nn.Module, test: TensorDataset) -> float:
    """Fraction of the test images that a network of dfad.models classifies right."""
    images, labels = test.tensors
    logits: Tensor = network.eval()(images).logits
    return (logits.argmax(dim=1) == labels).float().mean().item()
