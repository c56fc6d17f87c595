"""From a configuration to teacher, student and distiller."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from dfad.config import DistillConfig, TeacherConfig
from dfad.data.evaluation import Evaluator
from dfad.distillation.distiller import Distiller
from dfad.errors import ModelError
from dfad.models.factory import build
from dfad.models.model_file import load_model
from dfad.models.probing import in_float32
from dfad.models.weights import load_weights
from dfad.seeds import seeded, stream_seed
from dfad.supervised.cache import cached_teacher
from dfad.supervised.recipes import RECIPES
from dfad.supervised.teaching import MODEL_FILE


@dataclass(frozen=True)
class Teacher:
    """A trained network and what its file tells of its images."""

    network: nn.Module
    image_shape: tuple[int, int, int] | None = None
    normalisation: tuple[Sequence[float], Sequence[float]] | None = None


def load_teacher(config: TeacherConfig, recipe: str = "") -> Teacher:
    """The teacher of a configuration: a file of this project, a factory with weights, or a recipe's.

    Args:
        config: which.
        recipe: of dfad.teacher, which would train one that fits, for the message where none is given.

    Raises:
        ModelError: if it cannot be built, or has no weights.
    """
    checkpoint = config.checkpoint
    if checkpoint is None and config.recipe:
        checkpoint = cached_teacher(config.recipe)
    if checkpoint is None:
        way = (
            f"Train one where its data are, and go on with it:\n\n"
            f"  python -m dfad.teacher --preset {recipe} --data.root FOLDER --run_dir runs/{recipe}-teacher\n"
            f"  python -m dfad.train --preset {recipe} --teacher.checkpoint runs/{recipe}-teacher/{MODEL_FILE}\n\n"
            f"Or give"
            if recipe
            else "Give"
        )
        raise ModelError(
            f"There is no trained teacher. {way} --teacher.checkpoint FILE, with --teacher.factory "
            "package.module:callable where the file was not written by this project; or --teacher.recipe NAME, one of "
            f"{', '.join(RECIPES)}, to have one trained."
        )
    if config.factory:
        network = build(config.factory, config.kwargs, config.taps)
        load_weights(network, checkpoint, config.checkpoint_key)
        network = in_float32(network, copied=False)
        return Teacher(network, normalisation=(config.mean, config.std))
    network, manifest = load_model(checkpoint, taps=config.taps or None)
    normalisation = (config.mean or manifest.get("mean", ()), config.std or manifest.get("std", ()))
    shape = manifest.get("image_shape")
    return Teacher(network, (shape[0], shape[1], shape[2]) if shape else None, normalisation)


def build_student(config: DistillConfig) -> nn.Module:
    """The student of a configuration, its random weights drawn from the configuration's seed.

    Raises:
        ModelError: if it cannot be built.
    """
    if not config.student.factory:
        raise ModelError(
            "There is no student. Give --student.factory package.module:callable or a name of dfad.models."
        )
    with seeded(stream_seed(config.seed, "student")):
        student = build(config.student.factory, config.student.kwargs, config.student.taps)
    if config.student.checkpoint:
        load_weights(student, config.student.checkpoint, config.student.checkpoint_key)
    return student


def build_distiller(
    teacher: Teacher, student: nn.Module, config: DistillConfig, evaluate: Evaluator | None = None
) -> Distiller:
    """The distiller of a configuration, told what the teacher's file tells; see there for what it raises.

    Raises:
        ModelError: also if the evaluation does not fit the networks.
    """
    distiller = Distiller(
        teacher.network,
        student,
        config,
        image_shape=teacher.image_shape,
        normalisation=teacher.normalisation,
        evaluate=evaluate,
    )
    if evaluate is not None:
        for network in (teacher.network, student):
            evaluate.require_fitting(network, distiller.image_shape)
    return distiller
