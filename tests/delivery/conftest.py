"""A finished run to export."""

from pathlib import Path

import pytest
from torch import nn

from dfad import models, train

TEACHER = Path(__file__).parents[1] / "fixtures" / "teacher-of-0.1.0.safetensors"

ARGUMENTS = [
    "--preset=own", f"--teacher.checkpoint={TEACHER}", "--method.rounds=4", "--method.student_steps=2",
    "--method.warm_up=2", "--method.batch_size=16", "--method.image_bank.size=32", "--generator.noise_dim=8",
    "--generator.width=8", "--selection.bank_size=32", "--selection.every=2", "--recording.log_every=1", "--device=cpu",
    "--engine.precision=float32", "--evaluate", "--data.name=digits",
]  # fmt: skip
"""A whole run in a second, of a teacher that knows the digits."""


def distil(folder: Path, *arguments: str, factory: str = "convnet", kwargs: str = '{"channels": [4, 8, 8]}') -> Path:
    """The folder of a finished run."""
    student = f"--student.factory={factory}", f"--student.kwargs={kwargs}"
    train.main([*ARGUMENTS, *student, f"--run_dir={folder}", *arguments])
    return folder


@pytest.fixture(scope="session")
def run(tmp_path_factory) -> Path:
    """Not to be written to."""
    return distil(tmp_path_factory.mktemp("delivery") / "run", kwargs='{"channels": [4, 8, 8], "in_channels": 1}')


class Logits(nn.Module):
    """A network whose stages are to be tapped by name."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = models.convnet(channels=(4, 8, 8), in_channels=1).stages
        self.head = nn.Linear(8, 10)

    def forward(self, images):
        for stage in self.stages:
            images = stage(images).relu()
        return self.head(images.mean(dim=(2, 3)))


class Branching(Logits):
    """Branches on a value: no program can be made of it."""

    def forward(self, images):
        return super().forward(images) * (2.0 if images.mean() > 0 else 1.0)
