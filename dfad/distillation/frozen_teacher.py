"""The teacher during distillation: frozen, in eval mode, and no slower than its convolutions."""

import logging
from typing import Any

import torch
from torch import Tensor, nn

from dfad.copies import copy_network
from dfad.engine import Engine
from dfad.engine.compile import uncompiled
from dfad.errors import first_line, name_of
from dfad.models.outputs import as_outputs
from dfad.models.probing import parameter_count, random_images
from dfad.models.taps import BatchNormTaps, Outputs, has_batchnorm
from dfad.modes import BatchNorm, set_mode
from dfad.seeds import random_state_kept
from dfad.trees import tree_leaves

log = logging.getLogger(__name__)


class FrozenTeacher:
    """A teacher that never changes: always in eval mode, without parameter gradients, on a copy.

    Args:
        teacher: copied, so that the caller's network stays unchanged; one that cannot be copied is used directly.
        engine: where and how it runs.
        image_shape: ``(channels, height, width)`` of images on which the engine's form of the teacher is compared with
            the plain one; without it, they are not compared.
        batch_size: of the rounds.
    """

    def __init__(
        self,
        teacher: nn.Module,
        engine: Engine,
        image_shape: tuple[int, int, int] | None = None,
        batch_size: int = 8,
    ) -> None:
        teacher = _frozen_copy(teacher)
        self.parameter_count = parameter_count(teacher)
        self.norms: list[BatchNorm] = []
        """Its BatchNorms, in the order of the features that :meth:`with_statistics` returned last."""
        self.measured: nn.Module | None = None
        shape: dict[str, Any] = {"input_shape": image_shape, "batch_size": batch_size}
        if has_batchnorm(teacher):
            # from the unfolded network: in a folded one, statistics would have to be divided by the BatchNorms' scales,
            # which become zero in trained networks
            measured = _measured(teacher, image_shape)
            self.norms = measured.norms
            self.measured = engine.place(
                measured, role="teacher with its statistics", read=_read, own=["weights"], **shape
            )
        own = ["fold_batchnorm", "weights"]
        self.network = engine.place(teacher, role="teacher", read=as_outputs, own=own, **shape)

    def __call__(self, images: Tensor) -> Outputs:
        """Logits and taps."""
        return as_outputs(self.network(images))

    @torch.no_grad()
    def without_gradient(self, images: Tensor) -> Outputs:
        """Logits and taps, without a graph for gradients."""
        return self(images)

    def with_statistics(self, images: Tensor) -> tuple[Outputs, tuple[Tensor, ...]]:
        """Logits and taps, and the input of each BatchNorm that the network has."""
        if self.measured is None:
            return self(images), ()
        outputs, features = self.measured(images)
        return as_outputs(outputs), features


def _read(result: tuple[Any, tuple[Tensor, ...]]) -> tuple[Outputs, tuple[Tensor, ...]]:
    outputs, features = result
    return as_outputs(outputs), features


def _frozen_copy(teacher: nn.Module) -> nn.Module:
    teacher = uncompiled(teacher)  # the engine decides about compilation
    try:
        teacher = copy_network(teacher)
    except Exception as error:  # whatever its attributes raise
        log.warning(
            "The teacher %s cannot be copied (%s: %s): it is used directly, and stays in eval mode, without gradients "
            "of its parameters.",
            *(name_of(teacher), type(error).__name__, first_line(error)),
        )
    set_mode(teacher, training=False)
    for parameter in teacher.parameters():
        parameter.requires_grad = False
    return teacher


def _measured(teacher: nn.Module, image_shape: tuple[int, int, int] | None) -> BatchNormTaps:
    """The teacher with the inputs of its BatchNorms: by its graph, if that returns the same bits as hooks."""
    try:
        measured, hooked = (BatchNormTaps(copy_network(teacher), traced=traced) for traced in (True, False))
    except Exception:  # of which the owner was told
        measured = hooked = BatchNormTaps(teacher, traced=False)
    if image_shape is None:
        return measured
    images = random_images(teacher, image_shape)
    with torch.no_grad():
        results = []
        for network in (measured, hooked):
            with random_state_kept():
                torch.manual_seed(0)
                outputs, features = _read(network(images))
            results.append((*outputs, *features))
    same = len(results[0]) == len(results[1]) and all(map(_equal, *results))
    return measured if same else hooked


def _equal(one: Any, other: Any) -> bool:
    pairs = zip(tree_leaves(one), tree_leaves(other), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)
