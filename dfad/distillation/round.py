"""The round: student steps on generated images, then the generator against the student."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dfad import functional
from dfad.config import DistillConfig, MethodConfig, StudentConfig
from dfad.copies import in_float32
from dfad.distillation.augmentation import Augmentation
from dfad.distillation.frozen_teacher import FrozenTeacher
from dfad.distillation.image_bank import ImageBank
from dfad.distillation.interpolation import VirtualInterpolation
from dfad.distillation.preflight import check_networks
from dfad.distillation.random_fields import RandomFields
from dfad.engine import Engine
from dfad.engine.compile import uncompiled
from dfad.engine.optimizers import load_optimizer_state, set_learning_rate
from dfad.engine.placement import Placement
from dfad.errors import ModelError, name_of
from dfad.losses import ActivationBoundaryLoss, BatchNormStatisticsLoss, Discrepancy, FeatureMatchingLoss, weighted
from dfad.models.anatomy import activations_of, boundary_of, has_boundary
from dfad.models.connectors import Connectors
from dfad.models.generator import Generator, merge_upsampling
from dfad.models.inheritance import inherit
from dfad.models.likeness import require_same
from dfad.models.outputs import as_outputs
from dfad.models.sources import load
from dfad.models.taps import Outputs, has_batchnorm
from dfad.modes import frozen, set_mode
from dfad.seeds import random_state_kept, seeded, stream_seed

log = logging.getLogger(__name__)

Terms = dict[str, Tensor]

STREAMS_OF_A_ROUND = ("noise", "mixing", "augmentation", "image_bank", "random_fields")
"""Names of the random streams that a round draws from."""


class Round:
    """The networks, their optimizers and losses, and the steps of one round over them.

    Args:
        teacher: copied, never changed.
        student: trained in place.
        config: of the distillation.
        engine: decides how everything runs.
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
        self.ranks = engine.ranks
        self.image_shape = image_shape
        teacher_outputs, student_outputs = self._check(teacher, student)
        with seeded(stream_seed(config.seed, "generator")):
            generator = self._new_generator()
            self.connectors = self._new_connectors(student_outputs.taps, teacher_outputs.taps)
        self.matches_features = bool(config.method.feature_matching.weight) and isinstance(self.connectors, Connectors)
        if config.student.initial_weights == "teacher":
            inherit(uncompiled(student), uncompiled(teacher))
        self._place(teacher, student, generator)
        self._define_losses()
        self._define_streams()

    def __call__(self) -> Terms:
        """Student steps, then generator steps; returns the metrics of the last ones, on the device."""
        for _ in range(self.config.method.student_steps):
            student_terms = self.student_step()
        for _ in range(self.config.method.generator_steps):
            generator_terms = self.generator_step()
        self.engine.end_round(self.student, self.connectors, self.generator)
        return {**student_terms, **generator_terms}

    def run(self, progress: float) -> Mapping[str, Tensor]:
        """One round, run by the engine.

        Args:
            progress: fraction of the rounds that are done, for the learning rate schedules.
        """
        self.set_learning_rates(progress)
        return self.engine.run(self, [self.rng[name] for name in STREAMS_OF_A_ROUND])

    def warm_up(self) -> Mapping[str, Tensor]:
        """One step of the generator before the first round, without the student; never part of a captured graph."""
        set_learning_rate(self.generator_optimizer, self.config.optimizer.generator.lr)
        terms = self.generator_step(adversary=False)
        self.engine.end_round(self.generator)
        return terms

    @contextmanager
    def student_placed(self) -> Iterator[None]:
        """Place the student for a block, and restore it afterwards, also after an exception."""
        try:
            self.placement.take()
            yield
        finally:
            self.placement.give_back()
            self.engine.forget_graphs()  # they refer to tensors that the student no longer has

    def student_step(self) -> Terms:
        """One step of the student towards the teacher, and a separate one on mixed images if configured; returns the
        terms of its loss."""
        set_mode(self.student, training=True)
        with torch.no_grad(), self.engine.forward():
            images = self.interpolation.within(self.student_images())
        with self.engine.forward():
            teacher, student = self.engine.both(
                lambda: self.teacher.without_gradient(images), lambda: as_outputs(self.student(images))
            )
            terms = self.imitation_terms(student, teacher)
            terms |= self.interpolation.joint_terms(images, teacher.logits)
        loss = self.imitation_loss(terms)
        self.engine.descend(loss, self.student_optimizer)
        with self.engine.forward():
            own_loss = self.interpolation.own_loss(images, teacher.logits, self.imitation)
        if own_loss is not None:
            terms["interpolation"] = own_loss
            self.engine.descend(self.config.method.interpolation.weight * own_loss, self.student_optimizer)
        return {"student_loss": loss.detach(), **_prefixed("student", terms)}

    def student_images(self) -> Tensor:
        """The augmented images of a student step: fresh ones, or those of the bank, among them random fields."""
        method = self.config.method
        if self.image_bank is None:
            images = self.generator(self.own_noise())
        else:
            newest = round(method.image_bank.newest * method.batch_size)
            images = self.image_bank.sample(
                method.batch_size, newest, method.batch_size, self.rng["image_bank"], self.ranks
            )
            if self.random_fields is not None:
                images = torch.where(self.drawn_at_random, self.random_fields.sample(method.batch_size), images)
            images = images.to(self.engine.dtype)
        images = self.augmentation(images)
        # plain networks may flatten them by view, and draw dropout in the order of memory
        return images if self.engine.channels_last else images.contiguous()

    def imitation(self, student: Outputs, teacher: Outputs) -> Tensor:
        """The student's loss on one batch of generated images."""
        return self.imitation_loss(self.imitation_terms(student, teacher))

    def imitation_terms(self, student: Outputs, teacher: Outputs) -> Terms:
        """The terms of the student's loss on one batch."""
        terms = {"discrepancy": self.discrepancy(student.logits, teacher.logits)}
        method = self.config.method
        if method.activation.weight or self.matches_features:
            taps = self.connectors(student.taps)
            if method.activation.weight:
                terms["activation"] = self.activation(taps, teacher.taps)
            if self.matches_features:
                terms["feature_matching"] = self.feature_matching(taps, teacher.taps)
        return terms

    def imitation_loss(self, terms: Terms) -> Tensor:
        """The weighted sum of the terms."""
        method = self.config.method
        weights = {
            "discrepancy": 1.0,
            "activation": method.activation.weight,
            "feature_matching": method.feature_matching.weight,
            "interpolation": method.interpolation.weight,
        }
        return _weighted_sum(terms, weights)

    def generator_step(self, *, adversary: bool = True) -> Terms:
        """One generator step towards images on which student and teacher disagree; its images are added to the bank.

        Args:
            adversary: use the student; without it, only the regularizers shape the images.
        """
        method = self.config.method
        regularizers = method.regularizers
        set_mode(self.student, training=method.student_batchnorm == "train")
        with frozen(self.student, self.connectors):
            with self.engine.forward():
                images = self.generator(self.own_noise())
                teacher, features = (
                    self.teacher.with_statistics(images) if self.matches_statistics else (self.teacher(images), ())
                )
                terms = self.adversarial_terms(as_outputs(self.student(images)), teacher) if adversary else {}
                if self.matches_statistics:
                    terms["batchnorm"] = self.whole_batchnorm_statistics(features)
                if regularizers.one_hot:
                    terms["one_hot"] = functional.one_hot_loss(teacher.logits)
                if regularizers.diversity:
                    terms["diversity"] = functional.diversity_loss(teacher.logits, self.ranks.average)
            weights = {
                "adversarial": method.adversarial,
                "activation": method.activation.generator_weight,
                "batchnorm": regularizers.batchnorm,
                "one_hot": regularizers.one_hot,
                "diversity": regularizers.diversity,
            }
            loss = _weighted_sum(terms, weights)
            self.engine.descend(loss, self.generator_optimizer)
        if self.image_bank is not None:
            self.image_bank.add(images, self.ranks)
        return {"generator_loss": loss.detach(), **_prefixed("generator", terms)}

    def adversarial_terms(self, student: Outputs, teacher: Outputs) -> Terms:
        """The adversarial terms of the generator's loss: the negated differences of student and teacher."""
        method = self.config.method
        student_logits, teacher_logits = student.logits, teacher.logits
        if method.adversary == "agreeing":
            agree = (student_logits.argmax(dim=1) == teacher_logits.argmax(dim=1)).unsqueeze(1)
            student_logits = torch.where(agree, student_logits, student_logits.detach())
            teacher_logits = torch.where(agree, teacher_logits, teacher_logits.detach())
        terms = {"adversarial": -self.discrepancy(student_logits, teacher_logits)}
        if method.activation.generator_weight:
            terms["activation"] = -self.activation(self.connectors(student.taps), teacher.taps)
        return terms

    def set_learning_rates(self, progress: float) -> None:
        """Set the learning rates that the schedules give after a fraction ``progress`` of the rounds."""
        for optimizer, config in (
            (self.student_optimizer, self.config.optimizer.student),
            (self.generator_optimizer, self.config.optimizer.generator),
        ):
            set_learning_rate(optimizer, config.lr * config.factor(progress))

    def sample_noise(self, count: int, stream: str = "noise") -> Tensor:
        """Standard normal noise ``(count, noise_dim)``."""
        shape = (count, self.config.generator.noise_dim)
        return torch.randn(shape, generator=self.rng[stream], device=self.device)

    def own_noise(self) -> Tensor:
        """This rank's share of the noise of a step, which all draw from one stream."""
        return self.ranks.share(self.sample_noise(self.config.method.batch_size))

    def _check(self, teacher: nn.Module, student: nn.Module) -> tuple[Outputs, Outputs]:
        """Check what can be known before anything is placed; returns the outputs of both for blank images."""
        method = self.config.method
        as_computed = in_float32(student, copied=True)
        outputs = check_networks(
            teacher,
            as_computed,
            self.image_shape,
            uses_taps=method.activation.used,
            factory=self.config.student.factory,
        )
        _check_factory(as_computed, self.config.student, self.image_shape)
        self.matches_statistics = _matches_statistics(method, teacher)
        if method.activation.used and not has_boundary(activations := activations_of(teacher)):
            log.warning("About the teacher's activation boundary: %s.", boundary_of(activations))
        return outputs

    def _place(self, teacher: nn.Module, student: nn.Module, generator: Generator) -> None:
        """Place the networks, and make the image bank and the optimizers."""
        config, method, engine = self.config, self.config.method, self.engine
        self.ranks.require_divides("method.batch_size", method.batch_size)
        size = method.batch_size // self.ranks.count
        self.teacher = FrozenTeacher(teacher, engine, self.image_shape, size)
        if self.matches_statistics and not self.teacher.norms:
            raise ModelError(
                f"method.regularizers.batchnorm is {method.regularizers.batchnorm}, but a forward pass of "
                f"{name_of(teacher)} calls none of its BatchNorms. Set --method.regularizers.batchnorm 0."
            )
        self.placement = Placement(
            engine, student, role="student", input_shape=self.image_shape, batch_size=size, read=as_outputs
        )
        self.generator = engine.place(
            generator,
            role="generator",
            input_shape=(config.generator.noise_dim,),
            batch_size=size,
            changes={"merge_upsampling": merge_upsampling},
        )
        for connector in self.connectors.modules():
            if isinstance(connector, nn.Sequential):
                engine.place(connector, role="connector")
        bank = method.image_bank.size
        self.image_bank = ImageBank(bank, self.image_shape, self.device) if bank else None
        try:
            self.student = self.placement.take()
            learning = [*student.parameters(), *self.connectors.parameters()]
            self.student_optimizer = engine.optimizer(config.optimizer.student, learning)
            self.generator_optimizer = engine.optimizer(config.optimizer.generator, generator.parameters())
        except BaseException:
            self.placement.give_back()
            raise

    def _define_losses(self) -> None:
        config, method = self.config, self.config.method
        self.discrepancy = Discrepancy(method.discrepancy, method.temperature, fused=config.fused)
        self.activation = ActivationBoundaryLoss(
            method.activation.margin,
            method.activation.stage_weights,
            method.activation.scaling,
            fused=config.fused,
        )
        average = self.ranks.average if self.ranks.several else None
        self.feature_matching = FeatureMatchingLoss(fused=config.fused, average=average)
        self.batchnorm_statistics = BatchNormStatisticsLoss(self.teacher.norms, fused=config.fused)
        self.whole_batchnorm_statistics = BatchNormStatisticsLoss(
            self.teacher.norms, fused=config.fused, average=average
        )

    def _define_streams(self) -> None:
        """The random streams, and the parts of a student step that draw from them."""
        config, method = self.config, self.config.method
        self.rng = {name: torch.Generator(self.device) for name in (*STREAMS_OF_A_ROUND, "bank", "probe")}
        for name, stream in self.rng.items():
            stream.manual_seed(stream_seed(config.seed, name))
        self.interpolation = VirtualInterpolation(
            method.interpolation,
            method.batch_size,
            self.rng["mixing"],
            self.student,
            self.teacher,
            fused=config.fused,
            ranks=self.ranks,
        )
        self.augmentation = Augmentation(method.augmentation, self.rng["augmentation"], self.ranks)
        self.random_fields = None
        count = round(method.random_fields.share * method.batch_size)
        if count:
            self.random_fields = RandomFields(self.image_shape, self.rng["random_fields"], self.ranks)
            # spread over the batch, because its first images are the newest and its last ones are mixed
            before = torch.arange(method.batch_size + 1, device=self.device) * count // method.batch_size
            self.drawn_at_random = self.ranks.share(before.diff() > 0).view(-1, 1, 1, 1)

    def _new_generator(self) -> Generator:
        return Generator(self.image_shape, self.config.generator.noise_dim, self.config.generator.width)

    def _new_connectors(self, student_taps: Sequence[Tensor], teacher_taps: Sequence[Tensor]) -> nn.Module:
        method = self.config.method
        if not method.uses_taps:
            return nn.Identity()
        try:
            return Connectors(student_taps, teacher_taps)
        except ModelError as error:
            if method.needs_taps:
                raise
            log.warning(
                "Features are not matched, though no other part of the method helps a student as much. %s",
                error,
            )
            return nn.Identity()

    def fresh_generator_weights(self, number: int) -> dict[str, Tensor]:
        """Initial weights for the ``number``-th new generator of this run."""
        with seeded(stream_seed(self.config.seed, f"generator-{number}")):
            return self._new_generator().state_dict()

    # State

    def state_dict(self) -> dict[str, Any]:
        """State of networks and optimizers."""
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
            **({"image_bank": self.image_bank} if self.image_bank is not None else {}),
        }

    def _optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {"student_optimizer": self.student_optimizer, "generator_optimizer": self.generator_optimizer}


def _check_factory(student: nn.Module, config: StudentConfig, image_shape: tuple[int, int, int]) -> None:
    """Check that the factory, if one is named, builds such a student: a run's files will say that it does."""
    if config.factory:
        with random_state_kept():
            built = load(config.factory, kwargs=config.kwargs, taps=config.taps, pretrained=False).network
        built = in_float32(built, copied=False, announced=False)
        require_same(student, built, f"{config.factory} with {dict(config.kwargs)}", image_shape, "student")


def _matches_statistics(method: MethodConfig, teacher: nn.Module) -> bool:
    regularizers = method.regularizers
    if not regularizers.batchnorm or has_batchnorm(teacher):
        return bool(regularizers.batchnorm)
    others = regularizers.one_hot or regularizers.diversity
    name = name_of(teacher)
    if regularizers.without_statistics == "error" or (method.warm_up and not others):
        raise ModelError(
            f"method.regularizers.batchnorm is {regularizers.batchnorm}, but {name} has "
            "no BatchNorm with running statistics. Set --method.regularizers.batchnorm 0."
            + ("" if others else " Its images need a shape: set --method.regularizers.one_hot and .diversity.")
        )
    log.warning(
        "The teacher %s has no BatchNorm whose statistics could be matched: its images are shaped by one-hot "
        "predictions and diversity alone, and by the generator's own mean and variance. Students get less accurate so.",
        name,
    )
    return False


def _weighted_sum(terms: Terms, weights: Mapping[str, float]) -> Tensor:
    return torch.stack([weighted(weights[name], term.float()) for name, term in terms.items()]).sum()


def _prefixed(prefix: str, terms: Terms) -> Terms:
    return {f"{prefix}/{name}": term.detach() for name, term in terms.items()}
