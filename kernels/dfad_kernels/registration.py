"""Makes a PyTorch operator of an equation: schema, fake, autograd and kernels per device, in one place for all losses.

PyTorch's dispatcher is the only dispatcher: the device of the tensors decides which kernels run.
"""

import functools
import importlib
import inspect
import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Generic, NamedTuple, ParamSpec

import torch
from torch import Tensor, library
from torch.utils.dlpack import to_dlpack

P = ParamSpec("P")
NAMESPACE = "dfad_kernels"
KERNELS = {"cpu": "cpp", "cuda": "triton"}
"""Kernels by type of device."""


class Kernels(NamedTuple):
    """The forward and backward kernels of an operator. Both fill the tensors that are their first arguments.

    ``saved`` passes results of the forward to the backward kernels; :class:`FusedLoss` knows its shape.
    """

    forward: Callable[..., None]
    """``(loss, *arguments, scale, saved=)``; a loss without dimensions is the scaled sum, else the scaled terms."""

    backward: Callable[..., None]
    """``(*gradients, loss_gradient, *arguments, scale, saved=)``; a gradient that is not needed is None."""


def _nothing(kernels: str, student: Tensor) -> tuple[int, ...]:
    return (0,)


class FusedLoss(Generic[P]):
    """A loss between a student's and a teacher's tensor as one operator with its own kernels.

    Its first parameters are the student's and the teacher's tensor, its last one is the reduction. It is called like
    its equation; :attr:`reference` is that equation, computed in float32 at least.

    Args:
        equation: the loss in PyTorch, over arguments as ``prepare`` returns them; its signature becomes the schema, so
            it has no defaults: the dispatcher leaves out arguments that equal them.
        prepare: checks what a caller gives, and returns the operator's arguments.
        differentiable: number of leading tensors that get a gradient.
        view: a dense tensor as the kernels see it.
        saved: shape of the tensor that the kernels of a name keep between forward and backward pass.
    """

    def __init__(
        self,
        equation: Callable[..., Tensor],
        prepare: Callable[P, tuple[Any, ...]],
        differentiable: int,
        view: Callable[[Tensor], Tensor],
        saved: Callable[[str, Tensor], tuple[int, ...]],
    ) -> None:
        functools.update_wrapper(self, equation)
        self.__signature__ = inspect.signature(prepare).replace(return_annotation=Tensor)
        self.__name__: str = equation.__name__
        self._equation = equation
        self.prepare = prepare
        self.differentiable = differentiable
        self._view = view
        self._saved = saved
        self._register()

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Tensor:
        loss: Tensor = self._forward_operator(*self.prepare(*args, **kwargs))[0]
        return loss

    def __reduce__(self) -> str:
        return self.__name__  # pickled like the function that it replaces: by module and name

    def reference(self, *args: P.args, **kwargs: P.kwargs) -> Tensor:
        """The loss by its equation, as PyTorch operations."""
        arguments = self.prepare(*args, **kwargs)
        dtype = compute_dtype(arguments[0])
        return self._equation(*(x.to(dtype) if _is_floating(x) else x for x in arguments))

    def _register(self) -> None:
        name = f"{NAMESPACE}::{self.__name__}"
        schema = library.infer_schema(self._equation, mutates_args=())
        parameters = schema.removeprefix("(").removesuffix(") -> Tensor")
        tags = (torch.Tag.pt2_compliant_tag,)
        library.define(name, f"({parameters}) -> (Tensor loss, Tensor saved)", tags=tags)
        library.define(
            f"{name}_backward",
            f"(Tensor loss_gradient, Tensor saved, bool[] needed, {parameters}) -> Tensor[]",
            tags=tags,
        )
        for device, kernels in KERNELS.items():
            library.impl(name, device, functools.partial(self.run_forward, kernels))
            library.impl(f"{name}_backward", device, functools.partial(self.run_backward, kernels))
        library.register_fake(name, self._fake_loss)
        library.register_fake(f"{name}_backward", self._allocate_gradients)
        library.register_autograd(name, self._differentiate, setup_context=_save)
        library.register_autograd(f"{name}_backward", self._refuse_second_derivative, setup_context=_ignore)
        library.register_vmap(name, self._refuse_vmap)
        self._forward_operator = getattr(torch.ops.dfad_kernels, self.__name__).default
        self._backward_operator = getattr(torch.ops.dfad_kernels, f"{self.__name__}_backward").default

    def run_forward(self, kernels: str, *arguments: Any) -> tuple[Tensor, Tensor]:
        """The operator on the kernels of that name."""
        loss, saved = self._allocate_loss(kernels, *arguments)
        student, *_, reduction = arguments
        scale = _scale(reduction, student)
        if student.numel() == 0:
            return loss.fill_(0 * scale), saved
        memory_format = agreed_format(arguments[0], arguments[1])
        with current_device(student.device):
            forward = load_kernels(kernels, self.__name__).forward
            out = self._view(loss) if loss.ndim else loss
            forward(out, *self._views(arguments, memory_format), scale, saved=saved)
        return loss, saved

    def run_backward(
        self, kernels: str, loss_gradient: Tensor, saved: Tensor, needed: list[bool], *arguments: Any
    ) -> list[Tensor]:
        """The operator's gradients on the kernels of that name."""
        gradients = self._allocate_gradients(loss_gradient, saved, needed, *arguments)
        student, *_, reduction = arguments
        if student.numel() == 0:
            return gradients
        memory_format = agreed_format(arguments[0], arguments[1])
        # kernels write in the common layout; a gradient in another layout is copied from that
        written = [
            g if g.is_contiguous(memory_format=memory_format) else torch.empty_like(g, memory_format=memory_format)
            for g in gradients
        ]
        slots = iter(written)
        outputs = [self._view(next(slots)) if need else None for need in needed]
        if loss_gradient.ndim:
            loss_gradient = self._view(loss_gradient.detach().contiguous(memory_format=memory_format))
        with current_device(student.device):
            backward = load_kernels(kernels, self.__name__).backward
            scale = _scale(reduction, student)
            backward(*outputs, loss_gradient.detach(), *self._views(arguments, memory_format), scale, saved=saved)
        for gradient, source in zip(gradients, written, strict=True):
            if gradient is not source:
                gradient.copy_(source)
        return gradients

    def _views(self, arguments: tuple[Any, ...], memory_format: torch.memory_format) -> list[Any]:
        """The arguments of the kernels: the pair in one layout, without the reduction."""
        student, teacher, *rest, _ = (x.detach() if isinstance(x, Tensor) else x for x in arguments)
        pair = (self._view(x.contiguous(memory_format=memory_format)) for x in (student, teacher))
        return [*pair, *rest]

    def _fake_loss(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        return self._allocate_loss(KERNELS[arguments[0].device.type], *arguments)

    def _allocate_loss(self, kernels: str, *arguments: Any) -> tuple[Tensor, Tensor]:
        student, teacher, *_, reduction = arguments
        dtype = compute_dtype(student)
        saved = student.new_empty(self._saved(kernels, student), dtype=dtype)
        if reduction == "none":
            return _new(student, dtype, agreed_format(student, teacher)), saved
        return student.new_empty((), dtype=dtype), saved

    def _allocate_gradients(
        self, loss_gradient: Tensor, saved: Tensor, needed: list[bool], *arguments: Any
    ) -> list[Tensor]:
        return [
            _new(x, x.dtype, _format(x) or torch.contiguous_format)
            for x, need in zip(arguments, needed, strict=False)
            if need
        ]

    def _differentiate(self, ctx: Any, loss_gradient: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if loss_gradient is None:
            return (None,) * len(ctx.arguments)
        saved, *rest = ctx.saved_tensors
        tensors = iter(rest)
        arguments = [next(tensors) if is_tensor else x for is_tensor, x in ctx.arguments]
        needed = list(ctx.needs_input_grad[: self.differentiable])
        gradients = iter(self._backward_operator(loss_gradient, saved, needed, *arguments))
        without = [None] * (len(arguments) - self.differentiable)
        return (*(next(gradients) if need else None for need in needed), *without)

    def _refuse_vmap(self, *_: Any) -> None:
        raise RuntimeError(
            f"{self.__name__} cannot be mapped by torch.vmap: it is a loss over a whole batch already. "
            f"Map {self.__name__}.reference instead."
        )

    def _refuse_second_derivative(self, ctx: Any, *_: Any) -> None:
        raise RuntimeError(
            f"{self.__name__} has no second derivative. Use {self.__name__}.reference, which PyTorch "
            "differentiates any number of times."
        )


def fused_loss(
    prepare: Callable[P, tuple[Any, ...]],
    differentiable: int,
    view: Callable[[Tensor], Tensor],
    saved: Callable[[str, Tensor], tuple[int, ...]] = _nothing,
) -> Callable[[Callable[..., Tensor]], FusedLoss[P]]:
    """A decorator that makes an equation a :class:`FusedLoss`."""
    return lambda equation: FusedLoss(equation, prepare, differentiable, view, saved)


def kernel_name(device: torch.device | str) -> str:
    """Which kernels the operators run on a device: ``cpp`` or ``triton``.

    Raises:
        RuntimeError: if those kernels are missing there, or there are none for such a device.
    """
    kind = torch.device(device).type
    if kind not in KERNELS:
        raise RuntimeError(
            f"There are no fused kernels for the device {kind!r}, only for {' and '.join(KERNELS)}; "
            "use the reference there (fused=False, --no-fused)."
        )
    load_kernels(KERNELS[kind], "activation_boundary_loss")
    return KERNELS[kind]


def instruction_sets() -> list[str]:
    """Instruction sets that the C++ kernels were compiled for and this processor supports; the last one is used. Empty
    without C++ kernels, which a GPU does not need."""
    try:
        return list(_extension().isa)
    except RuntimeError:
        return []


@functools.cache
def load_kernels(kernels: str, operator: str) -> Kernels:
    """The kernels of an operator: ``triton``, ``cpp``, or ``cpp.`` and one of :func:`instruction_sets`.

    Raises:
        RuntimeError: if they cannot be loaded.
    """
    if kernels == "triton":
        return _triton_kernels(operator)
    forward, backward = cpp_functions(kernels, operator)
    threads = torch.get_num_threads
    return Kernels(
        lambda *arguments, saved: forward(*map(_passed, (*arguments, saved)), threads()),
        lambda *arguments, saved: backward(*map(_passed, (*arguments, saved)), threads()),
    )


def cpp_functions(kernels: str, operator: str) -> tuple[Callable[..., None], Callable[..., None]]:
    """The C++ functions that :func:`load_kernels` calls, forward and backward."""
    _, _, instruction_set = kernels.partition(".")
    module = getattr(_extension(), instruction_set or instruction_sets()[-1])
    return getattr(module, f"{operator}_forward"), getattr(module, f"{operator}_backward")


def _passed(argument: Any) -> Any:
    """A tensor's properties, read in a tenth of the time that the extension would need."""
    return to_dlpack(argument) if isinstance(argument, Tensor) else argument


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """Dtype in which a loss is computed and returned: float64 for float64, otherwise float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def agreed_format(student: Tensor, teacher: Tensor) -> torch.memory_format:
    """Both tensors in one layout: the student's if it is dense, else the teacher's, else contiguous."""
    return _format(student) or _format(teacher) or torch.contiguous_format


def storage_order(tensor: Tensor) -> Tensor:
    """A dense tensor as one dimension, without a copy."""
    return tensor.view(-1) if tensor.is_contiguous() else tensor.movedim(1, -1).view(-1)


def rows_classes_sites(tensor: Tensor) -> Tensor:
    """A dense ``(N, C)`` or ``(N, C, *)`` as three dimensions, without a copy."""
    return tensor.flatten(2) if tensor.ndim > 2 else tensor.unsqueeze(-1)


def reduce(terms: Tensor, reduction: str) -> Tensor:
    """The terms of a loss, reduced as in PyTorch."""
    match reduction:
        case "mean":
            return terms.mean()
        case "sum":
            return terms.sum()
        case "batchmean":
            return terms.sum() / terms.shape[0]
    return terms


def _scale(reduction: str, student: Tensor) -> float:
    divisor = {"mean": student.numel(), "batchmean": student.shape[0]}.get(reduction, 1)
    return 1 / divisor if divisor else math.inf  # PyTorch's mean of an empty tensor is NaN: 0 · ∞


def _format(tensor: Tensor) -> torch.memory_format | None:
    if tensor.is_contiguous():
        return torch.contiguous_format
    channels_last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(tensor.ndim)
    if channels_last is not None and tensor.is_contiguous(memory_format=channels_last):
        return channels_last
    return None


def _new(like: Tensor, dtype: torch.dtype, memory_format: torch.memory_format) -> Tensor:
    return torch.empty(like.shape, dtype=dtype, device=like.device, memory_format=memory_format)


def _is_floating(x: object) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def current_device(device: torch.device) -> Any:
    """Make the tensors' device current, because Triton launches on the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, saved = output
    ctx.mark_non_differentiable(saved)
    ctx.set_materialize_grads(False)
    ctx.arguments = [(isinstance(x, Tensor), None if isinstance(x, Tensor) else x) for x in inputs]
    ctx.save_for_backward(saved, *(x for x in inputs if isinstance(x, Tensor)))


def _ignore(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    pass


def _extension() -> Any:
    try:
        return importlib.import_module("dfad_kernels._cpu")
    except ImportError as error:
        raise RuntimeError(
            f"The C++ kernels cannot be loaded: {error}. Install the project where there is a C++ compiler "
            "(`pip install -e .`), or use the reference (fused=False, --no-fused)."
        ) from error


def _triton_kernels(operator: str) -> Kernels:
    try:
        module = importlib.import_module(f"dfad_kernels.gpu.{operator}")
    except ImportError as error:
        raise RuntimeError(
            f"The Triton kernels cannot be loaded: {error}. Install triton 3.6 or newer (`pip install triton`), "
            "or use the reference (fused=False, --no-fused)."
        ) from error
    return Kernels(module.forward, module.backward)
