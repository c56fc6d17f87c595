"""Chains of 3×3 convolutions, each with the BatchNorm, the addition and the activation behind it.

On CPUs that multiply bfloat16 by tiles (Intel AMX). A chain is one node of autograd's graph: between its links nothing
is dispatched, and where gradients meet in it they are added as they are read.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dfad_kernels.batch_norm import address, channels_last
from dfad_kernels.registration import cpp_functions, instruction_sets

TILES = "x86_64_amx"
"""The instruction set that has tiles in hardware; others compute the same, slowly."""


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
    """Whether pre is a value that anybody uses."""

    keeps_post: bool = True
    """Likewise post."""

    normalises: bool = True
    """Whether there is a BatchNorm; without one pre is y + β + r, and nothing of it learns."""


class Layer(NamedTuple):
    """The tensors and numbers of a link's convolution and BatchNorm, all float32."""

    kernel: Tensor
    """``(out, in, 3, 3)``, channels last in memory."""

    weight: Tensor | None = None
    """γ, ``(out,)``; 1 if None."""

    bias: Tensor | None = None
    """β, likewise; 0 if None."""

    running_mean: Tensor | None = None
    """``(out,)``, moved towards the batch's; stays where it is if None."""

    running_variance: Tensor | None = None
    momentum: float = 0.1
    epsilon: float = 1e-5


class Misfit(ValueError):
    """What a chain was given is nothing that it can compute; nothing was."""


def has_tiles() -> bool:
    """Whether this processor multiplies by tiles."""
    return TILES in instruction_sets()


def admits(kernel: Tensor) -> bool:
    """Whether a convolution's kernel has a shape and layout that a link can have."""
    out_channels, in_channels, *size = kernel.shape
    return (
        size == [3, 3]
        and (in_channels <= 16 or in_channels % 32 == 0)
        and (out_channels == 16 or out_channels % 32 == 0)
        and kernel.dtype == torch.float32
        and kernel.is_contiguous(memory_format=torch.channels_last)
    )


def convolution_chain(
    links: Sequence[Link],
    layers: Sequence[Layer],
    inputs: Sequence[Tensor],
    outputs: Sequence[int],
    *,
    kernels: str = "cpp",
) -> tuple[Tensor, ...]:
    """Values of a chain in training mode.

    Args:
        links: each one's source and residual are inputs or values of links before it.
        layers: one for each link.
        inputs: bfloat16 features ``(B, channels, height, width)`` on a CPU; channels last in memory, or they are copied
            so.
        outputs: numbers of the values to return.
        kernels: which to run, as :func:`dfad_kernels.registration.load_kernels` names them.

    Returns:
        bfloat16 features, channels last in memory.

    Raises:
        Misfit: if shapes, layouts or dtypes are not what they must be.
    """
    _check(links, layers, inputs)
    parameters = [tensor for layer in layers for tensor in layer[:3]]
    results: tuple[Tensor, ...] = _Chain.apply(
        tuple(links), tuple(layer[3:] for layer in layers), tuple(outputs), kernels, *inputs, *parameters
    )
    return results


def _check(links: Sequence[Link], layers: Sequence[Layer], inputs: Sequence[Tensor]) -> None:
    for x in inputs:
        if x.dtype != torch.bfloat16 or x.device.type != "cpu" or x.ndim != 4 or x.numel() == 0:
            raise Misfit(
                f"An input is {tuple(x.shape)}, {x.dtype}, on {x.device}; it must be (B, channels, height, width) in "
                "torch.bfloat16 on a CPU, and hold something."
            )
    shapes: list[tuple[int, ...] | None] = [tuple(x.shape) for x in inputs]
    for number, (link, layer) in enumerate(zip(links, layers, strict=True)):
        if not admits(layer.kernel):
            raise Misfit(
                f"The kernel of link {number} is {tuple(layer.kernel.shape)}, {layer.kernel.dtype}; it must be "
                "(out, in, 3, 3) in torch.float32, channels last in memory, in at most 16 or divisible by 32, out 16 "
                "or divisible by 32."
            )
        operands = [shapes[i] if i is not None and i < len(shapes) else None for i in (link.source, link.residual)]
        source, residual = operands
        if source is None or source[1] != layer.kernel.shape[1]:
            raise Misfit(
                f"Link {number} convolves {source or 'a value that is none'} with a kernel for "
                f"{layer.kernel.shape[1]} channels."
            )
        batch, _, height, width = source
        shape = batch, layer.kernel.shape[0], _strided(height, link.stride), _strided(width, link.stride)
        if link.residual is not None and residual != shape:
            raise Misfit(f"Link {number} adds {residual or 'a value that is none'} to {shape}; they must be alike.")
        if link.normalises and batch * shape[2] * shape[3] < 2:
            raise Misfit(f"Link {number} has a single value per channel, which has no variance.")
        if not link.normalises and (
            layer.kernel.requires_grad or (layer.bias is not None and layer.bias.requires_grad)
        ):
            raise Misfit(
                f"Link {number} has no BatchNorm, but parameters that take gradients; give `parameter.detach()`."
            )
        for tensor in layer[1:5]:
            if isinstance(tensor, Tensor) and (
                tensor.shape != shape[1:2] or tensor.dtype != torch.float32 or not tensor.is_contiguous()
            ):
                raise Misfit(
                    f"A parameter or statistic of link {number} is {tuple(tensor.shape)}, {tensor.dtype}; it must be "
                    f"({shape[1]},) in torch.float32, contiguous."
                )
        shapes += [shape if link.keeps_pre else None, shape if link.keeps_post else None]


def _strided(size: int, stride: int) -> int:
    return -(-size // stride)


class _Chain(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        links: tuple[Link, ...],
        statistics: tuple[tuple[Any, ...], ...],
        outputs: tuple[int, ...],
        kernels: str,
        *tensors: Any,
    ) -> tuple[Tensor, ...]:
        normalising, ctx.normalising_back = cpp_functions(kernels, "convolution_batch_norm")
        frozen, ctx.frozen_back = cpp_functions(kernels, "frozen_convolution")
        threads = torch.get_num_threads()
        count = len(tensors) - 3 * len(links)
        values: list[Tensor | None] = [channels_last(x.detach()) for x in tensors[:count]]
        needed_until = {i: number for number, link in enumerate(links) for i in (link.source, link.residual)}
        differentiates = any(ctx.needs_input_grad)
        results: list[Tensor | None] = []
        batch_statistics, sizes = [], []
        for number, (link, (running_mean, running_variance, momentum, epsilon)) in enumerate(
            zip(links, statistics, strict=True)
        ):
            kernel, weight, bias = tensors[count + 3 * number : count + 3 * number + 3]
            x = values[link.source]
            assert x is not None
            batch, channels, height, width = x.shape
            out = kernel.shape[0]
            shape = batch, out, _strided(height, link.stride), _strided(width, link.stride)
            y, pre, post = (
                torch.empty(shape, dtype=torch.bfloat16, memory_format=torch.channels_last) if kept else None
                for kept in (link.normalises, link.keeps_pre, link.keeps_post)
            )
            of_batch = torch.empty((2, out)) if link.normalises else None
            residual = None if link.residual is None else values[link.residual]
            size = batch, height, width, channels, out, link.stride
            if link.normalises:
                normalising(
                    *map(address, (x, kernel, y, pre, post, of_batch)),
                    *map(address, (running_mean, running_variance, residual, weight, bias)),
                    *(*size, momentum, link.negative_slope, epsilon, threads),
                )
            else:
                frozen(*map(address, (x, kernel, pre, post, residual, bias)), *(*size, link.negative_slope, threads))
            values += [pre, post]
            results.append(y)
            batch_statistics.append(of_batch)
            sizes.append((*size, link.negative_slope, epsilon) if link.normalises else (*size, link.negative_slope))
            if not differentiates:  # the next ones can have the memory of what nobody needs any more
                results[-1] = None
                for i, last in needed_until.items():
                    if last == number and i is not None and i not in outputs:
                        values[i] = None
        if differentiates:
            ctx.links, ctx.outputs, ctx.sizes = links, outputs, sizes
            ctx.set_materialize_grads(False)
            sources = {link.source for link in links}
            kept = [x if i in sources or i >= count else None for i, x in enumerate(values)]
            ctx.save_for_backward(*tensors[count:], *results, *batch_statistics, *kept)
        return tuple(values[number] for number in outputs)  # type: ignore[misc]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *output_gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        threads = torch.get_num_threads()
        count = len(ctx.links)
        saved = ctx.saved_tensors
        parameters, results = saved[: 3 * count], saved[3 * count : 4 * count]
        batch_statistics, values = saved[4 * count : 5 * count], saved[5 * count :]
        inputs = len(values) - 2 * count
        needs = ctx.needs_input_grad[4:]
        gradients: list[list[Tensor]] = [[] for _ in values]
        for number, gradient in zip(ctx.outputs, output_gradients, strict=True):
            if gradient is not None:
                gradients[number].append(channels_last(gradient))
        of_parameters: list[Tensor | None] = [None] * (3 * count)
        for number in reversed(range(count)):
            link = ctx.links[number]
            kernel, weight, bias = parameters[3 * number : 3 * number + 3]
            needs_kernel, needs_weight, needs_bias = needs[inputs + 3 * number : inputs + 3 * number + 3]
            of_pre, of_post = (_met(gradients[inputs + 2 * number + i], most) for i, most in ((0, 1), (1, 2)))
            gradients[inputs + 2 * number : inputs + 2 * number + 2] = [], []  # whose memory the next ones can have
            if not of_pre and not of_post:
                continue
            # where nothing meets and nothing is passed on, what is behind the activation is computed as it is needed
            simple = not of_post or (link.residual is None and len(of_pre) + len(of_post) == 1)
            behind = None if simple else torch.empty_like((of_pre + of_post)[0])
            x, post = values[link.source], values[inputs + 2 * number + 1]
            x_gradient = torch.empty_like(x) if link.source >= inputs or needs[link.source] else None
            incoming = (*of_pre, *[None] * (1 - len(of_pre)), *of_post, *[None] * (2 - len(of_post)))
            if link.normalises:
                kernel_gradient = torch.empty_like(kernel) if needs_kernel else None
                parameter_gradient = torch.empty_like(batch_statistics[number])
                ctx.normalising_back(
                    *map(address, (x, kernel, results[number], post, batch_statistics[number], weight, bias)),
                    *map(address, (*incoming, behind, x_gradient, kernel_gradient, parameter_gradient)),
                    *(*ctx.sizes[number], threads),
                )
                of_parameters[3 * number] = kernel_gradient
                of_parameters[3 * number + 1] = parameter_gradient[0] if needs_weight else None
                of_parameters[3 * number + 2] = parameter_gradient[1] if needs_bias else None
            elif x_gradient is not None or behind is not None:
                x_gradient = torch.empty_like(x) if x_gradient is None else x_gradient
                ctx.frozen_back(
                    *map(address, (kernel, post, *incoming, behind, x_gradient)), *(*ctx.sizes[number], threads)
                )
            if x_gradient is not None:
                gradients[link.source].append(x_gradient)
            if link.residual is not None:
                gradients[link.residual].append(of_pre[0] if behind is None else behind)
        of_inputs = (_met(of_input, 1) for of_input in gradients[:inputs])
        return (None,) * 4 + tuple(g[0] if g else None for g in of_inputs) + tuple(of_parameters)


def _met(gradients: list[Tensor], most: int) -> list[Tensor]:
    """So many gradients at most, of the same sum."""
    while len(gradients) > most:
        gradients = [gradients[0] + gradients[1], *gradients[2:]]
    return gradients
