"""The configuration of a distillation: frozen values, validated where they are made.

What each preset stands for is in :mod:`dfad.presets`.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dfad.validation import fraction, not_negative, positive, require

Keywords = dict[str, Any]
"""Keyword arguments; a JSON object on the command line."""

Precision = Literal["auto", "float32", "tf32", "bfloat16", "float16"]

Switch = Literal["auto", "on", "off"]
"""``auto``: on if ``fused`` is on and the machine supports it; ``on``: required, else an error says why; ``off``."""


def half_cosine(progress: float) -> float:
    """Half a cosine from 1 to 0 as ``progress`` goes from 0 to 1."""
    return 0.5 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class TeacherConfig:
    """The trained network to learn from; it stays frozen, in eval mode."""

    factory: str | None = None
    """What builds it: timm:NAME, torchvision:NAME, hf:FOLDER-or-NAME, package.module:callable, a bare name of
    dfad.models, or a file that holds a network. --teacher alone means the same."""

    kwargs: Keywords = field(default_factory=dict)
    """Its keyword arguments."""

    checkpoint: Path | None = None
    """Its weights: safetensors, or a state dict written by torch.save."""

    checkpoint_key: str | None = None
    """Entry of a larger checkpoint that holds them, such as ema or state_dict.teacher; detected by default."""

    recipe: str | None = None
    """Without a checkpoint: preset of dfad.teacher, trained once and kept in the cache folder."""

    taps: tuple[str, ...] = ()
    """Modules or graph nodes to tap, for a network that returns only logits; pre-activation, input side first."""

    channels: int | None = None
    """Channels of its images; by default those of its first convolution."""

    image_size: int | tuple[int, int] | None = None
    """Height and width of its images in pixels, one number if they are equal; found by a trial forward pass by
    default."""

    mean: tuple[float, ...] = ()
    """Mean per channel that its training images were normalised with (pixels in 0–1); for pictures and evaluation."""

    std: tuple[float, ...] = ()
    """Standard deviation per channel of the same pixels."""

    def __post_init__(self) -> None:
        sizes = self.image_size if isinstance(self.image_size, tuple) else (self.image_size,)
        require(all(size is None or size > 0 for size in sizes), "image_size", self.image_size, "a positive number")
        require(self.channels is None or self.channels > 0, "channels", self.channels, "a positive number")
        require(all(map(math.isfinite, self.mean)), "mean", self.mean, "finite")
        require(len(self.mean) == len(self.std), "std", self.std, f"as long as mean {self.mean}")
        positive(**{f"std[{i}]": value for i, value in enumerate(self.std)})


@dataclass(frozen=True)
class StudentConfig:
    """The network to train."""

    factory: str | None = None
    """What builds it, as of the teacher, with random weights unless it is a file. --student alone means the same."""

    kwargs: Keywords = field(default_factory=dict)
    """Its keyword arguments."""

    initial_weights: Literal["random", "teacher"] = "random"
    """Weights to start from: random ones; or the teacher's, as far as its layers have the same names. Of wider layers,
    evenly spaced channels are taken."""

    checkpoint: Path | None = None
    """Weights to start from instead."""

    checkpoint_key: str | None = None
    """Entry of a larger checkpoint that holds them; detected by default."""

    taps: tuple[str, ...] = ()
    """Modules or graph nodes to tap, for a network that returns only logits; in the order of the teacher's."""

    def __post_init__(self) -> None:
        apart = self.checkpoint is None or self.initial_weights == "random"
        require(apart, "initial_weights", self.initial_weights, f"random beside checkpoint {self.checkpoint}")


@dataclass(frozen=True)
class GeneratorConfig:
    """The network that makes images from noise (DFAD's architecture)."""

    noise_dim: int = 256
    """Length of a noise vector."""

    width: int = 64
    """Channels before the last convolution; the first stage has twice as many."""

    def __post_init__(self) -> None:
        positive(noise_dim=self.noise_dim, width=self.width)


@dataclass(frozen=True)
class ActivationConfig:
    """The activation regularizer: puts the student's taps on the teacher's side of the activation boundary."""

    weight: float = 0.0
    """Weight in the student's loss; 0 switches it off."""

    margin: float = 1.0
    """Distance from zero that the student must keep, in activation units."""

    scaling: Literal["mean", "batchmean"] = "mean"
    """Average each tap over all elements (suits every width), or sum it and divide by the batch size (Heo et al.)."""

    stage_weights: Literal["uniform", "halving"] = "uniform"
    """Weights of the taps: all 1, or halved per stage towards the input (Heo et al.)."""

    generator_weight: float = 0.0
    """Weight of the negated term in the generator's loss: it then also seeks images whose activations disagree."""

    def __post_init__(self) -> None:
        not_negative(weight=self.weight, generator_weight=self.generator_weight)
        positive(margin=self.margin)

    @property
    def used(self) -> bool:
        """Whether it is a term of either loss."""
        return bool(self.weight or self.generator_weight)


@dataclass(frozen=True)
class FeatureMatchingConfig:
    """Feature matching: the student's taps near the teacher's (FitNets), beside its logits."""

    weight: float = 0.0
    """Weight of the normalized squared error in the student's loss; 0 switches it off."""

    unpaired: Literal["error", "skip"] = "error"
    """Where the networks' taps do not pair: an error, or no feature matching and a line in the log."""

    def __post_init__(self) -> None:
        not_negative(weight=self.weight)


@dataclass(frozen=True)
class InterpolationConfig:
    """Virtual interpolation: mixed images with mixed soft labels."""

    weight: float = 0.0
    """Weight in the student's loss; 0 switches it off."""

    concentration: float = 1.0
    """Both parameters of the mixing coefficient's Beta distribution; 1 is uniform, less favours values near 0 and 1."""

    coefficient: Literal["sample", "batch"] = "sample"
    """One mixing coefficient per sample, or one per batch."""

    labels: Literal["interpolated", "teacher"] = "interpolated"
    """Interpolate the teacher's soft labels, or query the teacher at the mixed images."""

    temperature: float = 1.0
    """Temperature of the soft labels."""

    batchnorm: Literal["update", "keep"] = "update"
    """Whether mixed images update the running statistics of the student's BatchNorms."""

    step: Literal["joint", "own", "within"] = "joint"
    """joint: mixed images add a term to the loss of the step. own: they get an optimizer step of their own; if the
    teacher is queried at them, they are learned like all images, by the discrepancy and the activation regularizer.
    within: they replace a share of the batch, given by the weight, at no cost; the teacher is queried at them."""

    def __post_init__(self) -> None:
        not_negative(weight=self.weight)
        positive(concentration=self.concentration, temperature=self.temperature)
        if self.step == "within":
            require(self.weight <= 1, "weight", self.weight, "at most 1 where step is within: a share of the batch")
            require(self.labels == "teacher" or not self.weight, "labels", self.labels, "teacher where step is within")

    @property
    def adds_images(self) -> bool:
        """Whether mixed images come in addition to those of the batch."""
        return self.weight > 0 and self.step != "within"


@dataclass(frozen=True)
class RegularizerConfig:
    """Further terms of the generator's loss, from the literature after DFAD; 0 switches one off."""

    batchnorm: float = 0.0
    """Weight of the distance between the batch's statistics and the running ones of the teacher's BatchNorms."""

    one_hot: float = 0.0
    """Weight of the cross-entropy between the teacher's prediction and its own argmax."""

    diversity: float = 0.0
    """Weight of the negative entropy of the batch's mean prediction."""

    without_statistics: Literal["error", "skip"] = "error"
    """Where the teacher's norms hold none: an error, or the other regularizers alone and a line in the log."""

    def __post_init__(self) -> None:
        not_negative(batchnorm=self.batchnorm, one_hot=self.one_hot, diversity=self.diversity)


@dataclass(frozen=True)
class ImageBankConfig:
    """A store of the images from the generator's steps; the student learns from these instead of fresh ones."""

    size: int = 0
    """Number of images it holds, with 8 bits per channel; 0: no bank, every image of a student step is fresh."""

    newest: float = 0.25
    """Share of a student step's images that is drawn from the generator's last batch."""

    def __post_init__(self) -> None:
        not_negative(size=self.size)
        require(0 <= self.newest <= 1, "newest", self.newest, "in [0, 1]")


@dataclass(frozen=True)
class AugmentationConfig:
    """Random views of the images of a student step; the teacher is queried at the same view."""

    flip: bool = False
    """Mirror half of the images, left to right."""

    crop: float = 0.0
    """Shift by up to this fraction of height and width in each direction; 0.125 is 4 of 32 pixels."""

    padding: Literal["reflect", "zero"] = "reflect"
    """What fills the border after a shift: the image's reflection, or zeros, the mean of normalised images."""

    cutout: float = 0.0
    """Set a rectangle of this fraction of height and width to zero, its centre anywhere in the image."""

    colour: float = 0.0
    """Change each image's contrast by up to this fraction, and shift each channel by up to this many standard
    deviations."""

    def __post_init__(self) -> None:
        fraction(crop=self.crop, cutout=self.cutout, colour=self.colour)


@dataclass(frozen=True)
class RandomFieldsConfig:
    """Bright strokes and blobs on a dark ground, drawn at random in place of generated images: for teachers of
    characters and drawings of that kind."""

    share: float = 0.0
    """Fraction of the images of a student step that are drawn so; they need an image bank for the others."""

    def __post_init__(self) -> None:
        require(0 <= self.share <= 1, "share", self.share, "in [0, 1]")


@dataclass(frozen=True)
class MethodConfig:
    """One round: student steps on generated images, then steps of the generator against the student."""

    rounds: int = 300
    """Number of rounds."""

    student_steps: int = 5
    """Student steps per round."""

    generator_steps: int = 1
    """Generator steps per round."""

    batch_size: int = 128
    """Images per step."""

    warm_up: int = 0
    """Generator steps before the first round, without the adversary: there is no trained student yet."""

    discrepancy: Literal["l1", "kl"] = "l1"
    """Mean absolute difference of the logits (DFAD), or KL divergence of the soft labels."""

    temperature: float = 1.0
    """Temperature of the KL discrepancy."""

    adversarial: float = 1.0
    """Weight of the negated discrepancy in the generator's loss."""

    adversary: Literal["all", "agreeing"] = "all"
    """Images that the adversary's gradient comes from: all, or only those on whose class student and teacher agree."""

    student_batchnorm: Literal["train", "eval"] = "train"
    """BatchNorms of the student in the generator's step: train (DFAD) updates their statistics, eval does not."""

    activation: ActivationConfig = ActivationConfig()
    feature_matching: FeatureMatchingConfig = FeatureMatchingConfig()
    interpolation: InterpolationConfig = InterpolationConfig()
    regularizers: RegularizerConfig = RegularizerConfig()
    image_bank: ImageBankConfig = ImageBankConfig()
    random_fields: RandomFieldsConfig = RandomFieldsConfig()
    augmentation: AugmentationConfig = AugmentationConfig()

    def __post_init__(self) -> None:
        positive(rounds=self.rounds, student_steps=self.student_steps, generator_steps=self.generator_steps)
        positive(temperature=self.temperature)
        # BatchNorm in training mode needs more than one value per channel for a variance
        require(self.batch_size >= 2, "batch_size", self.batch_size, "2 or more")
        not_negative(adversarial=self.adversarial, warm_up=self.warm_up)
        bank = self.image_bank.size
        if bank:
            need = f"at least the batch size, {self.batch_size}, or 0 for no bank"
            require(bank >= self.batch_size, "image_bank.size", bank, need)
            require(self.warm_up > 0, "warm_up", self.warm_up, "1 or more to fill the image bank")
        share = self.random_fields.share
        require(not share or bank > 0, "random_fields.share", share, "0 where there is no image bank (image_bank.size)")
        self._require_an_image("random_fields.share", share)
        if self.interpolation.step == "within":
            self._require_an_image("interpolation.weight", self.interpolation.weight)
        shaping = self.regularizers.batchnorm, self.regularizers.one_hot, self.regularizers.diversity
        need = "0 if every weight of regularizers is 0, because only they shape the images of the warm-up"
        require(self.warm_up == 0 or any(shaping), "warm_up", self.warm_up, need)

    def _require_an_image(self, name: str, share: float) -> None:
        need = f"0, or enough for an image of a batch of {self.batch_size}: more than {0.5 / self.batch_size:.4g}"
        require(not share or round(share * self.batch_size) > 0, name, share, need)

    @property
    def uses_taps(self) -> bool:
        """Whether a loss reads the taps of both networks."""
        return self.activation.used or self.feature_matching.weight > 0

    @property
    def needs_taps(self) -> bool:
        """Whether taps that do not pair are an error."""
        return self.activation.used or (self.feature_matching.weight > 0 and self.feature_matching.unpaired == "error")

    @property
    def images_per_round(self) -> int:
        """Number of images that are generated."""
        fresh = 0 if self.image_bank.size else self.student_steps
        return (fresh + self.generator_steps) * self.batch_size

    @property
    def student_images_per_round(self) -> int:
        """Number of images that the student is trained on."""
        return (1 + self.interpolation.adds_images) * self.student_steps * self.batch_size

    @property
    def queries_per_round(self) -> int:
        """Number of images that the teacher is queried at."""
        mixed = self.interpolation.adds_images and self.interpolation.labels == "teacher"
        return ((1 + mixed) * self.student_steps + self.generator_steps) * self.batch_size


@dataclass(frozen=True)
class OptimizerConfig:
    """An optimizer and its schedule."""

    name: Literal["sgd", "adam", "adamw"] = "sgd"
    """SGD with momentum, Adam, or Adam with decoupled weight decay."""

    lr: float = 0.1
    """Learning rate at the start."""

    momentum: float = 0.9
    """Momentum of SGD."""

    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of Adam's moments."""

    weight_decay: float = 0.0
    """L2 penalty (sgd, adam) or decoupled decay (adamw)."""

    schedule: Literal["constant", "cosine", "step"] = "cosine"
    """constant; cosine: half a cosine to zero, after the warm-up; step: multiplied by a factor at milestones."""

    milestones: tuple[float, ...] = (0.2, 0.4)
    """When the step schedule decays, as fractions of all rounds."""

    decay: float = 0.1
    """Factor of the step schedule at each milestone."""

    warm_up: float = 0.0
    """Fraction of all rounds in which the learning rate rises linearly, from a hundredth."""

    def __post_init__(self) -> None:
        positive(lr=self.lr, decay=self.decay)
        not_negative(weight_decay=self.weight_decay)
        fraction(momentum=self.momentum, warm_up=self.warm_up)
        fraction(**{f"betas[{i}]": beta for i, beta in enumerate(self.betas)})
        increasing = sorted(self.milestones) == list(self.milestones)
        inside = all(0 < milestone < 1 for milestone in self.milestones)
        require(increasing and inside, "milestones", self.milestones, "increasing fractions between 0 and 1")

    def factor(self, progress: float) -> float:
        """Factor of the learning rate after a fraction ``progress`` of the rounds."""
        if progress < self.warm_up:
            return 0.01 + 0.99 * progress / self.warm_up
        if self.schedule == "cosine":
            return half_cosine((progress - self.warm_up) / (1 - self.warm_up))
        if self.schedule == "step":
            return float(self.decay ** sum(progress >= milestone for milestone in self.milestones))
        return 1.0


@dataclass(frozen=True)
class OptimizersConfig:
    """Optimizers of both networks."""

    student: OptimizerConfig = OptimizerConfig(weight_decay=5e-4)
    generator: OptimizerConfig = OptimizerConfig(name="adam", lr=1e-3)

    backend: Literal["torch", "apex"] = "torch"
    """Implementation of the optimizers: PyTorch's, or NVIDIA apex's where it is installed."""


@dataclass(frozen=True)
class EngineConfig:
    """How a round runs; none of this changes the result beyond rounding."""

    precision: Precision = "auto"
    """Precision of convolutions and matrix products; auto is bfloat16 if the hardware has it. Losses stay float32."""

    channels_last: Switch = "auto"
    """Channels-last memory format, end to end."""

    fused_optimizers: Switch = "auto"
    """One kernel per optimizer step."""

    fold_batchnorm: Switch = "auto"
    """Fold the teacher's BatchNorms into its convolutions."""

    fuse_batchnorm: Switch = "auto"
    """Compute each BatchNorm of student and generator together with the addition and the activation after it."""

    fuse_convolutions: Switch = "auto"
    """Compute 3×3 convolutions together with what follows them, in bfloat16 on AMX tiles of a CPU."""

    cast_weights: Switch = "auto"
    """All weights of a network that learns cast at once, instead of one by one."""

    merge_upsampling: Switch = "auto"
    """Compute each upsampling of the generator and the convolution after it as one operation."""

    keep_memory: Switch = "auto"
    """Reuse memory freed in one round in the next, on a CPU, instead of returning it to the system."""

    cuda_graph: Switch = "auto"
    """Capture the whole round as one CUDA graph."""

    two_streams: Switch = "off"
    """Run teacher and student of a captured round in parallel: 3 to 4 % less time on an H200, and more memory."""

    compile: Switch = "off"
    """Compile the networks with torch.compile."""

    batchnorm: Literal["whole", "local"] = "whole"
    """Where ranks share a batch, the statistics that BatchNorms normalise with in training: those of the whole batch,
    or of each rank's share, which saves a collective per BatchNorm but is a different computation."""

    sent_gradients: Literal["float32", "bfloat16"] = "float32"
    """Where ranks share a batch, the dtype in which their gradients are averaged."""


@dataclass(frozen=True)
class SelectionConfig:
    """Selection of the best student without labels, by agreement with the teacher on a bank of generated images."""

    bank_size: int = 512
    """Number of images in the bank; collected evenly over the first half of the rounds, then fixed."""

    every: int = 25
    """Evaluation interval, in rounds: agreement, and accuracy where an evaluation set is given."""

    def __post_init__(self) -> None:
        positive(bank_size=self.bank_size, every=self.every)


@dataclass(frozen=True)
class CollapseConfig:
    """When the generator counts as collapsed, checked at every logging interval, and what is done then."""

    response: Literal["rollback", "reset", "warn"] = "rollback"
    """rollback: return to the last healthy weights, or to new ones if there are none or it happens again. reset: start
    from new weights at once. warn: only log it."""

    budget: int = 3
    """Largest number of rollbacks and resets in a run."""

    class_entropy: float = 0.3
    """Collapsed if the entropy of the predicted classes, as a fraction of its maximum, is lower."""

    pairwise_diversity: float = 0.1
    """Collapsed if the mean difference between images, in standard deviations, is lower."""

    grace: float = 0.1
    """Initial fraction of the rounds without checks: an untrained generator may make images of few classes."""

    def __post_init__(self) -> None:
        not_negative(budget=self.budget, class_entropy=self.class_entropy, pairwise_diversity=self.pairwise_diversity)
        require(0 <= self.grace <= 1, "grace", self.grace, "in [0, 1]")


@dataclass(frozen=True)
class RecordingConfig:
    """How often metrics and checkpoints are written."""

    log_every: int = 10
    """Logging interval, in rounds; the host waits for the device only then."""

    checkpoint_every: int = 50
    """Checkpoint interval, in rounds."""

    def __post_init__(self) -> None:
        positive(log_every=self.log_every, checkpoint_every=self.checkpoint_every)


@dataclass(frozen=True)
class DistillConfig:
    """Everything that determines a distillation."""

    fused: bool = True
    """Use fused loss kernels and every part of the engine that is on auto; otherwise plain PyTorch."""

    seed: int = 0
    """Seed of networks, noise and mixing coefficients."""

    device: str = "auto"
    """cpu, cuda or cuda:N; auto takes a GPU where there is one."""

    teacher: TeacherConfig = TeacherConfig()
    student: StudentConfig = StudentConfig()
    generator: GeneratorConfig = GeneratorConfig()
    method: MethodConfig = MethodConfig()
    optimizer: OptimizersConfig = OptimizersConfig()
    engine: EngineConfig = EngineConfig()
    selection: SelectionConfig = SelectionConfig()
    collapse: CollapseConfig = CollapseConfig()
    recording: RecordingConfig = RecordingConfig()

    def __post_init__(self) -> None:
        require(0 <= self.seed < 2**63, "seed", self.seed, "between 0 and 2^63 - 1")
