"""Ordinary distillation on real images in a plain PyTorch loop, with the losses of this project.

python examples/plain_pytorch.py
"""

import torch
from digits import accuracy, digits, trained_teacher

from dfad.losses import ActivationBoundaryLoss, InterpolatedKLDivLoss
from dfad.models import convnet


def main(epochs: int = 10) -> float:
    """Distil a student of the teacher's stages and a quarter of its channels; returns its accuracy."""
    torch.manual_seed(0)
    train, test = digits()
    teacher = trained_teacher(train)
    # the taps of both must have the same shape for the activation loss; 1×1 convolutions bring them there
    student = convnet(channels=(4, 8, 16), in_channels=1)
    connectors = torch.nn.ModuleList(torch.nn.Conv2d(width, 4 * width, 1) for width in (4, 8, 16))
    divergence = InterpolatedKLDivLoss(temperature=4.0)
    activation = ActivationBoundaryLoss(margin=1.0)

    optimizer = torch.optim.AdamW([*student.parameters(), *connectors.parameters()], lr=3e-3)
    images, _ = train.tensors
    for _ in range(epochs):
        student.train()
        for batch in torch.randperm(len(images)).split(64):
            with torch.no_grad():
                from_teacher = teacher(images[batch])
            from_student = student(images[batch])
            taps = [connect(tap) for connect, tap in zip(connectors, from_student.taps, strict=True)]
            loss = divergence(from_student.logits, from_teacher.logits, mixing_coefficient=1.0)
            loss = loss + 0.1 * activation(taps, from_teacher.taps)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    print(f"teacher {accuracy(teacher, test):.1%}, student {accuracy(student, test):.1%}")
    return accuracy(student, test)


if __name__ == "__main__":
    main()
