"""How a round runs on the machine at hand: precision, memory format, optimizers, compilation, CUDA graph.

The round defines what is computed and does not know how it runs; this module knows nothing of the method.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from dfad.config import EngineConfig, OptimizerConfig, Switch
from dfad.engine import fuse_convolutions as chains
from dfad.engine.cuda_graph import RoundGraphs
from dfad.engine.distributed import GradientBucket, WholeBatchNorm, average_statistics
from dfad.engine.keep_memory import has_mallopt, keep_memory
from dfad.engine.optimizers import apex_optimizer, require_apex, torch_optimizer
from dfad.engine.placement import Placement
from dfad.engine.precision import autocast, choose_precision, dtype_of, float32_products
from dfad.engine.two_streams import TwoStreams
from dfad.errors import ConfigurationError
from dfad.ranks import Ranks, current_ranks, local_rank
from dfad_kernels import kernel_name

log = logging.getLogger(__name__)

One = TypeVar("One")
Other = TypeVar("Other")


class Unavailable(Exception):
    """Why a part of the engine cannot run here."""


class Engine:
    """The parts of the engine that a configuration asks for and the machine supports.

    Args:
        config: each part's switch.
        fused: meaning of ``auto``: on, where the machine supports it.
        device: where everything runs.
        optimizer_backend: ``torch`` or ``apex``.
        ranks: which share every step; those of the process group where not given.

    Raises:
        ConfigurationError: if a part that is explicitly on cannot run here.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        fused: bool,
        device: torch.device,
        optimizer_backend: str = "torch",
        ranks: Ranks | None = None,
    ) -> None:
        self.config = config
        self.fused = fused
        self.device = device
        self.optimizer_backend = optimizer_backend
        self.ranks = ranks or current_ranks()
        self.whole_batch_norms = self.ranks.several and config.batchnorm == "whole"
        """Whether BatchNorms that learn take their statistics of the images of all ranks."""
        self._buckets: WeakKeyDictionary[torch.optim.Optimizer, GradientBucket] = WeakKeyDictionary()
        if self.ranks.several:
            log.info(
                "%d ranks share each batch; BatchNorms that learn take the statistics of %s.",
                self.ranks.count,
                "all, by PyTorch's operations" if self.whole_batch_norms else "each rank's own images",
            )
        if optimizer_backend == "apex":
            require_apex(device)
        self.precision = choose_precision(config.precision, device, fused=fused)
        self.channels_last = self._admit("channels_last", config.channels_last)
        self.fused_optimizers = self._admit("fused_optimizers", config.fused_optimizers)
        self.fold_batchnorm = self._admit("fold_batchnorm", config.fold_batchnorm)
        self.merge_upsampling = self._admit("merge_upsampling", config.merge_upsampling)
        self.compile = self._admit("compile", config.compile)
        self.cuda_graph = self._admit("cuda_graph", config.cuda_graph, self._check_cuda_graph)
        self.fuse_batchnorm = self._admit("fuse_batchnorm", config.fuse_batchnorm, self._check_fuse_batchnorm)
        self.cast_weights = self._admit("cast_weights", config.cast_weights, self._check_cast_weights)
        self.fuse_convolutions = self._admit(
            "fuse_convolutions", config.fuse_convolutions, self._check_fuse_convolutions
        )
        self.keep_memory = self._admit("keep_memory", config.keep_memory, self._check_keep_memory)
        self.two_streams = self._admit("two_streams", config.two_streams, self._check_two_streams)
        self._streams = TwoStreams(device) if self.two_streams else None
        # dynamic loss scale, on the device; both networks share it, so that an overflow in one affects both
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision == "float16")
        self.graphs = RoundGraphs(device, required=config.cuda_graph == "on") if self.cuda_graph else None

    def _admit(self, name: str, switch: Switch, check: Callable[[], None] = lambda: None) -> bool:
        if switch == "off" or (switch == "auto" and not self.fused):
            return False
        try:
            check()
        except Unavailable as reason:
            if switch == "on":
                raise ConfigurationError(
                    f"engine.{name} is on, but cannot run here: {reason}. Leave it on auto, or switch it off."
                ) from None
            # its words: a log record that is kept would keep the exception, its frames, and all that they hold
            log.info("Without engine.%s: %s.", name, str(reason))
            return False
        return True

    def _check_fuse_batchnorm(self) -> None:
        if self.compile:
            raise Unavailable("engine.compile is on, and fuses them in its own way")
        if self.device.type == "cuda" and not self.cuda_graph and self.config.fuse_batchnorm == "auto":
            raise Unavailable("without engine.cuda_graph its kernels take longer to launch than they save")
        try:
            kernel_name(self.device)
        except RuntimeError as error:
            raise Unavailable(str(error)) from None

    def _check_cast_weights(self) -> None:
        if self.device.type != "cuda":
            raise Unavailable("a CPU launches no kernels, and casts one by one as fast")
        if self.dtype == torch.float32:
            raise Unavailable(f"the precision is {self.precision}, in which weights are used as they are")
        if self.compile:
            raise Unavailable("engine.compile is on, and casts them in its own way")

    def _check_fuse_convolutions(self) -> None:
        if self.device.type != "cpu":
            raise Unavailable(f"its kernels are for CPUs, and the device is {self.device}")
        if not self.fuse_batchnorm:
            raise Unavailable("engine.fuse_batchnorm is off, or cannot run here, and it is built on that")
        if self.dtype != torch.bfloat16:
            raise Unavailable(f"its tiles are of bfloat16, and the precision is {self.precision}")
        reason = chains.unavailable()
        if reason:
            raise Unavailable(reason)

    def _check_keep_memory(self) -> None:
        if self.device.type != "cpu":
            raise Unavailable(f"PyTorch keeps the memory of {self.device} itself")
        if not has_mallopt():
            raise Unavailable("the C library has no mallopt")

    def _check_cuda_graph(self) -> None:
        if self.device.type != "cuda":
            raise Unavailable(f"CUDA graphs need an NVIDIA GPU, and the device is {self.device}")
        if self.optimizer_backend == "apex":
            raise Unavailable("apex's optimizers take the learning rate from the host, which a graph would fix")
        if not self.fused_optimizers:
            raise Unavailable("engine.fused_optimizers is off, and a graph would fix the learning rate")
        if not self.ranks.capturable(self.device):
            raise Unavailable("the ranks do not speak by NCCL, and a graph holds nothing else of them")

    def _check_two_streams(self) -> None:
        if not self.cuda_graph:
            raise Unavailable("engine.cuda_graph is off, or cannot run here, and the host launches one after the other")

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of convolutions and matrix products."""
        return dtype_of(self.precision)

    def autocast(self) -> AbstractContextManager[object]:
        """A context with the precision of the networks' forward passes."""
        return autocast(self.precision, self.device)

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Forward passes of a step: in the engine's precision, its batch being that of all ranks."""
        with WholeBatchNorm(self.ranks) if self.whole_batch_norms else nullcontext(), self.autocast():
            yield

    @contextmanager
    def running(self) -> Iterator[None]:
        """Apply what a run changes in the process: cuDNN's choice of algorithms, TF32, kept memory.

        At the end everything is restored, and the graphs of rounds are dropped.
        """
        with ExitStack() as stack:
            if self.device.type == "cuda":
                stack.callback(setattr, torch.backends.cudnn, "benchmark", torch.backends.cudnn.benchmark)
                torch.backends.cudnn.benchmark = self.fused  # shapes never change
                # by default cuDNN's convolutions are TF32, also for a network that must not be rounded so
                stack.enter_context(float32_products("tf32" if self.precision == "tf32" else "ieee"))
            if self.keep_memory:
                stack.enter_context(keep_memory())
            stack.callback(self.forget_graphs)
            yield

    def place(self, network: nn.Module, **options: Any) -> nn.Module:
        """A network in the form and on the device that the engine chooses; see
        :class:`dfad.engine.placement.Placement`."""
        return Placement(self, network, **options).take()

    def optimizer(self, config: OptimizerConfig, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """An optimizer over parameters that are on the device."""
        if self.optimizer_backend == "apex":
            return apex_optimizer(config, parameters)
        return torch_optimizer(config, parameters, self.device, fused=self.fused_optimizers, capturable=self.cuda_graph)

    def run(
        self, round_: Callable[[], Mapping[str, Tensor]], generators: Sequence[torch.Generator] = ()
    ) -> Mapping[str, Tensor]:
        """Run a round, which does the same at each call; its results may be overwritten by the next one.

        Args:
            round_: must not wait for the device.
            generators: of its random numbers.
        """
        return round_() if self.graphs is None else self.graphs.run(round_, generators)

    def both(self, aside: Callable[[], One], ahead: Callable[[], Other]) -> tuple[One, Other]:
        """The results of two independent functions, on two streams if possible; the first one takes no gradients."""
        return (aside(), ahead()) if self._streams is None else self._streams.both(aside, ahead)

    @property
    def captured(self) -> bool:
        """Whether rounds were replayed as a CUDA graph, which is recorded with every measurement on a GPU."""
        return self.graphs is not None and self.graphs.captures > 0

    def forget_graphs(self) -> None:
        """Drop captured graphs: needed whenever a tensor of a round is replaced, for example by loading a state."""
        if self.graphs is not None:
            self.graphs.forget()

    def descend(self, loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
        """One step of an optimizer down the gradient of a loss: of its mean over the ranks, each of which has the loss
        of its share."""
        optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        if self.ranks.several:
            self._bucket(optimizer).average()
        self.scaler.step(optimizer)
        self.scaler.update()

    def _bucket(self, optimizer: torch.optim.Optimizer) -> GradientBucket:
        if optimizer not in self._buckets:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            self._buckets[optimizer] = GradientBucket(
                parameters, self.ranks, getattr(torch, self.config.sent_gradients)
            )
        return self._buckets[optimizer]

    def end_round(self, *networks: nn.Module) -> None:
        """Let networks that each rank has normalised by itself hold the same running statistics again."""
        if self.ranks.several and not self.whole_batch_norms:
            average_statistics(self.ranks, *networks)


def wait_for(device: torch.device) -> None:
    """Wait until a GPU has finished its work; does nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def choose_device(name: str) -> torch.device:
    """The device of a name; ``auto`` takes a GPU where there is one.

    Raises:
        ConfigurationError: if the name is not a device, or the device is not available.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigurationError(f"There is no device {name!r}. Use auto, cpu, cuda or cuda:N.") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigurationError(f"The device {name!r} is not supported. Use auto, cpu, cuda or cuda:N.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigurationError(
            f"The device {name!r} is not available: PyTorch {torch.__version__} sees {torch.cuda.device_count()} GPUs. "
            "Use --device auto or cpu."
        )
    if device.type == "cuda" and current_ranks().several:
        _require_gpu_of_its_own(device)
    return device


def _require_gpu_of_its_own(device: torch.device) -> None:
    gpus = torch.cuda.device_count()
    if device.index is not None or local_rank() >= gpus:
        raise ConfigurationError(
            f"Rank {local_rank()} of this machine has no GPU of its own: the device is {device}, and there are {gpus}. "
            "Leave --device on auto, and start at most as many ranks as there are GPUs (--nproc-per-node)."
        )
