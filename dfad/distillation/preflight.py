"""Checks before the first round, so that a run does not fail at its end."""

import json
import logging
import math
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from dfad.config import DistillConfig, OptimizerConfig
from dfad.copies import copy_network
from dfad.errors import ConfigurationError, ModelError, RunFolderError, first_line, name_of
from dfad.models.factory import remedy_for_classes
from dfad.models.model_file import divided
from dfad.models.outputs import as_outputs
from dfad.models.probing import dry_forward, images_taken, parameter_count, random_images, require_same_classes
from dfad.models.taps import Outputs
from dfad.modes import evaluating
from dfad.seeds import random_state_kept

log = logging.getLogger(__name__)


def check_networks(
    teacher: nn.Module,
    student: nn.Module,
    image_shape: tuple[int, int, int],
    *,
    uses_taps: bool = True,
    factory: str | None = None,
) -> tuple[Outputs, Outputs]:
    """Check both networks, and return their outputs for blank images.

    Args:
        teacher: not changed.
        student: likewise.
        image_shape: ``(channels, height, width)`` of the teacher's images.
        uses_taps: whether the activation regularizer compares their taps.
        factory: what built the student, for the error.

    Raises:
        ModelError: if weights or the teacher's logits are NaN or infinite, if no gradient reaches the teacher's
            images, if the networks do not take the images, if they do not have the same two or more classes, or if a
            tap that is used comes after a ReLU.
    """
    require_finite(teacher, "teacher")
    require_finite(student, "student")
    teacher_outputs = dry_forward(teacher, image_shape, announce=True, role="teacher")
    answers = usable_answers(teacher, image_shape)
    student_outputs = _fitting_outputs(student, teacher_outputs, image_shape, factory)
    if uses_taps:
        _require_pre_activations(answers.taps, "teacher")
        # few values can all be positive by chance, but none is exactly zero by chance
        if any(_is_never_negative(tap) and not tap.all() for tap in _taps_for_noise(student, image_shape)):
            _require_pre_activations(_taps_for_noise(_without_zeros(student), image_shape), "student")
    own, others = parameter_count(student), parameter_count(teacher)
    if own > others:
        log.warning("The student has %s parameters, more than its teacher's %s.", f"{own:,}", f"{others:,}")
    return teacher_outputs, student_outputs


def require_usable(network: nn.Module, role: str) -> None:
    """Refuse a network that cannot be computed with, or cannot learn.

    Args:
        network: any.
        role: ``teacher`` or ``student``.

    Raises:
        ConfigurationError: if PyTorch makes new tensors in another precision than float32.
        ModelError: if it is no module; if tensors have no values or no shape, or were made in inference mode; if no
            parameter of a student learns; if ranks already share it in another way.
    """
    if not isinstance(network, nn.Module):
        raise ModelError(
            f"The {role} is a {type(network).__name__}, not an nn.Module. dfad.load_network builds one from a "
            "name or a file."
        )
    if torch.get_default_dtype() != torch.float32:
        raise ConfigurationError(
            f"PyTorch's default dtype is {torch.get_default_dtype()}, and distilling needs float32: call "
            "torch.set_default_dtype(torch.float32) before. Networks may have weights of any dtype."
        )
    if isinstance(network, nn.parallel.DistributedDataParallel):
        raise ModelError(
            f"The {role} is a DistributedDataParallel. The ranks of a run share its gradients without one: give the "
            "network inside, its .module."
        )
    for name, tensor in (*network.named_parameters(), *network.named_buffers()):
        if hasattr(tensor, "device_mesh"):
            raise ModelError(
                f"The {role} cannot be used: its {name} is a DTensor, divided among ranks. Each rank of a run holds "
                "whole networks: give the one before fully_shard."
            )
        if is_lazy(tensor):
            raise ModelError(
                f"The {role} cannot be used: its {name} is lazy, and has no shape before the first forward pass. Let "
                "what builds the network call it once, with a batch of images."
            )
        if tensor.is_meta:
            raise ModelError(
                f"The {role} cannot be used: its {name} is on the meta device, which holds shapes and no values. Load "
                "its weights first (load_state_dict with assign=True)."
            )
        if tensor.is_inference():
            raise ModelError(
                f"The {role} cannot be used: its {name} was made under torch.inference_mode, and cannot take part in "
                "training. Build the network outside of it."
            )
    if role == "student" and not any(parameter.requires_grad for parameter in network.parameters()):
        raise ModelError("The student cannot learn: none of its parameters has requires_grad.")


def require_finite(network: nn.Module, role: str) -> None:
    """Check that a network has no NaN or infinity in its weights or in the statistics of its BatchNorms.

    Other buffers may hold infinity: masks do.

    Args:
        network: any.
        role: what it is, for the message.

    Raises:
        ModelError: naming the first such tensor.
    """
    broken = [name for name, tensor in network.named_parameters() if not _finite(tensor)]
    for name, tensor in network.named_buffers():
        statistics = name.rpartition(".")[2] in ("running_mean", "running_var")
        if not (_finite(tensor) if statistics else _finite(tensor.nan_to_num(nan=torch.nan, posinf=0, neginf=0))):
            broken.append(name)
    if broken:
        more = f", and so do {len(broken) - 1} tensors more" if len(broken) > 1 else ""
        raise ModelError(
            f"The {role} cannot be used: its {broken[0]} holds NaN or infinity{more}. Its training diverged, or its "
            "file is damaged; give an earlier checkpoint."
        )


def _finite(tensor: Tensor) -> bool:
    return is_lazy(tensor) or not tensor.is_floating_point() or bool(tensor.isfinite().all())


def usable_answers(teacher: nn.Module, image_shape: tuple[int, int, int]) -> Outputs:
    """The outputs of a teacher for two random images, in eval mode.

    Raises:
        ModelError: if logits are NaN or infinite, or no gradient reaches the images.
    """
    images = random_images(teacher, image_shape).requires_grad_()
    reason = "its logits carry none"
    with evaluating(teacher), torch.enable_grad(), random_state_kept():
        outputs = as_outputs(teacher(images.clone()))  # not a leaf: networks may write into their images
        gradient = None
        if outputs.logits.requires_grad:
            try:
                (gradient,) = torch.autograd.grad(outputs.logits.float().sum(), images, allow_unused=True)
            except Exception as error:  # an operation without a derivative, in whatever way it says so
                reason = f"{type(error).__name__}: {first_line(error)}"
    if not _finite(outputs.logits):
        raise ModelError(
            f"The teacher {name_of(teacher)} returns NaN or infinite logits for random images, though its "
            "weights are finite. Classes that are masked with -inf cannot be learned; return finite logits."
        )
    if gradient is None:
        raise ModelError(
            f"No gradient of the teacher {name_of(teacher)} reaches its images ({reason}), and the generator "
            "could not learn from it. A network that is quantised, runs under torch.no_grad or leaves PyTorch cannot "
            "teach; give the one in floating point that it was made of."
        )
    logits = outputs.logits.detach()
    if bool((logits >= 0).all()) and bool((logits.sum(dim=1) - 1).abs().max() < 1e-3):
        log.warning(
            "The teacher %s seems to return probabilities: none is negative, and those of an image have the sum 1. The "
            "losses need logits, and would apply a softmax again. Let it return the input of its softmax.",
            name_of(teacher),
        )
    return Outputs(logits, tuple(tap.detach() for tap in outputs.taps))


def _taps_for_noise(student: nn.Module, image_shape: tuple[int, int, int]) -> tuple[Tensor, ...]:
    with evaluating(student), torch.no_grad(), random_state_kept():
        return as_outputs(student(random_images(student, image_shape))).taps


def _without_zeros(student: nn.Module) -> nn.Module:
    """A copy whose parameters are not all zero, as those that end residual branches are at first."""
    network = copy_network(student)
    with torch.no_grad(), random_state_kept():
        for parameter in network.parameters():
            if not parameter.any():
                parameter.normal_()
    return network


def _is_never_negative(tap: Tensor) -> bool:
    return tap.numel() > 1 and bool((tap >= 0).all())


def _require_pre_activations(taps: Sequence[Tensor], role: str) -> None:
    for stage, tap in enumerate(taps):
        if _is_never_negative(tap):
            raise ModelError(
                f"Tap {stage} of the {role} is never negative: it comes after a ReLU, where the activation boundary, "
                "its sign, cannot be seen. Tap what enters the ReLU: the BatchNorm or the addition before it "
                f"(--{role}.taps), or set --method.activation.weight 0."
            )


def _fitting_outputs(
    student: nn.Module, teacher: Outputs, image_shape: tuple[int, int, int], factory: str | None
) -> Outputs:
    who = f"The student {name_of(student)}"
    with images_taken(who, "the teacher's images", image_shape, "Give --student.kwargs that fit."):
        outputs = dry_forward(student, image_shape, announce=True, role="student")
    classes = teacher.logits.shape[1]
    remedy = remedy_for_classes(factory, classes, "--student")
    require_same_classes(student, outputs.logits.shape[1], "the teacher", classes, remedy)
    return outputs


def check_normalisation(normalisation: tuple[Sequence[float], Sequence[float]], channels: int) -> None:
    """Check that mean and deviation have one value per channel.

    Raises:
        ModelError: with the numbers of both.
    """
    for name, values in zip(("mean", "std"), normalisation, strict=True):
        if len(values) not in (0, channels):
            raise ModelError(
                f"The {name} of the teacher's images, {tuple(values)}, has {len(values)} values, and the images have "
                f"{channels} channels. Give --teacher.{name} with one value per channel."
            )


def check_files(student: nn.Module, config: DistillConfig) -> None:
    """Check that a run's files can hold student and settings, and log what they will not hold.

    Args:
        student: to be written.
        config: of the run.

    Raises:
        ModelError: if the student's state cannot be stored.
    """
    divided(student.state_dict())
    if not config.student.factory:
        log.warning(
            "The student %s is given without a factory: its files will hold weights alone. Build the network and load "
            "them with dfad.models.weights.load_weights(network, path); or name the callable that builds it in "
            "student.factory and student.kwargs, and the files will say how.",
            name_of(student),
        )


def check_keywords(config: DistillConfig) -> None:
    """Refuse keyword arguments of factories that a run's files could not hold.

    Raises:
        ConfigurationError: with those that are no JSON.
    """
    for role, kwargs in (("teacher", config.teacher.kwargs), ("student", config.student.kwargs)):
        try:
            json.dumps(kwargs)
        except (TypeError, ValueError) as error:
            raise ConfigurationError(
                f"{role}.kwargs {kwargs} cannot be written down: {error}. Name a callable of your own as factory, "
                "which passes such arguments itself."
            ) from None


def check_room(folder: Path, needed: int) -> None:
    """Refuse a folder on a disk that has not enough room for a run.

    Args:
        folder: of the run; what a run has left in it counts as room.
        needed: bytes.

    Raises:
        RunFolderError: with both figures.
    """
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    taken = sum(path.stat().st_size for path in folder.iterdir() if path.is_file()) if there == folder.absolute() else 0
    total, _, free = shutil.disk_usage(there)
    if total and free + taken < needed:  # what is no disk has no size
        raise RunFolderError(
            f"{folder} has no room for this run: it needs about {needed / 1e6:,.0f} MB, for two checkpoints, the one "
            f"that is being written and the networks, and {free / 1e6:,.0f} MB are free. Make room, or choose another "
            "--run_dir."
        )


def bytes_of_run(
    student: nn.Module, generator: nn.Module, image_shape: tuple[int, int, int], config: DistillConfig
) -> int:
    """About how much a run's folder holds at most, while a third checkpoint is being written.

    Args:
        student: whose best state is part of a checkpoint as well.
        generator: whose last healthy state is, with its optimizer's.
        image_shape: ``(channels, height, width)``.
        config: of the run.
    """
    students, generators = _bytes(student), _bytes(generator)
    optimizers = config.optimizer
    pixels = math.prod(image_shape)
    banks = config.selection.bank_size * pixels * torch.float32.itemsize + config.method.image_bank.size * pixels
    checkpoint = students * (2 + _moments(optimizers.student)) + 2 * generators * (1 + _moments(optimizers.generator))
    return 3 * (checkpoint + banks) + 3 * students + generators


def _moments(config: OptimizerConfig) -> int:
    return 2 if config.name.startswith("adam") else 1


def _bytes(network: nn.Module) -> int:
    return sum(x.numel() * x.element_size() for x in [*network.parameters(), *network.buffers()] if not is_lazy(x))


def check_teacher(folder: Path, recorded: str | None, found: str) -> None:
    """Refuse to resume a run with another teacher than it was started with.

    Args:
        folder: of the run.
        recorded: hash of the teacher's weights in its checkpoint; checkpoints of version 0.1.0 have none.
        found: that of the teacher at hand.

    Raises:
        ModelError: with both.
    """
    if recorded is None:
        log.info("The checkpoint in %s does not say which teacher it is of; it goes on with this one.", folder)
    elif recorded != found:
        raise ModelError(
            f"{folder} cannot be resumed with another teacher: the weights of the one that it was started with hash to "
            f"{recorded}, those at hand to {found}. Put the former file back in its place, or start a new run with "
            "--run_dir."
        )
