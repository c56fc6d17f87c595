"""Settings of ``python -m dfad.train`` by name."""

from dataclasses import dataclass

from dfad.config import (
    ActivationConfig,
    DistillConfig,
    GeneratorConfig,
    InterpolationConfig,
    MethodConfig,
    OptimizerConfig,
    OptimizersConfig,
    RegularizerConfig,
    StudentConfig,
    TeacherConfig,
)
from dfad.data import DataConfig


@dataclass(frozen=True)
class TrainConfig(DistillConfig):
    """A distillation, and the data that it is measured on where there are any."""

    evaluate: bool = False
    """Measure teacher and student on the test images of data; they never train or select."""

    data: DataConfig = DataConfig()


DIGITS = TrainConfig(
    evaluate=True,
    data=DataConfig(name="digits"),
    teacher=TeacherConfig(recipe="digits"),
    student=StudentConfig(factory="convnet", kwargs={"channels": [16, 32, 64], "in_channels": 1}),
    generator=GeneratorConfig(noise_dim=64, width=32),
    method=MethodConfig(
        rounds=300,
        student_steps=5,
        batch_size=128,
        activation=ActivationConfig(weight=0.1),
        interpolation=InterpolationConfig(weight=0.5, concentration=0.2),
        regularizers=RegularizerConfig(batchnorm=0.1, one_hot=0.1, diversity=5.0),
    ),
    optimizer=OptimizersConfig(
        student=OptimizerConfig(lr=0.05, weight_decay=5e-4), generator=OptimizerConfig(name="adam", lr=1e-3)
    ),
)

PRESETS = {"digits": DIGITS}
"""What ``--preset`` names."""
