"""How a teacher is trained on data: frozen values, and presets of them."""

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
    """Down half a cosine; or up from a twenty-fifth over the first 30 % of the steps, then down half a cosine."""

    label_smoothing: float = 0.0
    """Part of the label that is spread over all classes."""

    ema: float = 0.0
    """Decay per step of an average of the weights, which is then what is kept; 0 keeps the weights themselves."""

    seed: int = 0
    """Of weights, order and augmentation."""

    device: str = "auto"
    """cpu, cuda or cuda:N; auto takes a GPU where there is one."""

    precision: Precision = "auto"
    """Of convolutions and matrix products; auto is bfloat16 where the hardware has it. The loss stays float32."""

    channels_last: Switch = "auto"
    """Channels-last memory format."""

    cuda_graph: Switch = "auto"
    """The step captured as one CUDA graph."""

    compile: Switch = "off"
    """The network through torch.compile."""

    evaluate_every: int = 1
    """Evaluation interval on the test split, in epochs; it selects nothing, the last network is kept."""

    checkpoint_every: int = 1
    """Checkpoint interval, in epochs."""

    def __post_init__(self) -> None:
        positive(
            epochs=self.epochs,
            lr=self.lr,
            evaluate_every=self.evaluate_every,
            checkpoint_every=self.checkpoint_every,
        )
        # BatchNorm in training mode has no variance to take of a single value per channel
        require(self.batch_size >= 2, "batch_size", self.batch_size, "2 or more")
        not_negative(weight_decay=self.weight_decay)
        fraction(momentum=self.momentum, label_smoothing=self.label_smoothing, ema=self.ema)

    @property
    def engine(self) -> EngineConfig:
        """How a step runs."""
        return EngineConfig(
            precision=self.precision,
            channels_last=self.channels_last,
            cuda_graph=self.cuda_graph,
            compile=self.compile,
        )

    def factor(self, progress: float) -> float:
        """What the learning rate is multiplied by when a fraction ``progress`` of the steps is done."""
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
    # not measured yet. About 14 PFLOP; neither label smoothing, which takes from the soft labels what a student learns
    # of them, nor an average of weights, which a learning rate that ends at zero does not need
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
"""What ``--preset`` of ``python -m dfad.teacher`` names."""
