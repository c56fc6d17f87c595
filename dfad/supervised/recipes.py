"""Settings of a teacher's training: frozen values, and presets."""

from dataclasses import dataclass, field
from typing import Literal

from dfad.config import EngineConfig, Keywords, Precision, Switch, half_cosine
from dfad.data import AugmentConfig, DataConfig
from dfad.validation import fraction, not_negative, positive, require


@dataclass(frozen=True)
class NetworkConfig:
    """The network to train; channels and classes follow from the data."""

    factory: str = "convnet"
    """Callable that builds it: package.module:callable, or a bare name for one of dfad.models."""

    kwargs: Keywords = field(default_factory=dict)
    """Its keyword arguments; num_classes and in_channels are added where it takes them."""


@dataclass(frozen=True)
class Recipe:
    """Everything that determines a teacher: SGD with Nesterov momentum on the train split of a data set."""

    data: DataConfig = DataConfig()
    network: NetworkConfig = NetworkConfig()
    augment: AugmentConfig = AugmentConfig()

    epochs: int = 20
    """Passes over the train split."""

    batch_size: int = 128
    """Images per step."""

    lr: float = 0.1
    """Highest learning rate."""

    momentum: float = 0.9
    """Nesterov momentum."""

    weight_decay: float = 5e-4
    """L2 penalty on weights; biases and BatchNorm go without."""

    schedule: Literal["cosine", "onecycle"] = "cosine"
    """cosine: half a cosine to zero; onecycle: up from a twenty-fifth in the first 30 % of the steps, then a cosine."""

    label_smoothing: float = 0.0
    """Share of the label that is spread over all classes."""

    ema: float = 0.0
    """Decay per step of an average of the weights, which becomes the result; 0 uses the weights themselves."""

    seed: int = 0
    """Seed of weights, order and augmentation."""

    device: str = "auto"
    """cpu, cuda or cuda:N; auto takes a GPU where there is one."""

    precision: Precision = "auto"
    """Precision of convolutions and matrix products; auto is bfloat16 if the hardware has it. Losses stay float32."""

    channels_last: Switch = "auto"
    """Channels-last memory format."""

    cuda_graph: Switch = "auto"
    """Capture the step as one CUDA graph."""

    compile: Switch = "off"
    """Compile the network with torch.compile."""

    evaluate_every: int = 1
    """Evaluation interval on the test split, in epochs; nothing is selected by it: the last network is the result."""

    checkpoint_every: int = 1
    """Checkpoint interval, in epochs."""

    def __post_init__(self) -> None:
        positive(
            epochs=self.epochs,
            lr=self.lr,
            evaluate_every=self.evaluate_every,
            checkpoint_every=self.checkpoint_every,
        )
        # BatchNorm in training mode needs more than one value per channel for a variance
        require(self.batch_size >= 2, "batch_size", self.batch_size, "2 or more")
        not_negative(weight_decay=self.weight_decay)
        fraction(momentum=self.momentum, label_smoothing=self.label_smoothing, ema=self.ema)

    @property
    def engine(self) -> EngineConfig:
        """Settings of the engine for a step."""
        return EngineConfig(
            precision=self.precision,
            channels_last=self.channels_last,
            cuda_graph=self.cuda_graph,
            compile=self.compile,
        )

    def factor(self, progress: float) -> float:
        """Factor of the learning rate after a fraction ``progress`` of the steps."""
        warm_up = 0.3 if self.schedule == "onecycle" else 0.0
        if progress < warm_up:
            return 1 / 25 + (1 - 1 / 25) * progress / warm_up
        return half_cosine((progress - warm_up) / (1 - warm_up))


def _cifar(name: str) -> Recipe:
    return Recipe(
        data=DataConfig(name=name),
        network=NetworkConfig("resnet34"),
        augment=AugmentConfig(flip=True, translate=4),
        epochs=200,
    )


RECIPES = {
    # 99.2 to 99.4 % of the 360 held-out images, over five seeds
    "digits": Recipe(
        data=DataConfig(name="digits"),
        network=NetworkConfig("convnet", {"channels": [32, 64, 128]}),
        augment=AugmentConfig(translate=1),
        epochs=30,
        batch_size=64,
    ),
    # 99.4 % of the 10,000 test images, in two minutes of processor time
    "mnist": Recipe(
        data=DataConfig(name="mnist"),
        network=NetworkConfig("lenet5"),
        augment=AugmentConfig(translate=2),
        epochs=8,
        lr=0.05,
        schedule="onecycle",
    ),
    # not measured yet: meant for a GPU
    "cifar10": _cifar("cifar10"),
    "cifar100": _cifar("cifar100"),
    # about 14 PFLOP, a minute of an H200. Neither label smoothing, which takes from the soft labels what a student
    # learns of them, nor an average of weights, which a learning rate that ends at zero does not need
    "cifar10-fast": Recipe(
        data=DataConfig(name="cifar10"),
        network=NetworkConfig("resnet34"),
        augment=AugmentConfig(flip=True, translate=4, cutout=8),
        epochs=40,
        batch_size=512,
        lr=0.4,
        schedule="onecycle",
        evaluate_every=5,
        checkpoint_every=10,
    ),
}
"""Values of ``--preset`` of ``python -m dfad.teacher``."""
