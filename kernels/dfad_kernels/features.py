"""Operators over channels-last features: the arguments of kernels, their choice, and checks of what callers pass.

Unlike losses they have any number of tensors and results. Each direction is an operator of PyTorch's dispatcher; an
``autograd.Function`` connects them, because an operator that writes running statistics cannot have a registered
derivative.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, library

from dfad_kernels.checks import DTYPES
from dfad_kernels.registration import (
    KERNELS,
    NAMESPACE,
    compute_dtype,
    cpp_functions,
    current_device,
    load_kernels,
)


class FeatureOperator:
    """One direction of an operator over features: it allocates its results, and kernels fill them.

    Kernels get the features, the operator's first argument, as a matrix ``(rows, channels)``, then the results and the
    other arguments except flags, which decide what is allocated. Of these tensors the C++ kernels take only addresses,
    null for a tensor without elements: reading a tensor's shape would take longer than normalising a small feature map.

    Args:
        allocate: returns the tensors to be filled for the operator's arguments; its signature becomes the schema.
        operator: name of the operator with the kernels.
        direction: ``forward`` or ``backward``.
        mutates: the arguments that kernels write.
    """

    def __init__(
        self, allocate: Callable[..., Any], operator: str, direction: str, mutates: Sequence[str] = ()
    ) -> None:
        self.allocate = allocate
        self.operator = operator
        self.direction = direction
        name = operator if direction == "forward" else f"{operator}_{direction}"
        schema = library.infer_schema(allocate, mutates_args=tuple(mutates))
        library.define(f"{NAMESPACE}::{name}", schema, tags=(torch.Tag.pt2_compliant_tag,))
        for device, kernels in KERNELS.items():
            library.impl(f"{NAMESPACE}::{name}", device, functools.partial(self.run, kernels))
        library.register_fake(f"{NAMESPACE}::{name}", allocate)
        self._dispatch = getattr(torch.ops.dfad_kernels, name).default

    def __call__(self, kernels: str | None, *arguments: Any) -> Any:
        """Run the kernels of the features' device, or those of the given name."""
        return self._dispatch(*arguments) if kernels is None else self.run(kernels, *arguments)

    def run(self, kernels: str, features: Tensor, *others: Any) -> Any:
        """The results of the kernels of that name, as :func:`dfad_kernels.registration.load_kernels` names them."""
        results = self.allocate(features, *others)
        filled = (results,) if isinstance(results, Tensor) else results
        others = tuple(other for other in others if not isinstance(other, bool))
        with current_device(features.device):
            _launcher(kernels, self.operator, self.direction)(rows_channels(features), *filled, *others)
        return results


def feature_operator(operator: str, direction: str, mutates: Sequence[str] = ()) -> Callable[..., FeatureOperator]:
    """A decorator that makes an allocation a :class:`FeatureOperator`."""
    return lambda allocate: FeatureOperator(allocate, operator, direction, mutates)


@functools.cache
def _launcher(kernels: str, operator: str, direction: str) -> Callable[..., None]:
    if kernels == "triton":
        return load_kernels(kernels, operator)._asdict()[direction]
    function = cpp_functions(kernels, operator)[direction == "backward"]
    threads = torch.get_num_threads
    return lambda features, *others: function(features, *map(address, others), threads())


def address(argument: Any) -> Any:
    """The address of a tensor's data; other values unchanged."""
    return argument.data_ptr() if isinstance(argument, Tensor) else argument


def channels_last(features: Tensor) -> Tensor:
    """Features that are dense and channels-last in memory; copied only if necessary."""
    if features.ndim == 4:
        return features.contiguous(memory_format=torch.channels_last)
    return features.movedim(1, -1).contiguous().movedim(-1, 1)


def rows_channels(features: Tensor) -> Tensor:
    """Such features as a matrix ``(rows, channels)``, without a copy."""
    return features.movedim(1, -1).reshape(-1, features.shape[1])


def check_features(features: Tensor) -> None:
    """Raises unless they are floating-point, ``(B, channels, ...)``."""
    if features.dtype not in DTYPES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise TypeError(f"The features are {features.dtype}; convert them to one of: {known}.")
    if features.ndim < 2:
        raise ValueError(f"The features' shape is {tuple(features.shape)}; it must be (B, channels) or longer.")


def check_residual(residual: Tensor | None, features: Tensor) -> None:
    """Raises unless the residual has the features' shape, dtype and device."""
    if residual is None or (
        residual.shape == features.shape and residual.dtype == features.dtype and residual.device == features.device
    ):
        return
    raise ValueError(
        f"The residual is {tuple(residual.shape)}, {residual.dtype}, on {residual.device}, the features are "
        f"{tuple(features.shape)}, {features.dtype}, on {features.device}; give both the same shape, dtype and device."
    )


def check_channels(features: Tensor, **values: Tensor | None) -> None:
    """Raises unless each has one number per channel, in the dtype that the features are computed in."""
    for name, value in values.items():
        if value is None:
            continue
        if value.shape != features.shape[1:2] or value.device != features.device:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)} on {value.device}; it must be ({features.shape[1]},), a number "
                f"for each channel, on {features.device}."
            )
        if value.dtype != compute_dtype(features):
            raise TypeError(f"{name} is {value.dtype}; {features.dtype} features need it in {compute_dtype(features)}.")
        if not value.is_contiguous():
            raise ValueError(f"{name} has stride {value.stride()}; give it as `{name}.contiguous()`.")


def check_normalisation(epsilon: float, negative_slope: float) -> None:
    """Raises unless epsilon is positive and the slope is not negative."""
    if not epsilon > 0:
        raise ValueError(f"epsilon is {epsilon}; it must be positive.")
    if not negative_slope >= 0:
        raise ValueError(f"negative_slope is {negative_slope}; it must not be negative.")
