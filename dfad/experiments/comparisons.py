"""The comparisons of ``python -m dfad.reproduce``: arms, their common settings, and claims about them."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from dfad.config import (
    ActivationConfig,
    CollapseConfig,
    FeatureMatchingConfig,
    GeneratorConfig,
    InterpolationConfig,
    MethodConfig,
    OptimizerConfig,
    RandomFieldsConfig,
    RecordingConfig,
    RegularizerConfig,
    StudentConfig,
    TeacherConfig,
)
from dfad.presets import OWN_STEP, PRESETS, RECIPE, TrainConfig
from dfad.supervised.recipes import RECIPES, NetworkConfig, Recipe

REAL_DATA = "real data"
"""The arm without distillation: the student trained on the teacher's data."""


@dataclass(frozen=True)
class Beats:
    """One arm ends higher than another by more than a standard error of their difference."""

    arm: str
    other: str


@dataclass(frozen=True)
class Reaches:
    """An arm ends at least at an accuracy, or at a share of its teacher's."""

    arm: str
    accuracy: float = 0.0
    share_of_teacher: float = 0.0


@dataclass(frozen=True)
class Sooner:
    """An arm reaches another's last accuracy with at most a share of its images."""

    arm: str
    other: str
    share: float


Claim = Beats | Reaches | Sooner


@dataclass(frozen=True)
class Comparison:
    """Arms that differ only in what they are named after: parts of the method, or the student."""

    arms: Mapping[str, TrainConfig]
    teacher: str | None
    """Recipe of ``dfad.teacher`` that trains the teacher if no checkpoint is given."""

    ceiling: Recipe | None
    """How the student is trained on the real data."""

    claims: tuple[Claim, ...] = ()

    published: Mapping[str, float] = field(default_factory=dict)
    """Published accuracies of an arm."""

    tolerance: float = 0.005
    """How far below a published accuracy still counts as reproduced."""


PLAIN = "DFAD"
REGULARIZED, FULL = "regularized", "regularized + both"
WITHOUT_ADVERSARY = "regularized + both, no adversary"


def arms(base: TrainConfig) -> dict[str, TrainConfig]:
    """The method's parts alone and together, on plain DFAD and on top of the regularizers; and without the adversary,
    as DFQ does.

    Args:
        base: settings with every part at its weight.
    """
    method = base.method
    parts: dict[str, dict[str, Any]] = {
        "": {"activation": ActivationConfig(), "interpolation": InterpolationConfig()},
        " + activation": {"interpolation": InterpolationConfig()},
        " + interpolation": {"activation": ActivationConfig()},
        " + both": {},
    }
    grounds: dict[str, dict[str, Any]] = {PLAIN: {"regularizers": RegularizerConfig()}, REGULARIZED: {}}
    result = {
        ground + part: replace(base, method=replace(method, **without_regularizers, **without_parts))
        for ground, without_regularizers in grounds.items()
        for part, without_parts in parts.items()
    }
    return {**result, WITHOUT_ADVERSARY: replace(base, method=replace(method, adversarial=0.0))}


CLAIMS = (
    Beats(FULL, REGULARIZED),
    Sooner(FULL, PLAIN, share=0.5),
)
"""The paper's claims: the two parts make data-free adversarial distillation more accurate and more efficient."""


def _student_on_real_data(recipe: str, preset: TrainConfig) -> Recipe:
    assert preset.student.factory is not None
    return replace(RECIPES[recipe], network=NetworkConfig(preset.student.factory, preset.student.kwargs))


def _of_rounds(preset: TrainConfig, rounds: int) -> TrainConfig:
    return replace(
        preset,
        method=replace(preset.method, rounds=rounds),
        selection=replace(preset.selection, every=rounds // 8),
        collapse=CollapseConfig(response="warn"),  # plain DFAD is compared as it was published
    )


DIGITS = replace(
    PRESETS["digits"],
    optimizer=replace(PRESETS["digits"].optimizer, student=OptimizerConfig(lr=0.2, weight_decay=5e-4)),
)
"""With the learning rate that was searched for short runs, with and without the parts."""

# DFAD's rounds, where every image is fresh
FRESH_MNIST = replace(
    PRESETS["mnist"],
    method=MethodConfig(
        rounds=2500,
        batch_size=64,
        adversarial=0.1,
        activation=ActivationConfig(weight=0.1),
        interpolation=OWN_STEP,
        regularizers=RegularizerConfig(one_hot=0.1, diversity=1.0),
    ),
)
MNIST = _of_rounds(PRESETS["mnist"], PRESETS["mnist"].method.rounds)

THIN_TEACHER = TeacherConfig(factory="resnet20", mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))

# thin ResNets of He et al., within half an hour of one core; for a GPU there is the preset cifar10
CIFAR10_RESNET20 = replace(
    PRESETS["own"],
    data=PRESETS["cifar10"].data,
    teacher=THIN_TEACHER,
    student=StudentConfig(factory="resnet20"),
    generator=GeneratorConfig(noise_dim=128, width=32),
    method=RECIPE,
    recording=RecordingConfig(log_every=10, checkpoint_every=47),
)
CIFAR10_RESNET32 = replace(CIFAR10_RESNET20, teacher=replace(THIN_TEACHER, factory="resnet32"))

RECIPE_FULL, RECIPE_BARE = "recipe", "recipe without either part"
RECIPE_UNMATCHED = "recipe without feature matching"
RECIPE_LONGER = "recipe, six times as long"
TO_RESNET14, TO_RESNET8 = "recipe, to ResNet-14", "recipe, to ResNet-8"
TO_RESNET8_UNMATCHED = "recipe without feature matching, to ResNet-8"
TO_HALF = "recipe, to half the width"
INHERITED = ", inherited weights"
"""What the name of an arm ends in whose student starts from its teacher's weights."""
RECIPE_SHORT = "recipe, 150 rounds"
RECIPE_GENERATED, RECIPE_DRAWN = "recipe without random fields", "recipe, random fields alone"


def recipe_arms(base: TrainConfig) -> dict[str, TrainConfig]:
    """The recipe, and the recipe without each of its parts, at the same number of student-images.

    Args:
        base: settings with every part at its weight.
    """
    changes: dict[str, dict[str, Any]] = {
        RECIPE_FULL: {},
        "recipe without interpolation": {"interpolation": InterpolationConfig()},
        "recipe without activation": {"activation": ActivationConfig()},
        RECIPE_BARE: {"interpolation": InterpolationConfig(), "activation": ActivationConfig()},
        "recipe without adversary": {"adversarial": 0.0},
        RECIPE_UNMATCHED: {"feature_matching": FeatureMatchingConfig()},
        "recipe, activation at 0.02": {"activation": ActivationConfig(weight=0.02)},
        "recipe, activation at 1.0": {"activation": ActivationConfig(weight=1.0)},
        # further student-images, each mixed of two: the paper's labels, and the same with the teacher's own
        "recipe, mixed images as a further term, labels interpolated": {
            "interpolation": InterpolationConfig(weight=0.5, labels="interpolated", temperature=4.0)
        },
        "recipe, mixed images as a further term, teacher queried": {
            "interpolation": InterpolationConfig(weight=0.5, labels="teacher", temperature=4.0)
        },
    }
    return {name: replace(base, method=replace(base.method, **change)) for name, change in changes.items()}


def _to(factory: str, base: TrainConfig, **kwargs: Any) -> TrainConfig:
    """Settings with another student."""
    return replace(base, student=StudentConfig(factory=factory, kwargs=kwargs))


def inheriting(base: TrainConfig) -> TrainConfig:
    """Settings whose student starts from its teacher's weights."""
    return replace(base, student=replace(base.student, initial_weights="teacher"))


def _with_and_without_inheritance(arms: Mapping[str, TrainConfig]) -> dict[str, TrainConfig]:
    return {**arms, **{arm + INHERITED: inheriting(settings) for arm, settings in arms.items()}}


HALF_OF_RESNET20: dict[str, Any] = {
    "widths": [8, 16, 32],
    "depths": [3, 3, 3],
    "shortcut": "subsampling",
    "num_classes": 10,
    "in_channels": 3,
}
"""Arguments of a ResNet-20 of half the width, for which there is no factory."""


def _with_share(base: TrainConfig, share: float) -> TrainConfig:
    """Settings with a share of the student's images that are random fields."""
    return replace(base, method=replace(base.method, random_fields=RandomFieldsConfig(share=share)))


# with enough images all arms are equally good: efficiency shows in a short run, and the final accuracy of the method
# in one of the preset's full length
COMPARISONS = {
    "demo": Comparison(
        arms={FULL: PRESETS["digits"]}, teacher="digits", ceiling=None, claims=(Reaches(FULL, share_of_teacher=0.97),)
    ),
    "digits": Comparison(
        arms=arms(_of_rounds(DIGITS, 40)),
        teacher="digits",
        ceiling=_student_on_real_data("digits", PRESETS["digits"]),
        claims=(*CLAIMS, Reaches(FULL, share_of_teacher=0.97)),
    ),
    "mnist": Comparison(
        arms=arms(_of_rounds(FRESH_MNIST, 200)),
        teacher="mnist",
        ceiling=_student_on_real_data("mnist", FRESH_MNIST),
        claims=CLAIMS,
    ),
    "mnist-whole": Comparison(
        arms={
            name: arm for name, arm in arms(_of_rounds(FRESH_MNIST, 2500)).items() if name in (PLAIN, REGULARIZED, FULL)
        },
        teacher="mnist",
        ceiling=None,
        claims=(*CLAIMS, Reaches(FULL, accuracy=0.985)),
        published={PLAIN: 0.983},  # DFAD (Fang et al. 2019)
    ),
    "mnist-random-fields": Comparison(
        arms={
            RECIPE_FULL: MNIST,
            RECIPE_GENERATED: _with_share(MNIST, 0.0),
            RECIPE_DRAWN: _with_share(MNIST, 1.0),
        },
        teacher="mnist",
        ceiling=None,
        claims=(
            Beats(RECIPE_FULL, RECIPE_GENERATED),
            Beats(RECIPE_FULL, RECIPE_DRAWN),
            Reaches(RECIPE_FULL, accuracy=0.986),
        ),
    ),
    # 600,000 student-images
    "cifar10-resnet20": Comparison(
        arms={RECIPE_FULL: _of_rounds(CIFAR10_RESNET20, 940)},
        teacher=None,
        ceiling=None,
        claims=(Reaches(RECIPE_FULL, accuracy=0.82),),
    ),
    # 64,000 student-images: in longer runs the arms are equally good
    "cifar10-resnet20-parts": Comparison(
        arms=recipe_arms(_of_rounds(CIFAR10_RESNET20, 100)),
        teacher=None,
        ceiling=None,
        claims=(
            Beats(RECIPE_FULL, RECIPE_BARE),
            *(Beats(RECIPE_FULL, f"recipe without {part}") for part in ("interpolation", "activation")),
            Beats(RECIPE_FULL, RECIPE_UNMATCHED),
        ),
    ),
    # the recipe was not tuned on this pair
    "cifar10-resnet32": Comparison(
        arms={
            RECIPE_FULL: _of_rounds(CIFAR10_RESNET32, 940),
            RECIPE_LONGER: _of_rounds(CIFAR10_RESNET32, 5640),
        },
        teacher=None,
        ceiling=None,
        claims=(Reaches(RECIPE_FULL, accuracy=0.82),),
    ),
    # nor on these students, of 64 and 28 % of the teacher's parameters
    "cifar10-smaller": Comparison(
        arms={
            TO_RESNET14: _to("resnet14", _of_rounds(CIFAR10_RESNET20, 940)),
            TO_RESNET8: _to("resnet8", _of_rounds(CIFAR10_RESNET20, 940)),
            TO_RESNET8_UNMATCHED: _to("resnet8", recipe_arms(_of_rounds(CIFAR10_RESNET20, 940))[RECIPE_UNMATCHED]),
            TO_RESNET14 + INHERITED: inheriting(_to("resnet14", _of_rounds(CIFAR10_RESNET20, 940))),
        },
        teacher=None,
        ceiling=None,
        claims=(Beats(TO_RESNET8, TO_RESNET8_UNMATCHED), Beats(TO_RESNET14 + INHERITED, TO_RESNET14)),
    ),
    # 96,000 student-images, from random weights and from the teacher's
    "cifar10-inherited": Comparison(
        arms=_with_and_without_inheritance(
            {
                TO_RESNET14: _to("resnet14", _of_rounds(CIFAR10_RESNET20, 150)),
                TO_RESNET8: _to("resnet8", _of_rounds(CIFAR10_RESNET20, 150)),
                TO_HALF: _to("dfad.models.resnet:ResNet", _of_rounds(CIFAR10_RESNET20, 150), **HALF_OF_RESNET20),
            }
        ),
        teacher=None,
        ceiling=None,
        claims=tuple(Beats(arm + INHERITED, arm) for arm in (TO_RESNET14, TO_RESNET8, TO_HALF)),
    ),
    "cifar10-resnet32-inherited": Comparison(
        arms={
            **_with_and_without_inheritance({RECIPE_SHORT: _of_rounds(CIFAR10_RESNET32, 150)}),
            RECIPE_FULL + INHERITED: inheriting(_of_rounds(CIFAR10_RESNET32, 940)),
        },
        teacher=None,
        ceiling=None,
        claims=(Beats(RECIPE_SHORT + INHERITED, RECIPE_SHORT), Reaches(RECIPE_FULL + INHERITED, accuracy=0.91)),
    ),
}
"""The comparisons by name."""
