"""Settings of ``python -m dfad.train`` by name."""

from dataclasses import dataclass, replace

from dfad.config import (
    ActivationConfig,
    AugmentationConfig,
    DistillConfig,
    FeatureMatchingConfig,
    GeneratorConfig,
    ImageBankConfig,
    InterpolationConfig,
    MethodConfig,
    OptimizerConfig,
    OptimizersConfig,
    RandomFieldsConfig,
    RecordingConfig,
    RegularizerConfig,
    SelectionConfig,
    StudentConfig,
    TeacherConfig,
)
from dfad.data import DataConfig


@dataclass(frozen=True)
class TrainConfig(DistillConfig):
    """A distillation, and optional data to measure it on."""

    evaluate: bool = False
    """Measure teacher and student on the test images of data; these are never used to train or select."""

    data: DataConfig = DataConfig()


OWN_STEP = InterpolationConfig(weight=1.0, labels="teacher", step="own")
"""The form of virtual interpolation that helped on digits and MNIST: docs/experiments.md."""

DIGITS = TrainConfig(
    evaluate=True,
    data=DataConfig(name="digits"),
    teacher=TeacherConfig(recipe="digits"),
    student=StudentConfig(factory="convnet", kwargs={"channels": [16, 32, 64], "in_channels": 1}),
    generator=GeneratorConfig(noise_dim=64, width=32),
    method=MethodConfig(
        rounds=100,
        student_steps=5,
        batch_size=128,
        activation=ActivationConfig(weight=0.03),
        interpolation=OWN_STEP,
        regularizers=RegularizerConfig(batchnorm=0.1, one_hot=0.1, diversity=5.0),
    ),
    optimizer=OptimizersConfig(
        student=OptimizerConfig(lr=0.3, weight_decay=5e-4), generator=OptimizerConfig(name="adam", lr=1e-3)
    ),
)

MNIST = TrainConfig(
    data=DataConfig(name="mnist"),
    student=StudentConfig(factory="lenet5_half"),
    generator=GeneratorConfig(noise_dim=100, width=16),
    method=MethodConfig(
        rounds=1250,
        student_steps=20,
        batch_size=64,
        warm_up=100,
        adversarial=0.1,
        activation=ActivationConfig(weight=0.1),
        interpolation=InterpolationConfig(weight=0.5, labels="teacher", step="within"),
        regularizers=RegularizerConfig(one_hot=0.1, diversity=1.0),
        image_bank=ImageBankConfig(size=25_600),
        random_fields=RandomFieldsConfig(share=0.75),
        augmentation=AugmentationConfig(crop=0.07, cutout=0.25, colour=0.3),
    ),
    optimizer=OptimizersConfig(
        student=OptimizerConfig(lr=0.05, weight_decay=5e-4),
        # so that the generator keeps changing while the student's learning rate decays
        generator=OptimizerConfig(name="adam", lr=3e-3, schedule="constant"),
    ),
)


RECIPE = MethodConfig(
    rounds=1000,
    student_steps=10,
    batch_size=64,
    warm_up=500,
    discrepancy="kl",
    temperature=4.0,
    adversarial=0.5,
    activation=ActivationConfig(weight=0.1),
    feature_matching=FeatureMatchingConfig(weight=50.0),
    interpolation=InterpolationConfig(weight=0.5, labels="teacher", step="within"),
    regularizers=RegularizerConfig(batchnorm=1.0, one_hot=1.0, diversity=5.0),
    image_bank=ImageBankConfig(size=25_600),
    augmentation=AugmentationConfig(flip=True, crop=0.125),
)
"""For natural images: generator warm-up, a bank of its images, and random views of them; see docs/experiments.md."""

RECIPE_STUDENT = OptimizerConfig(name="adamw", lr=0.02, weight_decay=0.01, warm_up=0.02)

RECIPE_GENERATOR = OptimizerConfig(name="adam", lr=2e-3, schedule="constant")


OWN = TrainConfig(
    # networks may have no taps, or none that pair, and no BatchNorm
    method=replace(
        RECIPE,
        activation=ActivationConfig(),
        feature_matching=replace(RECIPE.feature_matching, unpaired="skip"),
        regularizers=replace(RECIPE.regularizers, without_statistics="skip"),
    ),
    optimizer=OptimizersConfig(student=RECIPE_STUDENT, generator=RECIPE_GENERATOR),
)


def _cifar(name: str, classes: int) -> TrainConfig:
    """The recipe from ResNet-34 to ResNet-18 for at most 100 PFLOP, as FLOPs are counted: 2 in the generator's warm-up,
    85 in 15 million student-images and 12 in the generator's steps between them. The batch is larger, the
    student's rate that of a wider network; none of it has been tuned on these networks."""
    return TrainConfig(
        data=DataConfig(name=name),
        student=StudentConfig(factory="resnet18", kwargs={"num_classes": classes}),
        generator=GeneratorConfig(noise_dim=256, width=128),
        method=replace(RECIPE, rounds=2950, batch_size=512, image_bank=ImageBankConfig(size=51_200)),
        optimizer=OptimizersConfig(student=replace(RECIPE_STUDENT, lr=3e-3), generator=RECIPE_GENERATOR),
        selection=SelectionConfig(bank_size=2048, every=100),
        recording=RecordingConfig(log_every=20, checkpoint_every=100),
    )


PRESETS = {
    "digits": DIGITS,
    "mnist": MNIST,
    "cifar10": _cifar("cifar10", 10),
    "cifar100": _cifar("cifar100", 100),
    "own": OWN,
}
"""Values of ``--preset``. All but digits need ``--teacher.checkpoint``; own also needs ``--student.factory``."""
