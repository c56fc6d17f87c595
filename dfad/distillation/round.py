"""The round: student steps on generated images, then the generator against the student."""

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from dfad import functional
from dfad.config import DistillConfig
from dfad.distillation.frozen_teacher import FrozenTeacher
from dfad.engine import Engine
from dfad.engine.optimizers import load_optimizer_state, set_learning_rate
from dfad.errors import ModelError
from dfad.losses import ActivationBoundaryLoss, BatchNormStatisticsLoss, Discrepancy, InterpolatedKLDivLoss
from dfad.models.connectors import Connectors
from dfad.models.generator import Generator
from dfad.models.probing import as_outputs, dry_forward
from dfad.models.taps import Outputs, has_batchnorm
from dfad.modes import frozen, statistics_kept
from dfad.seeds import stream_seed

Terms = dict[str, Tensor]


class Round:
    """The networks, their optimizers and losses, and the steps of one round over them.

    Args:
        teacher: copied, never changed.
        student: trained in place.
        config: of the distillation.
        engine: how everything runs.
        image_shape: ``(channels, height, width)`` of the teacher's images.

    Raises:
        ModelError: if the networks cannot be combined as the configuration asks.
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        config: DistillConfig,
        engine: Engine,
        image_shape: tuple[int, int, int],
    ) -> None:
        self.config = config
        self.engine = engine
        self.device = engine.device
        self.image_shape = image_shape
        method = config.method
        teacher_outputs = dry_forward(teacher, image_shape)
        student_outputs = _fitting_outputs(student, teacher_outputs, image_shape)
        if method.regularizers.batchnorm and not has_batchnorm(teacher):
            raise ModelError(
                f"method.regularizers.batchnorm is {method.regularizers.batchnorm}, but {type(teacher).__name__} has "
                "no BatchNorm with running statistics. Set --method.regularizers.batchnorm 0."
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stream_seed(config.seed, "generator"))
            generator = self._new_generator()
            uses_taps = method.activation.weight or method.activation.generator_weight
            connectors: nn.Module = (
                Connectors(student_outputs.taps, teacher_outputs.taps) if uses_taps else nn.Identity()
            )
        self.teacher = FrozenTeacher(teacher, engine)
        self.student = engine.place(student)
        self.generator = engine.place(generator)
        self.connectors = engine.place(connectors)
        self.student_optimizer = engine.optimizer(
            config.optimizer.student, [*student.parameters(), *connectors.parameters()]
        )
        self.generator_optimizer = engine.optimizer(config.optimizer.generator, generator.parameters())

        self.discrepancy = Discrepancy(method.discrepancy, method.temperature, fused=config.fused)
        self.activation = ActivationBoundaryLoss(
            method.activation.margin,
            method.activation.stage_weights,
            method.activation.scaling,
            fused=config.fused,
        )
        self.interpolation = InterpolatedKLDivLoss(method.interpolation.temperature, fused=config.fused)
        self.batchnorm_statistics = BatchNormStatisticsLoss(self.teacher.norms)

        self.rng = {name: torch.Generator(self.device) for name in ("noise", "mixing", "bank", "probe")}
        for name, stream in self.rng.items():
            stream.manual_seed(stream_seed(config.seed, name))

    def __call__(self) -> Terms:
        """Student steps, then a generator step; returns what is worth recording, on the device."""
        for _ in range(self.config.method.student_steps):
            student_terms = self.student_step()
        return {**student_terms, **self.generator_step()}

    def run(self, progress: float) -> Mapping[str, Tensor]:
        """One round, the way the engine runs it.

        Args:
            progress: fraction of all rounds that is done, for the schedules of the learning rates.
        """
        self.set_learning_rates(progress)
        return self.engine.run(self, [self.rng["noise"], self.rng["mixing"]])

    def student_step(self) -> Terms:
        """One step of the student towards the teacher on fresh images, and one on mixed images where these have a step
        of their own; returns the terms of its loss."""
        method = self.config.method
        self.student.train()
        with torch.no_grad(), self.engine.autocast():
            images = self.generator(self.sample_noise(method.batch_size))
            teacher = self.teacher(images)
        interpolation = method.interpolation
        with self.engine.autocast():
            terms = self.imitation_terms(as_outputs(self.student(images)), teacher)
            if interpolation.weight and interpolation.step == "joint":
                terms["interpolation"] = self.interpolation_loss(images, teacher.logits)
        loss = self.imitation_loss(terms)
        self.engine.descend(loss, self.student_optimizer)
        if interpolation.weight and interpolation.step == "own":
            with self.engine.autocast():
                terms["interpolation"] = self.interpolation_loss(images, teacher.logits)
            self.engine.descend(interpolation.weight * terms["interpolation"], self.student_optimizer)
        return {"student_loss": loss.detach(), **_prefixed("student", terms)}

    def imitation_terms(self, student: Outputs, teacher: Outputs) -> Terms:
        """How far the student is from the teacher on one batch."""
        terms = {"discrepancy": self.discrepancy(student.logits, teacher.logits)}
        if self.config.method.activation.weight:
            terms["activation"] = self.activation(self.connectors(student.taps), teacher.taps)
        return terms

    def imitation_loss(self, terms: Terms) -> Tensor:
        """The terms, each with its weight."""
        method = self.config.method
        weights = {
            "discrepancy": 1.0,
            "activation": method.activation.weight,
            "interpolation": method.interpolation.weight,
        }
        return _weighted_sum(terms, weights)

    def interpolation_loss(self, images: Tensor, teacher_logits: Tensor) -> Tensor:
        """The student's loss on mixed images; the images of the step serve again."""
        config = self.config.method.interpolation
        coefficient = self.sample_mixing_coefficient()
        mixed = functional.mix(images, coefficient)
        with nullcontext() if config.batchnorm == "update" else statistics_kept(self.student):
            student = as_outputs(self.student(mixed))
        if config.labels == "interpolated":
            return self.interpolation(student.logits, teacher_logits, coefficient)
        with torch.no_grad():
            teacher = self.teacher(mixed)
        if config.step == "own":
            return self.imitation_loss(self.imitation_terms(student, teacher))
        return self.interpolation(student.logits, teacher.logits, torch.ones_like(coefficient))

    def generator_step(self) -> Terms:
        """One step of the generator towards images on which student and teacher disagree."""
        method = self.config.method
        regularizers = method.regularizers
        self.student.train(method.student_batchnorm == "train")
        with frozen(self.student, self.connectors):
            with self.engine.autocast():
                images = self.generator(self.sample_noise(method.batch_size))
                teacher, features = (
                    self.teacher.with_statistics(images) if regularizers.batchnorm else (self.teacher(images), ())
                )
                student = as_outputs(self.student(images))
                terms = {"adversarial": -self.discrepancy(student.logits, teacher.logits)}
                if method.activation.generator_weight:
                    terms["activation"] = -self.activation(self.connectors(student.taps), teacher.taps)
                if regularizers.batchnorm:
                    terms["batchnorm"] = self.batchnorm_statistics(features)
                if regularizers.one_hot:
                    terms["one_hot"] = functional.one_hot_loss(teacher.logits)
                if regularizers.diversity:
                    terms["diversity"] = functional.diversity_loss(teacher.logits)
            weights = {
                "adversarial": method.adversarial,
                "activation": method.activation.generator_weight,
                "batchnorm": regularizers.batchnorm,
                "one_hot": regularizers.one_hot,
                "diversity": regularizers.diversity,
            }
            loss = _weighted_sum(terms, weights)
            self.engine.descend(loss, self.generator_optimizer)
        return {"generator_loss": loss.detach(), **_prefixed("generator", terms)}

    def set_learning_rates(self, progress: float) -> None:
        """To those of the schedules when a fraction ``progress`` of all rounds is done."""
        for optimizer, config in (
            (self.student_optimizer, self.config.optimizer.student),
            (self.generator_optimizer, self.config.optimizer.generator),
        ):
            set_learning_rate(optimizer, config.lr * config.factor(progress))

    def sample_noise(self, count: int, stream: str = "noise") -> Tensor:
        """Standard normal noise ``(count, noise_dim)``."""
        shape = (count, self.config.generator.noise_dim)
        return torch.randn(shape, generator=self.rng[stream], device=self.device)

    def sample_mixing_coefficient(self) -> Tensor:
        """Mixing coefficients of shape ``(batch,)`` or ``()``, drawn from the symmetric Beta distribution."""
        config = self.config.method.interpolation
        shape = (self.config.method.batch_size, 2) if config.coefficient == "sample" else (2,)
        concentration = torch.full(shape, config.concentration, device=self.device)
        # the first of two Dirichlet components is Beta distributed; the public samplers take no generator
        return torch._sample_dirichlet(concentration, self.rng["mixing"])[..., 0]

    def _new_generator(self) -> Generator:
        return Generator(
            self.image_shape,
            self.config.generator.noise_dim,
            self.config.generator.width,
            merge_upsampling=self.engine.merge_upsampling,
        )

    def fresh_generator_weights(self, number: int) -> dict[str, Tensor]:
        """Of a generator that has learned nothing, the ``number``-th of this run."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stream_seed(self.config.seed, f"generator-{number}"))
            return self._new_generator().state_dict()

    # State

    def state_dict(self) -> dict[str, Any]:
        """Of networks and optimizers."""
        return {name: part.state_dict() for name, part in (self._stateful() | self._optimizers()).items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        for name, part in self._stateful().items():
            part.load_state_dict(state[name])
        for name, optimizer in self._optimizers().items():
            load_optimizer_state(optimizer, state[name])
        self.engine.forget_graphs()

    def _stateful(self) -> dict[str, Any]:
        return {
            "student": self.student,
            "generator": self.generator,
            "connectors": self.connectors,
            "scaler": self.engine.scaler,
        }

    def _optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {"student_optimizer": self.student_optimizer, "generator_optimizer": self.generator_optimizer}


def _fitting_outputs(student: nn.Module, teacher: Outputs, image_shape: tuple[int, int, int]) -> Outputs:
    try:
        outputs = dry_forward(student, image_shape)
    except (RuntimeError, ValueError) as error:
        raise ModelError(
            f"The student {type(student).__name__} does not take the teacher's images {image_shape} (channels, height, "
            f"width): {str(error).splitlines()[0]}. Give --student.kwargs that fit."
        ) from None
    classes = outputs.logits.shape[1], teacher.logits.shape[1]
    if classes[0] != classes[1]:
        raise ModelError(
            f"The student tells {classes[0]} classes apart and the teacher {classes[1]}; both must tell the same. "
            f"Set --student.kwargs '{{\"num_classes\": {classes[1]}}}'."
        )
    return outputs


def _weighted_sum(terms: Terms, weights: Mapping[str, float]) -> Tensor:
    return torch.stack([weights[name] * term.float() for name, term in terms.items()]).sum()


def _prefixed(prefix: str, terms: Terms) -> Terms:
    return {f"{prefix}/{name}": term.detach() for name, term in terms.items()}
