"""Training of a teacher on labelled images."""

import inspect
import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dfad.data import Dataset, batch_source, shuffled
from dfad.data.evaluation import predict
from dfad.engine import Engine, choose_device
from dfad.engine.optimizers import load_optimizer_state, set_learning_rate, with_momentum
from dfad.errors import ConfigurationError, DivergenceError, name_of
from dfad.metrics import top_k_accuracy
from dfad.models.factory import build, remedy_for_classes, resolve
from dfad.models.outputs import as_outputs
from dfad.models.probing import dry_forward, images_taken, require_same_classes
from dfad.ranks import Ranks
from dfad.runs.settings import to_tree
from dfad.seeds import seeded, stream_seed
from dfad.supervised.recipes import Recipe

log = logging.getLogger(__name__)


class SupervisedTrainer:
    """Minimises the cross-entropy on a data set, epoch by epoch.

    Args:
        recipe: all settings.
        dataset: the one that the recipe names.
        ranks: which share each batch; those of the process group where not given.

    Raises:
        ModelError: if the network does not take the data set's images, or has another number of classes.
        ConfigurationError: if the machine does not support what the recipe asks for.
    """

    def __init__(self, recipe: Recipe, dataset: Dataset, ranks: Ranks | None = None) -> None:
        self.recipe = recipe
        self.dataset = dataset
        self.device = choose_device(recipe.device)
        self.engine = Engine(recipe.engine, fused=True, device=self.device, ranks=ranks)
        self.ranks = self.engine.ranks
        self.ranks.require_divides("batch_size", recipe.batch_size)
        self.kwargs = network_kwargs(recipe, dataset)
        with seeded(recipe.seed):
            network = build(recipe.network.factory, self.kwargs)
        _check_fit(network, dataset, recipe.network.factory)
        self.network = self.engine.place(network)
        self.average = (
            AveragedModel(self.network, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema), use_buffers=True)
            if recipe.ema
            else None
        )
        self.optimizer = self._optimizer()
        backend = recipe.data.backend
        self.train_source = batch_source(dataset, dataset.train, backend, self.device)
        self.test_source = batch_source(dataset, dataset.test, backend, self.device)
        self.steps_per_epoch = len(dataset.train) // recipe.batch_size
        if self.steps_per_epoch == 0:
            raise ConfigurationError(
                f"batch_size is {recipe.batch_size}, but {dataset.name} has only {len(dataset.train)} train images. "
                "Give a smaller --batch_size."
            )
        self.epoch = 0
        layout = torch.channels_last if self.engine.channels_last else torch.contiguous_format
        share = recipe.batch_size // self.ranks.count
        self.images = torch.empty(share, *dataset.image_shape, device=self.device, memory_format=layout)
        """The batch of every step, at one address, so that a step can be captured as a CUDA graph."""
        self.labels = torch.empty(share, dtype=torch.int64, device=self.device)

    def _optimizer(self) -> torch.optim.Optimizer:
        parameters = list(self.network.parameters())
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": self.recipe.weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        for group in groups:
            # a float would be baked into a captured graph
            group["lr"] = torch.tensor(self.recipe.lr, device=self.device)
        momentum = self.recipe.momentum
        fused = self.engine.fused_optimizers
        return with_momentum(torch.optim.SGD(groups, momentum=momentum, nesterov=momentum > 0, fused=fused))

    def step(self) -> Mapping[str, Tensor]:
        """One step on the current batch."""
        with self.engine.forward():
            logits = as_outputs(self.network(self.images)).logits
        loss = F.cross_entropy(logits.float(), self.labels, label_smoothing=self.recipe.label_smoothing)
        self.engine.descend(loss, self.optimizer)
        return {"loss": loss.detach()}

    def train_epoch(self) -> float:
        """One pass over the train split; returns its mean loss.

        Raises:
            DivergenceError: if that is NaN or infinite.
        """
        recipe = self.recipe
        plan = shuffled(
            len(self.dataset.train), self.dataset.image_shape, recipe.augment, seed=recipe.seed, epoch=self.epoch
        )
        self.network.train()
        total = torch.zeros((), device=self.device)
        plan = plan.share(recipe.batch_size, self.ranks)
        batches = self.train_source.batches(plan, recipe.batch_size // self.ranks.count, drop_last=True)
        # for networks with dropout: a resumed run draws the same, and each rank something else
        seed = recipe.seed + self.epoch
        with seeded(stream_seed(seed, self.ranks.rank) if self.ranks.rank else seed, self.device):
            for index, (images, labels) in enumerate(batches):
                progress = (self.epoch + index / self.steps_per_epoch) / recipe.epochs
                set_learning_rate(self.optimizer, recipe.lr * recipe.factor(progress))
                self.images.copy_(images)
                self.labels.copy_(labels)
                total += self.engine.run(self.step)["loss"]
                if self.average is not None:
                    self.average.update_parameters(self.network)
        self.epoch += 1
        loss = self.ranks.average(total).item() / self.steps_per_epoch
        if not math.isfinite(loss):
            raise DivergenceError(f"The loss became {loss} in epoch {self.epoch}. Lower --lr, now {recipe.lr}.")
        return loss

    @property
    def result(self) -> nn.Module:
        """The resulting network: with averaged weights if the recipe has an average."""
        return self.network if self.average is None else self.average.module

    def accuracy(self) -> float:
        """Accuracy on the test split."""
        return top_k_accuracy(*predict(self.result, self.test_source, len(self.dataset.test), self.ranks))

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next epoch depends on."""
        return {
            "epoch": self.epoch,
            "network": self.network.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.engine.scaler.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        self.epoch = state["epoch"]
        self.network.load_state_dict(state["network"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        load_optimizer_state(self.optimizer, state["optimizer"])
        self.engine.scaler.load_state_dict(state["scaler"])
        self.engine.forget_graphs()

    def manifest(self, accuracy: float) -> dict[str, Any]:
        """The manifest of :attr:`result`."""
        return {
            "architecture": {"factory": self.recipe.network.factory, "kwargs": self.kwargs},
            "image_shape": self.dataset.image_shape,
            "mean": self.dataset.mean,
            "std": self.dataset.std,
            "classes": self.dataset.classes,
            "data": {"name": self.dataset.name, "fingerprint": self.dataset.fingerprint},
            "accuracy": accuracy,
            "recipe": to_tree(self.recipe),
        }


def network_kwargs(recipe: Recipe, dataset: Dataset) -> dict[str, Any]:
    """The recipe's keyword arguments, with the data set's classes and channels if the factory takes them."""
    offered = {"num_classes": len(dataset.classes), "in_channels": dataset.image_shape[0]}
    taken = inspect.signature(resolve(recipe.network.factory)).parameters
    return {**{name: value for name, value in offered.items() if name in taken}, **recipe.network.kwargs}


def _check_fit(network: nn.Module, dataset: Dataset, factory: str) -> None:
    remedy = "Choose another --network.factory or --network.kwargs."
    with images_taken(name_of(network), f"the images of {dataset.name}", dataset.image_shape, remedy):
        classes = dry_forward(network, dataset.image_shape).logits.shape[1]
    remedy = remedy_for_classes(factory, len(dataset.classes), "--network")
    require_same_classes(network, classes, dataset.name, len(dataset.classes), remedy)
