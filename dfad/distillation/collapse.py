"""Detection of mode collapse of the generator, and recovery from it."""

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
    """Watches the generated images; on mode collapse it restores the generator's last healthy weights, or gives it new
    ones.

    Everything is written in place, so that a captured round remains valid.

    Args:
        config: what counts as a collapse, and the response to it.
        generator: the network to watch.
        optimizer: of the generator; its moments are restored or reset with the weights.
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
        """Number of rollbacks and resets so far."""
        self.healthy: dict[str, list[Tensor]] = {}
        self._alarmed = False

    def is_collapsed(self, observed: Mapping[str, float], progress: float) -> bool:
        """Whether the images belong to few classes or hardly differ.

        Args:
            observed: ``class_entropy`` and ``pairwise_diversity`` of generated images.
            progress: fraction of the rounds that are done.
        """
        low = any(observed[name] < getattr(self.config, name) for name in ("class_entropy", "pairwise_diversity"))
        return low and progress > self.config.grace

    def look(self, observed: Mapping[str, float], round_index: int, rounds: int) -> dict[str, float]:
        """Check the generator and recover it if it has collapsed; returns metrics to record."""
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
            self._alarmed = True  # one warning until it has recovered by itself
            if config.response != "warn":
                log.warning("All %d recoveries of --collapse.budget are used up; it is left as it is.", config.budget)
            return
        self.recoveries += 1
        if self.healthy:
            self._write(self.healthy)
            # another collapse from these weights would repeat this one, so the next response is a reset
            self.healthy = {}
            done = "returns to its last healthy weights"
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
        """Everything that the next check depends on."""
        return {"recoveries": self.recoveries, "alarmed": self._alarmed, "healthy": self.healthy}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        self.recoveries, self._alarmed = state["recoveries"], state["alarmed"]
        devices = {name: [x.device for x in tensors] for name, tensors in self._tensors().items()}
        self.healthy = {
            name: [x.to(device) for x, device in zip(tensors, devices[name], strict=True)]
            for name, tensors in state["healthy"].items()
        }
