"""From a configuration to teacher, student and distiller."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from dfad.config import DistillConfig, TeacherConfig
from dfad.copies import in_float32
from dfad.data.evaluation import Evaluator
from dfad.distillation.distiller import Distiller
from dfad.errors import ModelError
from dfad.models.sources import SOURCES, Loaded, has_weights, load, shape_of
from dfad.seeds import seeded, stream_seed
from dfad.supervised.cache import cached_teacher
from dfad.supervised.recipes import RECIPES
from dfad.supervised.teaching import MODEL_FILE

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Teacher:
    """A trained network and what its file records about its images."""

    network: nn.Module
    image_shape: tuple[int, int, int] | None = None
    normalisation: tuple[Sequence[float], Sequence[float]] | None = None


def load_teacher(config: TeacherConfig, recipe: str = "") -> Teacher:
    """The teacher of a configuration: a file of this project, a factory with weights, or a recipe's.

    Args:
        config: the teacher's part of the settings.
        recipe: preset of dfad.teacher that trains a suitable one; named in the error where no teacher is given.

    Raises:
        ModelError: if it cannot be built, or has no weights.
    """
    source, checkpoint = config.factory, config.checkpoint
    if checkpoint is None and config.recipe and not (source and has_weights(source)):
        checkpoint = cached_teacher(config.recipe)
    if checkpoint is None and not (source and has_weights(source)):
        way = (
            f"Train one where its data is, then distil it:\n\n"
            f"  python -m dfad.teacher --preset {recipe} --data.root FOLDER --run_dir runs/{recipe}-teacher\n"
            f"  python -m dfad.train --preset {recipe} --teacher.checkpoint runs/{recipe}-teacher/{MODEL_FILE}\n\n"
            f"Or give"
            if recipe
            else "Give"
        )
        missing, builder = (
            "There is no trained teacher",
            (", with --teacher package.module:callable where the file was not written by this project"),
        )
        if source:
            missing, builder = f"The teacher {source} has no trained weights", ""
        raise ModelError(
            f"{missing}. {way} --teacher.checkpoint FILE{builder}; or --teacher.recipe NAME, one of "
            f"{', '.join(RECIPES)}, to have a teacher trained."
        )
    if source is None:
        source, checkpoint = str(checkpoint), None
    key = config.checkpoint_key if checkpoint else None
    loaded = load(source, checkpoint, checkpoint_key=key, kwargs=config.kwargs, taps=config.taps)
    network = in_float32(loaded.network, copied=False)
    shape = shape_of(loaded, config.channels, config.image_size)
    return Teacher(network, shape, _normalisation(loaded, config))


def _normalisation(loaded: Loaded, config: TeacherConfig) -> tuple[Sequence[float], Sequence[float]]:
    """As the configuration says, else as the network's file or origin does."""
    mean, std = config.mean or loaded.images.mean, config.std or loaded.images.std
    if mean and not config.mean:
        shown = (", ".join(f"{value:.4g}" for value in values) for values in (mean, std))
        log.info(
            "The teacher's images are normalised with mean %s and std %s, according to %s.",
            *shown,
            loaded.images.origin,
        )
    return mean, std


def build_student(config: DistillConfig) -> nn.Module:
    """The student of a configuration, its random weights drawn from the configuration's seed.

    Raises:
        ModelError: if it cannot be built, or has weights of its own where it is to start from its teacher's.
    """
    given = config.student
    if not given.factory:
        raise ModelError(f"There is no student. Give --student SOURCE: {SOURCES}.")
    with seeded(stream_seed(config.seed, "student")):
        loaded = load(
            given.factory,
            given.checkpoint,
            checkpoint_key=given.checkpoint_key,
            kwargs=given.kwargs,
            taps=given.taps,
            pretrained=False,
        )
    if loaded.exported:
        raise ModelError(
            f"The student {given.factory} is a program of torch.export, which has one mode and cannot be trained. Name "
            "what builds the network."
        )
    if loaded.trained and given.initial_weights == "teacher":
        raise ModelError(
            f"The student {given.factory} has weights of its own, which its teacher's would replace. Leave out "
            "--student.initial_weights teacher to start from them, or name what builds the network."
        )
    return loaded.network


def build_distiller(
    teacher: Teacher, student: nn.Module, config: DistillConfig, evaluate: Evaluator | None = None
) -> Distiller:
    """The distiller of a configuration, with what the teacher's file records; raises what :class:`Distiller` raises.

    Raises:
        ModelError: also if the evaluation images do not fit the networks.
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
