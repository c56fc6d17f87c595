"""The losses of this project in Hugging Face's Trainer, with a student of transformers.

pip install transformers accelerate && python examples/with_transformers.py
"""

import tempfile

import torch
from digits import digits, trained_teacher
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments

from dfad.losses import InterpolatedKLDivLoss


class DistillationTrainer(Trainer):
    """A Trainer whose loss is the divergence from a teacher."""

    def __init__(self, *arguments, teacher: torch.nn.Module, **options) -> None:
        super().__init__(*arguments, **options)
        self.teacher = teacher
        self.divergence = InterpolatedKLDivLoss(temperature=4.0)

    def compute_loss(self, model, inputs, return_outputs=False, **_):
        with torch.no_grad():
            from_teacher = self.teacher.to(inputs["pixel_values"].device)(inputs["pixel_values"])
        outputs = model(pixel_values=inputs["pixel_values"])
        loss = self.divergence(outputs.logits, from_teacher.logits, 1.0)
        return (loss, outputs) if return_outputs else loss


def main(epochs: int = 10) -> float:
    """Returns the student's accuracy."""
    torch.manual_seed(0)
    train, test = digits()
    config = ResNetConfig(
        num_channels=1, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=10
    )
    student = ResNetForImageClassification(config)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, num_train_epochs=epochs, per_device_train_batch_size=64, learning_rate=3e-3,
            remove_unused_columns=False, report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        rows = [{"pixel_values": image, "labels": label} for image, label in zip(*train.tensors, strict=True)]
        DistillationTrainer(student, arguments, train_dataset=rows, teacher=trained_teacher(train)).train()
    images, labels = test.tensors
    with torch.no_grad():
        logits = student.cpu().eval()(pixel_values=images).logits
    found = (logits.argmax(dim=1) == labels).float().mean().item()
    print(f"student {found:.1%}")
    return found


if __name__ == "__main__":
    main()
