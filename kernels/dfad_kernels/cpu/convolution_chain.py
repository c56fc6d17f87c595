"""Chains of 3×3 convolutions, each with the BatchNorm, the addition and the activation that follow it.

For CPUs with bfloat16 tiles (Intel AMX). A chain is one node of autograd's graph: nothing is dispatched between its
links, and gradients that meet in it are added as they are read. It is no operator of PyTorch's dispatcher, because its
number of tensors depends on its links, and because it does not repeat checks.
"""

import functools
import importlib
import operator
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dfad_kernels.features import address, channels_last

TILES = "x86_64_amx"
"""The instruction set with tiles in hardware; the other one computes the same, slowly."""


@dataclass(frozen=True)
class Link:
    r"""A convolution and what follows it.

    .. math:: y = k * x, \quad \mathrm{pre} = \gamma \frac{y - \mu}{\sqrt{\sigma^2 + \varepsilon}} + \beta + r, \quad
        \mathrm{post} = \varphi(\mathrm{pre}), \quad \varphi(v) = v \text{ where } v > 0, \text{ else } a v

    The values of a chain are numbered: its inputs first, then two for each link, pre and post.
    """

    source: int
    """The value x."""

    residual: int | None = None
    """The value r; nothing is added if None."""

    stride: int = 1

    negative_slope: float = 0.0
    """a, not negative; 0 is ReLU."""

    keeps_pre: bool = False
    """Whether pre is used."""

    keeps_post: bool = True
    """Whether post is used."""

    normalises: bool = True
    """Whether there is a BatchNorm; without one pre is y + β + r, and the link is frozen."""

    def result(self, source: Sequence[int], kernel: Tensor) -> tuple[int, int, int, int]:
        """The shape of y for a source of this shape."""
        batch, _, height, width = source
        return batch, kernel.shape[0], -(-height // self.stride), -(-width // self.stride)

    def flops(self, source: Sequence[int], kernel: Tensor) -> int:
        """FLOPs of the convolution, and of each of its gradients; a multiplication and an addition count as two."""
        batch, _, height, width = self.result(source, kernel)
        return 2 * batch * height * width * kernel.numel()


class Layer(NamedTuple):
    """The tensors and numbers of a link's convolution and BatchNorm, all float32."""

    kernel: Tensor
    """``(out, in, 3, 3)``, channels last in memory."""

    weight: Tensor | None = None
    """γ, ``(out,)``; 1 if None."""

    bias: Tensor | None = None
    """β, ``(out,)``; 0 if None."""

    running_mean: Tensor | None = None
    """``(out,)``, updated with the batch's mean; not updated if None."""

    running_variance: Tensor | None = None
    momentum: float = 0.1
    epsilon: float = 1e-5


class Misfit(ValueError):
    """A chain cannot compute its inputs; nothing was computed."""


def unavailable() -> str | None:
    """Why chains are not used on this machine; None if they are."""
    try:
        extension = _extension()
    except ImportError as error:
        return f"the kernels of chains cannot be loaded: {error}"
    return None if TILES in extension.isa else "the processor has no tiles (Intel AMX)"


def instruction_sets() -> list[str]:
    """Instruction sets that the kernels were compiled for and this processor supports; the last one is used."""
    return list(_extension().isa)


@functools.cache
def _extension() -> Any:
    return importlib.import_module("dfad_kernels._chains")


@functools.cache
def _kernels(instruction_set: str | None) -> Any:
    return getattr(_extension(), instruction_set or instruction_sets()[-1])


def admits(kernel: Tensor) -> bool:
    """Whether a link supports the shape and layout of a convolution's kernel."""
    out_channels, in_channels, *size = kernel.shape
    return (
        size == [3, 3]
        and (in_channels <= 16 or in_channels % 32 == 0)
        and (out_channels == 16 or out_channels % 32 == 0)
        and kernel.dtype == torch.float32
        and kernel.device.type == "cpu"
        and kernel.is_contiguous(memory_format=torch.channels_last)
    )


class ConvolutionChain:
    """Links that are computed together; their BatchNorms are in training mode.

    Args:
        links: the source and residual of each are inputs or values of earlier links.
        inputs: number of inputs.
        outputs: indices of the returned values.
    """

    flops: ClassVar[int] = 0
    """FLOPs of all chains in this process, forward and backward."""

    def __init__(self, links: Sequence[Link], inputs: int, outputs: Sequence[int]) -> None:
        self.links = tuple(links)
        self.inputs = inputs
        self.outputs = tuple(outputs)
        self.unwritten = self._find_unwritten()
        """For each link, whether post is never written: a single convolution reads it, and normalises on reading."""
        self.makers: dict[int, int] = {inputs + 2 * i + 1: i for i, unwritten in enumerate(self.unwritten) if unwritten}
        """The links of these values."""
        self.last_reader = {i: number for number, link in enumerate(links) for i in (link.source, link.residual)}
        posts = range(inputs + 1, inputs + 2 * len(links), 2)
        self.saved = {*posts, *(link.source for link in links)}
        """The values that the backward pass reads."""
        self._known: tuple[list[torch.Size], list[Tensor | None], list[int]] | None = None

    def __call__(
        self, layers: Sequence[Layer], inputs: Sequence[Tensor], *, instruction_set: str | None = None
    ) -> tuple[Tensor, ...]:
        """The outputs: bfloat16 features, channels-last in memory.

        Args:
            layers: one for each link.
            inputs: bfloat16 features ``(B, channels, height, width)`` on a CPU; channels last in memory, or they are
                copied so.
            instruction_set: one of :func:`instruction_sets`; the last one if None.

        Raises:
            Misfit: if shapes, layouts or dtypes are not what they must be.
        """
        for x in inputs:
            if x.dtype != torch.bfloat16 or x.device.type != "cpu" or x.ndim != 4 or x.numel() == 0:
                raise Misfit(
                    f"An input is {tuple(x.shape)}, {x.dtype}, on {x.device}; it must be (B, channels, height, width) "
                    "in torch.bfloat16 on a CPU, and hold something."
                )
        tensors = [tensor for layer in layers for tensor in layer[:5]]
        # what is unchanged since the last call was checked then
        known = [x.shape for x in inputs], tensors, [0 if t is None else t.data_ptr() for t in tensors]
        last = self._known
        if last is None or (known[0], known[2]) != (last[0], last[2]) or any(map(operator.is_not, tensors, last[1])):
            self._check(layers, inputs)
            self._known = known
        parameters = [tensor for layer in layers for tensor in layer[:3]]
        results: tuple[Tensor, ...] = _Chain.apply(
            self, tuple(layer[3:] for layer in layers), instruction_set, *inputs, *parameters
        )
        return results

    def reference(self, layers: Sequence[Layer], inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The reference: the equations as PyTorch operations in the inputs' dtype.

        Values are rounded to bfloat16 where the kernels round them, and gradients are not.
        """

        def compute(number: int, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
            link, layer = self.links[number], layers[number]
            y = F.conv2d(x, layer.kernel, stride=link.stride, padding=1)
            if link.normalises:
                statistics = layer.running_mean, layer.running_variance
                y = _Rounded.apply(y)
                pre = F.batch_norm(y, *statistics, layer.weight, layer.bias, True, layer.momentum, layer.epsilon)
            else:
                pre = y if layer.bias is None else y + layer.bias.view(-1, 1, 1)
            pre = pre if residual is None else pre + residual
            return _Rounded.apply(pre), _Rounded.apply(F.leaky_relu(pre, link.negative_slope))

        return self.link_by_link(inputs, compute)

    def link_by_link(
        self,
        inputs: Sequence[Tensor],
        compute: Callable[[int, Tensor, Tensor | None], tuple[Tensor | None, Tensor | None]],
    ) -> tuple[Tensor, ...]:
        """The values asked for.

        Args:
            inputs: the first values.
            compute: returns pre and post, or those that are kept, for a link's number, source and residual.
        """
        values: list[Tensor | None] = list(inputs)
        for number, link in enumerate(self.links):
            source = values[link.source]
            assert source is not None
            values += compute(number, source, None if link.residual is None else values[link.residual])
        return tuple(values[number] for number in self.outputs)  # type: ignore[misc]

    def _find_unwritten(self) -> list[bool]:
        numbers = [self.inputs + 2 * number + 1 for number in range(len(self.links))]
        read = Counter(link.source for link in self.links)
        elsewhere = {*(link.residual for link in self.links), *self.outputs}
        by_frozen = {link.source for link in self.links if not link.normalises}
        return [
            link.normalises
            and link.residual is None  # with one, y does not show where the ReLU is active
            and not link.keeps_pre
            and read[number] == 1
            and number not in elsewhere | by_frozen
            for number, link in zip(numbers, self.links, strict=True)
        ]

    def _check(self, layers: Sequence[Layer], inputs: Sequence[Tensor]) -> None:
        shapes: list[tuple[int, ...] | None] = [tuple(x.shape) for x in inputs]
        if len(inputs) != self.inputs or len(layers) != len(self.links):
            raise Misfit(
                f"{len(inputs)} inputs and {len(layers)} layers are given; the chain has {self.inputs} inputs and "
                f"{len(self.links)} links."
            )
        for number, (link, layer) in enumerate(zip(self.links, layers, strict=True)):
            if not admits(layer.kernel):
                raise Misfit(
                    f"The kernel of link {number} is {tuple(layer.kernel.shape)}, {layer.kernel.dtype}, on "
                    f"{layer.kernel.device}; it must be (out, in, 3, 3) in torch.float32 on a CPU, channels last in "
                    "memory, in at most 16 or divisible by 32, out 16 or divisible by 32."
                )
            operands = [shapes[i] if i is not None and i < len(shapes) else None for i in (link.source, link.residual)]
            source, residual = operands
            if source is None or source[1] != layer.kernel.shape[1]:
                raise Misfit(
                    f"Link {number} convolves {source or 'a value that does not exist'} with a kernel for "
                    f"{layer.kernel.shape[1]} channels."
                )
            shape = link.result(source, layer.kernel)
            if link.residual is not None and residual != shape:
                raise Misfit(
                    f"Link {number} adds {residual or 'a value that does not exist'} to {shape}; they must have the "
                    "same shape."
                )
            if link.normalises and shape[0] * shape[2] * shape[3] < 2:
                raise Misfit(f"Link {number} has a single value per channel, which has no variance.")
            if not link.normalises and any(tensor is not None and tensor.requires_grad for tensor in layer[:3]):
                raise Misfit(f"Link {number} has no BatchNorm, so nothing of it learns; give `parameter.detach()`.")
            for tensor in layer[1:5]:
                fits = tensor is None or (
                    tensor.shape == shape[1:2]
                    and tensor.dtype == torch.float32
                    and tensor.device.type == "cpu"
                    and tensor.is_contiguous()
                )
                if tensor is not None and not fits:
                    raise Misfit(
                        f"A parameter or statistic of link {number} is {tuple(tensor.shape)}, {tensor.dtype}, on "
                        f"{tensor.device}; it must be ({shape[1]},) in torch.float32 on a CPU, contiguous."
                    )
            shapes += [shape if link.keeps_pre else None, shape if link.keeps_post else None]


class _Rounded(torch.autograd.Function):
    """Rounding to bfloat16; its gradient is that of the identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.bfloat16().to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class _Tensors(NamedTuple):
    """The tensors of a chain's links, for both directions."""

    chain: ConvolutionChain
    epsilons: Sequence[float]

    parameters: Sequence[Any]
    """Kernel, weight and bias of each link."""

    values: Sequence[Tensor | None]
    """By their numbers, as far as they are kept."""

    results: Sequence[Tensor | None]
    """y of each link with a BatchNorm."""

    statistics: Sequence[Tensor | None]
    """The batch's mean and biased variance of these, ``(2, out)``."""

    def of_link(self, number: int) -> Any:
        """A link's kernel, weight and bias."""
        return self.parameters[3 * number : 3 * number + 3]

    def source(self, link: Link) -> Tensor:
        """What a link reads: a value, or another link's y, which it normalises and activates while reading."""
        maker = self.chain.makers.get(link.source)
        source = self.values[link.source] if maker is None else self.results[maker]
        assert source is not None
        return source

    def named(self, number: int, **others: Any) -> Any:
        """The kernels' struct of a link, with the other members given by name."""
        link, source = self.chain.links[number], self.source(self.chain.links[number])
        kernel, weight, bias = self.of_link(number)
        images, channels, height, width = source.shape
        members = {
            **{"images": images, "height": height, "width": width, "stride": link.stride},
            **{"in_channels": channels, "out_channels": kernel.shape[0], "negative_slope": link.negative_slope},
            **{"x": source, "kernel": kernel, "weight": weight, "bias": bias, "epsilon": self.epsilons[number]},
        }
        maker = self.chain.makers.get(link.source)
        if maker is not None:
            _, weight, bias = self.of_link(maker)
            members |= {"source_statistics": self.statistics[maker], "source_weight": weight, "source_bias": bias}
            members |= {"source_slope": self.chain.links[maker].negative_slope, "source_epsilon": self.epsilons[maker]}
        return _named("Link", **members, **others)


class _Chain(torch.autograd.Function):
    """The kernels of a chain's links, one after the other."""

    @staticmethod
    def forward(
        ctx: Any,
        chain: ConvolutionChain,
        statistics: tuple[tuple[Any, ...], ...],
        instruction_set: str | None,
        *tensors: Any,
    ) -> tuple[Tensor, ...]:
        ctx.kernels = _kernels(instruction_set)
        epsilons = [of_link[-1] for of_link in statistics]
        threads = torch.get_num_threads()
        differentiates = any(ctx.needs_input_grad)
        inputs, parameters = tensors[: chain.inputs], tensors[chain.inputs :]
        values: list[Tensor | None] = [channels_last(x.detach()) for x in inputs]
        results: list[Tensor | None] = []
        batch_statistics: list[Tensor | None] = []
        links = _Tensors(chain, epsilons, parameters, values, results, batch_statistics)
        for number, (link, (running_mean, running_variance, momentum, _)) in enumerate(
            zip(chain.links, statistics, strict=True)
        ):
            source, (kernel, *_) = links.source(link), links.of_link(number)
            shape = link.result(source.shape, kernel)
            unwritten = chain.unwritten[number]
            y, pre, post = (
                torch.empty(shape, dtype=torch.bfloat16, memory_format=torch.channels_last) if kept else None
                for kept in (link.normalises, link.keeps_pre, link.keeps_post and not unwritten)
            )
            of_batch = torch.empty((2, shape[1]), dtype=torch.float32) if link.normalises else None
            residual = None if link.residual is None else values[link.residual]
            given = links.named(
                number,
                **{"residual": residual, "pre": pre, "post": post, "y": y, "statistics": of_batch},
                **{"running_mean": running_mean, "running_variance": running_variance, "momentum": momentum},
            )
            if link.normalises:
                ctx.kernels.convolution_batch_norm_forward(given, threads)
            else:
                ctx.kernels.frozen_convolution_forward(given, threads)
            ConvolutionChain.flops += link.flops(source.shape, kernel)
            values += [pre, post]
            results.append(y)
            batch_statistics.append(of_batch)
            if not differentiates:  # the next links reuse memory that is no longer needed
                results[-1] = y if unwritten else None
                for value, reader in chain.last_reader.items():
                    if value is not None and reader == number and value not in chain.outputs:
                        values[value] = None
                        if value in chain.makers:
                            results[chain.makers[value]] = None
        if differentiates:
            ctx.chain, ctx.epsilons = chain, epsilons
            ctx.set_materialize_grads(False)
            saved = (x if value in chain.saved else None for value, x in enumerate(values))
            ctx.save_for_backward(*parameters, *results, *batch_statistics, *saved)
        return tuple(values[number] for number in chain.outputs)  # type: ignore[misc]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *output_gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        threads = torch.get_num_threads()
        chain: ConvolutionChain = ctx.chain
        inputs, count = chain.inputs, len(chain.links)
        saved = ctx.saved_tensors
        parameters, results, batch_statistics = (
            saved[start * count : end * count] for start, end in ((0, 3), (3, 4), (4, 5))
        )
        values = saved[5 * count :]
        links = _Tensors(chain, ctx.epsilons, parameters, values, results, batch_statistics)
        needs = ctx.needs_input_grad[3:]
        gradients: list[list[Tensor]] = [[] for _ in values]
        for value, gradient in zip(chain.outputs, output_gradients, strict=True):
            if gradient is not None:
                gradients[value].append(channels_last(gradient))
        of_parameters: list[Tensor | None] = [None] * (3 * count)
        of_norms: dict[int, tuple[Tensor, ...]] = {}  # of links whose gradients the links that read them have summed
        for number in reversed(range(count)):
            link = chain.links[number]
            pre, post = inputs + 2 * number, inputs + 2 * number + 1
            of_pre, of_post = _met(gradients[pre], 1), _met(gradients[post], 2)
            gradients[pre], gradients[post] = [], []  # the next links reuse their memory
            if not of_pre and not of_post:
                continue
            # a single gradient that no residual receives is multiplied by the activation's slope where it is read
            simple = not of_post or (link.residual is None and len(of_pre) + len(of_post) == 1)
            total = None if simple else torch.empty_like((of_pre + of_post)[0])
            source, (kernel, *_) = links.source(link), links.of_link(number)
            x_gradient = torch.empty_like(source) if link.source >= inputs or needs[link.source] else None
            incoming = {**_numbered(of_pre, "pre"), **_numbered(of_post, "post", "second_post"), "total_pre": total}
            given = links.named(number, y=results[number], post=values[post], statistics=batch_statistics[number])
            if link.normalises:
                needed = needs[inputs + 3 * number :][:3]
                kernel_gradient = torch.empty_like(kernel) if needed[0] else None
                of_norm = of_norms.get(number) or _of_norm(kernel.shape[0])
                maker = chain.makers.get(link.source)
                of_source: tuple[Tensor | None, ...] = (None, None)
                if maker is not None:
                    of_source = of_norms[maker] = _of_norm(source.shape[1])
                wanted = _named(
                    "LinkGradients",
                    **{**incoming, "x": x_gradient, "kernel": kernel_gradient, "summed": number in of_norms},
                    **dict(zip(("weight", "bias", "source_weight", "source_bias"), of_norm + of_source, strict=True)),
                )
                ctx.kernels.convolution_batch_norm_backward(given, wanted, threads)
                computed = (kernel_gradient is not None) + (x_gradient is not None)
                ConvolutionChain.flops += computed * link.flops(source.shape, kernel)
                of_link = zip((kernel_gradient, *of_norm), needed, strict=True)
                of_parameters[3 * number : 3 * number + 3] = [g if need else None for g, need in of_link]
            elif x_gradient is not None or total is not None:
                x_gradient = torch.empty_like(source) if x_gradient is None else x_gradient
                wanted = _named("LinkGradients", **incoming, x=x_gradient)
                ctx.kernels.frozen_convolution_backward(given, wanted, threads)
                ConvolutionChain.flops += link.flops(source.shape, kernel)
            if x_gradient is not None:
                gradients[link.source].append(x_gradient)
            if link.residual is not None:
                gradients[link.residual].append(of_pre[0] if total is None else total)
        of_inputs = (_met(of_input, 1) for of_input in gradients[:inputs])
        return (None, None, None, *(g[0] if g else None for g in of_inputs), *of_parameters)


def _named(structure: str, **values: Any) -> Any:
    """A struct of the kernels with these members; tensors are passed as addresses, and None is left out."""
    named = getattr(_extension(), structure)()
    for name, value in values.items():
        if value is not None:
            setattr(named, name, address(value))
    return named


def _numbered(tensors: Sequence[Tensor], *names: str) -> dict[str, Tensor]:
    """The tensors under the first names."""
    return dict(zip(names, tensors, strict=False))


def _of_norm(channels: int) -> tuple[Tensor, Tensor]:
    """Memory for the gradients of a BatchNorm's weight and bias."""
    return torch.empty(channels, dtype=torch.float32), torch.empty(channels, dtype=torch.float32)


def _met(gradients: list[Tensor], most: int) -> list[Tensor]:
    """The gradients, the first of them added until at most ``most`` are left."""
    while len(gradients) > most:
        gradients = [gradients[0] + gradients[1], *gradients[2:]]
    return gradients
