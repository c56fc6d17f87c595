"""Distilling from a network of torchvision at 64 pixels.

    pip install torchvision && python examples/torchvision_teacher.py weights.pt

The weights are a state dict of your ``torchvision.models.resnet18(num_classes=10)``.
"""

import sys

import torch
import torchvision

import dfad
from dfad.config import (
    DistillConfig,
    GeneratorConfig,
    MethodConfig,
    OptimizerConfig,
    OptimizersConfig,
    RegularizerConfig,
    SelectionConfig,
    TeacherConfig,
)
from dfad.models import resnet20


def main(
    weights: str | None = None, rounds: int = 2000, batch_size: int = 128, width: int = 64, run_dir: str | None = None
) -> dfad.Result:
    """Distil into a ResNet-20; without weights from a teacher that knows nothing, to see that it runs."""
    teacher = torchvision.models.resnet18(num_classes=10)
    if weights is not None:
        teacher.load_state_dict(torch.load(weights, weights_only=True))
    config = DistillConfig(
        teacher=TeacherConfig(image_size=64, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
        generator=GeneratorConfig(width=width),
        method=MethodConfig(
            rounds=rounds,
            batch_size=batch_size,
            regularizers=RegularizerConfig(batchnorm=1.0, one_hot=1.0, diversity=5.0),
        ),
        optimizer=OptimizersConfig(student=OptimizerConfig(lr=0.05, weight_decay=5e-4)),
        selection=SelectionConfig(bank_size=batch_size),
    )
    return dfad.distill(teacher, resnet20(num_classes=10), config, run_dir=run_dir)


if __name__ == "__main__":
    print(main(*sys.argv[1:2], run_dir="runs/torchvision"))
