"""Inspection of a teacher before a run: its images, parts and taps, suitable students, and the next command."""

import copy
import json
import logging
import re
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dfad.config import EngineConfig, TeacherConfig
from dfad.copies import in_float32
from dfad.distillation.estimate import median_seconds
from dfad.distillation.frozen_teacher import FrozenTeacher
from dfad.distillation.preflight import require_finite, usable_answers
from dfad.engine import Engine
from dfad.errors import name_of
from dfad.models.anatomy import (
    Tap,
    activations_of,
    are_own,
    batchnorms_of,
    boundary_of,
    candidate_taps,
    has_boundary,
    norms_of,
)
from dfad.models.hubs import hub_of
from dfad.models.probing import dry_forward, is_script, parameter_count
from dfad.models.sources import Loaded, load, shape_of
from dfad.models.students import Student, suitable_students
from dfad.modes import BatchNorm, evaluating

BATCH_SIZE = 32
"""Number of images in a timed batch."""

TIMED_BATCHES = 3

ACTIVATION_WEIGHT = 0.1
"""The weight of the recipe; see docs/experiments.md."""


@dataclass(frozen=True)
class Inspection:
    """The result of an inspection."""

    source: str
    network: str
    trained: bool
    classes: int
    image_shape: tuple[int, int, int]
    image_shape_found: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    normalisation_found: str
    norms: dict[str, int]
    activations: dict[str, int]
    boundary: str
    image_prior: str
    parameters: int
    flops_per_image: int
    """FLOPs of convolutions and matrix products; a multiplication and an addition count as two."""
    batch_size: int
    seconds_per_batch: float
    device: str
    engine_parts: list[str]
    engine_reasons: list[str]
    """Reasons why the other parts will not run, as in the log."""
    taps: list[Tap]
    students: list[Student]
    limits: list[str]
    """Limitations, with reasons."""
    command: str
    """The command to run next."""


def inspection(
    source: str,
    config: TeacherConfig,
    device: torch.device,
    *,
    extras: Sequence[str] = (),
    timed: bool = True,
) -> Inspection:
    """Inspect a teacher.

    Args:
        source: of the network, see :mod:`dfad.models.sources`.
        config: its other settings.
        device: for the timing.
        extras: the given flags of the teacher, for the command.
        timed: measure seconds per batch; otherwise they are 0.

    Raises:
        ModelError: if it cannot be loaded, or cannot teach.
    """
    loaded = _loaded(source, config)
    network = in_float32(loaded.network, copied=False)
    with _messages("dfad.models") as said:
        shape = shape_of(loaded, config.channels, config.image_size)
    require_finite(network, "teacher")
    usable_answers(network, shape)
    classes = dry_forward(network, shape).logits.shape[1]
    activations, norms, statistics = activations_of(network), norms_of(network), batchnorms_of(network)
    taps = candidate_taps(network, shape)
    boundary = has_boundary(activations)
    students = suitable_students(source, network, shape, classes, taps, boundary=boundary)
    hidden = loaded.exported or are_own(taps)
    named_taps = [] if hidden or not (boundary or statistics) else [tap.name for tap in taps]
    parts, reasons = _engine(network, shape, device)
    mean, std = config.mean or loaded.images.mean, config.std or loaded.images.std
    flops, seconds = _cost(network, shape, device, timed=timed)
    return Inspection(
        source=source,
        network=name_of(network),
        trained=loaded.trained,
        classes=classes,
        image_shape=shape,
        image_shape_found=_origin_of_size(source, config, loaded, said),
        mean=tuple(mean),
        std=tuple(std),
        normalisation_found=_origin_of_normalisation(config, loaded),
        norms=dict(norms),
        activations=dict(activations),
        boundary=boundary_of(activations),
        image_prior=image_prior(statistics),
        parameters=parameter_count(network),
        flops_per_image=flops,
        batch_size=BATCH_SIZE,
        seconds_per_batch=seconds,
        device=str(device),
        engine_parts=parts,
        engine_reasons=reasons,
        taps=taps,
        students=students,
        limits=list(_limits(loaded, taps, students, statistics, named_taps)),
        command=_command(source, extras, loaded, shape, config, students, statistics, named_taps),
    )


def _origin_of_size(source: str, config: TeacherConfig, loaded: Loaded, said: Sequence[str]) -> str:
    if config.image_size:
        return "as given"
    known = loaded.images.size or loaded.image_shape
    return (loaded.images.origin if known else " ".join(said)) or f"the file {source}"


def _origin_of_normalisation(config: TeacherConfig, loaded: Loaded) -> str:
    if config.mean:
        return "as given"
    return loaded.images.origin if loaded.images.mean else "not known; give --teacher.mean and --teacher.std"


def image_prior(statistics: int) -> str:
    """A description of what shapes the generated images besides the adversary.

    Args:
        statistics: number of the teacher's norms with statistics.
    """
    if statistics:
        return f"the statistics in {statistics} BatchNorms, one-hot predictions and diversity"
    return (
        "one-hot predictions and diversity, and the generator's own mean 0 and variance 1: it has no BatchNorm whose "
        "statistics could be matched (docs/networks.md says what that costs)"
    )


def _loaded(source: str, config: TeacherConfig) -> Loaded:
    options: dict[str, Any] = {"checkpoint_key": config.checkpoint_key, "kwargs": config.kwargs, "taps": config.taps}
    if config.checkpoint is not None:
        return load(source, config.checkpoint, **options)
    try:
        return load(source, **options)
    except Exception:
        if hub_of(source) is None:
            raise
        return load(source, pretrained=False, **options)  # inspection does not need the weights


@contextmanager
def _messages(*names: str) -> Iterator[list[str]]:
    """Collect the messages of some loggers instead of logging them."""
    said: list[str] = []

    class Keeping(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.getMessage() not in said:
                said.append(record.getMessage())

    handler, loggers = Keeping(), [logging.getLogger(name) for name in names]
    before = [(logger.propagate, logger.level) for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.propagate = False
        logger.setLevel(logging.INFO)
    try:
        yield said
    finally:
        for logger, (propagate, level) in zip(loggers, before, strict=True):
            logger.removeHandler(handler)
            logger.propagate = propagate
            logger.setLevel(level)


def _engine(network: nn.Module, shape: tuple[int, int, int], device: torch.device) -> tuple[list[str], list[str]]:
    """Parts of the engine that will run for this teacher, and the reasons why others will not."""
    with _messages("dfad.engine", "dfad.distillation.frozen_teacher") as said:
        engine = Engine(EngineConfig(), fused=True, device=device)
        FrozenTeacher(network, engine, shape, BATCH_SIZE)
    left_out = " ".join(said)
    names = [name for name, switch in vars(EngineConfig()).items() if switch == "auto" and name != "precision"]
    running = [name for name in names if getattr(engine, name) and f"engine.{name} for the teacher" not in left_out]
    if not any(isinstance(module, BatchNorm) for module in network.modules()):
        running = [name for name in running if name not in ("fold_batchnorm", "fuse_batchnorm")]
    return [f"precision {engine.precision}", *running], [message.removesuffix(".") for message in said]


def _cost(network: nn.Module, shape: tuple[int, int, int], device: torch.device, *, timed: bool) -> tuple[int, float]:
    """FLOPs of one image, and seconds of a batch, the median of a few."""
    network = copy.deepcopy(network).to(device) if device.type != "cpu" else network

    def forward(count: int) -> None:
        network(torch.zeros(count, *shape, device=device))

    with evaluating(network), torch.no_grad():
        with FlopCounterMode(display=False) as counter:
            forward(1)
        if not timed:
            return counter.get_total_flops(), 0.0
        forward(BATCH_SIZE)  # libraries choose their algorithms at the first call
        return counter.get_total_flops(), median_seconds(lambda: forward(BATCH_SIZE), device, TIMED_BATCHES)


def _limits(
    loaded: Loaded, taps: Sequence[Tap], students: Sequence[Student], statistics: int, named_taps: Sequence[str]
) -> Iterator[str]:
    if not loaded.trained:
        yield "Its weights are random, or not known to be trained: give --teacher.checkpoint FILE."
    if not statistics:
        yield "Batch statistics cannot be matched (--method.regularizers.batchnorm 0): no BatchNorm holds any."
    if not taps:
        yield (
            "The activation regularizer cannot be used: no feature map enters an activation where it could be tapped, "
            "as in pre-norm transformers, whose blocks add tokens and normalise them. Distil by the logits."
        )
    elif students and not any(student.boundary for student in students):
        yield "The activation regularizer is left off: see its activations, and how the students' taps fit."
    if is_script(loaded.network):
        yield "It holds TorchScript, whose layers are not seen. Name what builds the network itself to have all of it."
    if loaded.exported:
        yield "It is a program of torch.export: it cannot be a student, and its modules cannot be tapped by name."
    if not students:
        way = ", with a tap (--student.taps) of the same size for each of --teacher.taps" if named_taps else ""
        yield f"No smaller network was found that takes its images. Give yours: --student package.module:callable{way}."


def _command(
    source: str,
    extras: Sequence[str],
    loaded: Loaded,
    shape: tuple[int, int, int],
    config: TeacherConfig,
    students: Sequence[Student],
    statistics: int,
    named_taps: Sequence[str],
) -> str:
    words = ["python", "-m", "dfad.train", "--preset", "own", "--teacher", source, *extras]
    if not loaded.trained and config.checkpoint is None:
        words += ["--teacher.checkpoint", "WEIGHTS"]
    if config.image_size is None and loaded.image_shape is None:
        size = shape[1:] if shape[1] != shape[2] else shape[1:2]
        words += ["--teacher.image_size", *map(str, size)]
    student = students[0] if students else None
    words += ["--student", student.source if student else "package.module:callable"]
    if student and student.kwargs:
        words += ["--student.kwargs", json.dumps(student.kwargs)]
    if student and student.inherits:
        words += ["--student.initial_weights", "teacher"]
    if not statistics:
        words += ["--method.regularizers.batchnorm", "0"]
    if student and student.pairs and (student.boundary or statistics):  # features are matched, too
        if student.teacher_taps:
            words += ["--teacher.taps", *student.teacher_taps]
        if student.taps:
            words += ["--student.taps", *student.taps]
    if student is None and named_taps:
        words += ["--teacher.taps", *named_taps]
    if student and student.boundary:
        words += ["--method.activation.weight", str(ACTIVATION_WEIGHT)]
    words += ["--run_dir", f"runs/{re.sub(r'[^A-Za-z0-9]+', '-', Path(source).stem).strip('-')}"]
    return shlex.join(words)
