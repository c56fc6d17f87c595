"""The losses of this project in PyTorch Lightning.

pip install lightning && python examples/with_lightning.py
"""

import lightning
import torch
from digits import accuracy, digits, trained_teacher
from torch.utils.data import DataLoader

from dfad.losses import InterpolatedKLDivLoss
from dfad.models import convnet


class Distillation(lightning.LightningModule):
    """A student that learns from a teacher; the teacher is no submodule, so that no checkpoint holds it."""

    def __init__(self, student: torch.nn.Module, teacher: torch.nn.Module) -> None:
        super().__init__()
        self.student = student
        self.__dict__["teacher"] = teacher
        self.divergence = InterpolatedKLDivLoss(temperature=4.0)

    def training_step(self, batch, _):
        images, _ = batch
        with torch.no_grad():
            from_teacher = self.__dict__["teacher"].to(self.device)(images)
        # virtual interpolation: images mixed with those of the reversed batch, soft labels mixed alike
        mixing = torch.rand(len(images), device=self.device)
        mixed = torch.lerp(images.flip(0), images, mixing.view(-1, 1, 1, 1))
        loss = self.divergence(self.student(images).logits, from_teacher.logits, 1.0)
        loss = loss + self.divergence(self.student(mixed).logits, from_teacher.logits, mixing)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def main(epochs: int = 10) -> float:
    """Returns the student's accuracy."""
    lightning.seed_everything(0)
    train, test = digits()
    teacher = trained_teacher(train)
    student = convnet(channels=(4, 8, 16), in_channels=1)
    trainer = lightning.Trainer(
        max_epochs=epochs, accelerator="auto", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    trainer.fit(Distillation(student, teacher), DataLoader(train, batch_size=64, shuffle=True, drop_last=True))
    print(f"teacher {accuracy(teacher, test):.1%}, student {accuracy(student.cpu(), test):.1%}")
    return accuracy(student, test)


if __name__ == "__main__":
    main()
