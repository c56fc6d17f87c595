"""A generator that makes images of one kind teaches nothing: noticing that, and bringing it back."""

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dfad.config import CollapseConfig
from dfad.engine.optimizers import optimizer_tensors

log = logging.getLogger(__name__)

State = Mapping[str, Tensor]


class CollapseGuard:
    """Watches how the generated images are; where they collapse, it gives the generator back its last healthy weights,
    or new ones.

    All is written in place: a captured round goes on with it.

    Args:
        config: what counts as a collapse, and what is done then.
        generator: which is watched.
        optimizer: of the generator; its moments go the same way as the weights.
        fresh: new weights, for the given number of resets.
    """

    def __init__(
        self,
        config: CollapseConfig,
        generator: nn.Module,
        optimizer: torch.optim.Optimizer,
        fresh: Callable[[int], State],
    ) -> None:
        self.config = config
        self.generator = generator
        self.optimizer = optimizer
        self.fresh = fresh
        self.recoveries = 0
        """How often it has brought the generator back."""
        self.healthy: dict[str, list[Tensor]] = {}
        self._alarmed = False

    def is_collapsed(self, observed: Mapping[str, float], progress: float) -> bool:
        """Whether the images are of few classes or much alike.

        Args:
            observed: ``class_entropy`` and ``pairwise_diversity`` of generated images.
            progress: fraction of the rounds that are done.
        """
        low = any(observed[name] < getattr(self.config, name) for name in ("class_entropy", "pairwise_diversity"))
        return low and progress > self.config.grace

    def look(self, observed: Mapping[str, float], round_index: int, rounds: int) -> dict[str, float]:
        """Judge the generator and, if it has collapsed, bring it back; returns what is worth recording."""
        collapsed = self.is_collapsed(observed, round_index / rounds)
        if collapsed and not self._alarmed:
            self._respond(observed, round_index)
        elif not collapsed:
            self._alarmed = False
            if self.config.response == "rollback":
                self.healthy = {name: [x.clone() for x in tensors] for name, tensors in self._tensors().items()}
        return {"collapsed": float(collapsed), "recoveries": float(self.recoveries)}

    def _respond(self, observed: Mapping[str, float], round_index: int) -> None:
        config = self.config
        log.warning(
            "The generator collapsed by round %d: the class entropy of its images is %.2f of the maximum, their "
            "pairwise diversity %.2f. A larger --method.regularizers.diversity or a lower --optimizer.generator.lr may "
            "help.",
            round_index,
            observed["class_entropy"],
            observed["pairwise_diversity"],
        )
        if config.response == "warn" or self.recoveries == config.budget:
            self._alarmed = True  # until it has recovered by itself: once is enough
            if config.response != "warn":
                log.warning("All %d recoveries of --collapse.budget are used up; it is left as it is.", config.budget)
            return
        self.recoveries += 1
        if self.healthy:
            self._write(self.healthy)
            # a second collapse from here would be the same one: the next response is a reset
            self.healthy = {}
            done = "is back at its last healthy weights"
        else:
            self.generator.load_state_dict(self.fresh(self.recoveries))
            for tensor in self._tensors()["optimizer"]:
                tensor.zero_()
            done = "starts again from new weights"
        log.warning("The generator %s (recovery %d of %d).", done, self.recoveries, config.budget)

    def _tensors(self) -> dict[str, list[Tensor]]:
        return {
            "generator": list(self.generator.state_dict().values()),
            "optimizer": optimizer_tensors(self.optimizer),
        }

    @torch.no_grad()
    def _write(self, saved: Mapping[str, list[Tensor]]) -> None:
        for name, tensors in self._tensors().items():
            for tensor, value in zip(tensors, saved[name], strict=True):
                tensor.copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """Everything that its next look depends on."""
        return {"recoveries": self.recoveries, "alarmed": self._alarmed, "healthy": self.healthy}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        self.recoveries, self._alarmed = state["recoveries"], state["alarmed"]
        devices = {name: [x.device for x in tensors] for name, tensors in self._tensors().items()}
        self.healthy = {
            name: [x.to(device) for x, device in zip(tensors, devices[name], strict=False)]
            for name, tensors in state["healthy"].items()
        }
