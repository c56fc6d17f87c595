"""Distilling without data from a teacher of your own into a student of your own, in Python.

python examples/own_networks.py
"""

import torch
from digits import MEAN, STD, digits
from torch import nn

import dfad
from dfad.config import (
    ActivationConfig,
    DistillConfig,
    GeneratorConfig,
    InterpolationConfig,
    MethodConfig,
    OptimizerConfig,
    OptimizersConfig,
    RegularizerConfig,
    SelectionConfig,
    TeacherConfig,
)
from dfad.models.taps import with_taps


def network(width: int) -> nn.Sequential:
    """Any network that returns logits."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 3, padding=1, bias=False), nn.BatchNorm2d(2 * width), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 10),
    )  # fmt: skip


def trained(epochs: int = 10) -> nn.Module:
    """The teacher: here from the digits, in earnest from your file."""
    (images, labels), teacher = digits()[0].tensors, network(width=32)
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=3e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(64):
            loss = nn.functional.cross_entropy(teacher(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return teacher.eval()


def main(rounds: int = 100, run_dir: str | None = None) -> dfad.Result:
    """Distil; the digits serve to measure alone."""
    torch.manual_seed(0)
    images, labels = digits()[1].tensors

    def evaluate(student: nn.Module) -> float:
        with torch.no_grad():
            return (student(images).logits.argmax(dim=1) == labels).float().mean().item()

    # taps are named modules before each ReLU: the regularizer of activations compares them
    teacher = with_taps(trained(), ["1", "5"])
    student = with_taps(network(width=16), ["1", "5"])
    config = DistillConfig(
        device="cpu",
        teacher=TeacherConfig(image_size=8, channels=1, mean=(MEAN,), std=(STD,)),
        generator=GeneratorConfig(noise_dim=64, width=32),
        method=MethodConfig(
            rounds=rounds,
            activation=ActivationConfig(weight=0.03),
            interpolation=InterpolationConfig(weight=1.0, labels="teacher", step="own"),
            regularizers=RegularizerConfig(batchnorm=0.1, one_hot=0.1, diversity=5.0),
        ),
        optimizer=OptimizersConfig(student=OptimizerConfig(lr=0.3, weight_decay=5e-4)),
        selection=SelectionConfig(every=10),
    )
    result = dfad.Distiller(teacher, student, config, evaluate=evaluate).fit(run_dir)
    print(f"agreement on generated images {result.agreement:.1%}, accuracy on digits {result.accuracy:.1%}")
    return result


if __name__ == "__main__":
    main(run_dir="runs/own-networks")
