"""Compiles the Triton kernels for GPUs that need not exist here, with the launchers' arguments.

``python tests/kernels/offline.py sm_90`` prints the compiler's report on each kernel as JSON. A separate program,
as a process that interprets Triton cannot compile it.
"""

import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from dfad_kernels import (
    activation_boundary_loss,
    batch_norm,
    batchnorm_distance,
    frozen_batch_norm,
    interpolated_kl_div,
    normalized_squared_error,
)
from dfad_kernels.gpu import activation_boundary_loss as activation_boundary_module
from dfad_kernels.gpu import batch_norm as batch_norm_module
from dfad_kernels.gpu import batchnorm_distance as batchnorm_distance_module
from dfad_kernels.gpu import channels as channels_module
from dfad_kernels.gpu import frozen_batch_norm as frozen_batch_norm_module
from dfad_kernels.gpu import interpolated_kl_div as interpolated_kl_div_module
from dfad_kernels.gpu import normalized_squared_error as normalized_squared_error_module
from dfad_kernels.interpolated_kl_div import RESIDENT_CLASSES

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float64: "fp64",
    torch.int64: "i64",
}


@dataclass(frozen=True)
class Compiled:
    """The compiler's report on one kernel."""

    kernel: str
    dtype: str
    registers: int
    spills: int
    local_bytes: int
    wide_loads: int
    """Loads of 128 bits from global memory, copies to shared memory among them."""
    copies: int
    """Those copies: they are on their way while a program computes. AMD's kernels load into registers ahead instead."""
    expected_loads: int
    """Number of loads that a thread needs to read its share of the tensors once (twice in a chunked forward pass)."""
    wide_stores: int
    expected_stores: int
    int32_offsets: int
    """Pointers to tensors that a 32-bit offset is added to."""


@dataclass(frozen=True)
class Launch:
    """A kernel, and the arguments that it is launched with."""

    function: JITFunction[Any]
    arguments: dict[str, Any]
    options: dict[str, Any]


@contextmanager
def recorded(*modules: Any) -> Iterator[list[Launch]]:
    """Record launches of the modules' kernels instead of running them."""
    launches: list[Launch] = []

    class Recorder:
        def __init__(self, function: JITFunction[Any]) -> None:
            self.function = function

        def __getitem__(self, grid: Any) -> Any:
            def launch(*args: Any, **settings: Any) -> None:
                options = {"num_warps": settings.pop("num_warps", 4)}
                names = self.function.arg_names
                launches.append(Launch(self.function, dict(zip(names, args, strict=False)) | settings, options))

            return launch

    kernels = [
        (module, name, value)
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, JITFunction) and name.endswith("_kernel")
    ]
    try:
        for module, name, function in kernels:
            setattr(module, name, Recorder(function))
        yield launches
    finally:
        for module, name, function in kernels:
            setattr(module, name, function)


def launches_of(op: Any, module: Any, pair: tuple[Tensor, Tensor], needed: list[bool], **settings: Any) -> list[Launch]:
    """Launches of a forward and a backward pass over tensors without memory."""
    arguments = op.prepare(*pair, **settings)
    with recorded(module) as launches:
        loss, saved = op.run_forward("triton", *arguments)
        op.run_backward("triton", torch.empty_like(loss), saved, needed, *arguments)
    return launches


def feature_launches(dtype: torch.dtype) -> list[Launch]:
    """Launches of operators over features: few and many channels, with and without all optional arguments."""
    launches: list[Launch] = []
    for channels, adds in ((64, True), (512, False)):
        x, residual, gradient = (
            torch.empty(256, channels, 32, 32, dtype=dtype, device="meta").to(memory_format=torch.channels_last)
            for _ in range(3)
        )
        numbers = [torch.empty(channels, device="meta") for _ in range(4)]
        options = {"residual": residual} if adds else {}
        modules = batch_norm_module, batchnorm_distance_module, channels_module, frozen_batch_norm_module
        with recorded(*modules) as found:
            x.requires_grad_()
            residual.requires_grad_()
            batch_norm(x, *numbers, **options, negative_slope=0.0, kernels="triton").backward(gradient)
            of_norm = numbers if adds else [None] * 3 + numbers[3:]
            frozen_batch_norm(x, *of_norm, **options, negative_slope=0.0, kernels="triton").backward(gradient)
            if adds:
                batchnorm_distance(x, *numbers[:2], kernels="triton").backward()
        launches += found
    return launches


def all_launches(dtype: torch.dtype) -> list[Launch]:
    """Every kernel on the aligned path, where sizes are divisible by 16; each that would be compiled once."""
    found = {}
    for launch in loss_launches(dtype) + feature_launches(dtype):
        source = source_of(launch)
        found.setdefault((source.hash(), *launch.options.values()), launch)
    return list(found.values())


def loss_launches(dtype: torch.dtype) -> list[Launch]:
    """Launches of the losses."""
    taps = torch.empty(256, 64, 32, 32, dtype=dtype, device="meta")
    launches = launches_of(activation_boundary_loss, activation_boundary_module, (taps, taps), [True])
    for reduction in ("sum", "none"):
        passes = launches_of(
            normalized_squared_error, normalized_squared_error_module, (taps, taps), [True], reduction=reduction
        )
        launches += passes if reduction == "sum" else passes[2:3]
    for shape in ((256, RESIDENT_CLASSES), (16, 21, 256, 256), (64, 32000)):
        logits = torch.empty(shape, dtype=dtype, device="meta")
        weights = torch.empty(shape[0], device="meta")
        partner = torch.empty(shape[0], dtype=torch.int64, device="meta")
        for options in ({"partner": None}, {"partner": partner})[: 2 if dtype == torch.float32 else 1]:
            for needed in ([True, True], [True, False]):
                passes = launches_of(
                    interpolated_kl_div,
                    interpolated_kl_div_module,
                    (logits, logits),
                    needed,
                    mixing_coefficient=weights,
                    **options,
                )
                launches += passes if all(needed) else passes[1:]
    return launches


def source_of(launch: Launch) -> ASTSource:
    """Types, constants and alignments as the launcher would find them."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for place, parameter in enumerate(launch.function.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
        elif isinstance(value, Tensor):
            signature[parameter.name] = f"*{TYPES[value.dtype]}"
            attributes[(place,)] = [["tt.divisibility", 16]]
        elif isinstance(value, int):
            signature[parameter.name] = "i32"
            if value % 16 == 0:
                attributes[(place,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = parameter.annotation_type
    return ASTSource(launch.function, signature, constants, attributes)


def nvidia_usage(cubin: bytes) -> dict[str, int]:
    """Registers and bytes of stack and local memory, from the disassembler that comes with Triton."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    command = str(tool) if tool.exists() else shutil.which("cuobjdump") or "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        report = subprocess.run([command, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}


def tensors_read(launch: Launch) -> int:
    """Number of times that a kernel must load a tensor of the inputs' size."""
    name, settings = launch.function.__name__, launch.arguments
    if "CHANNELS" in settings:
        return len(features_of(launch, "x_ptr", "y_ptr", "g_ptr", "r_ptr"))
    if "REVERSED" not in settings:
        return 2
    if "forward" in name:
        return 6 if "chunked" in name else 3
    if not settings["TEACHER"]:
        return 3
    return 4 if settings["REVERSED"] else 5


def features_of(launch: Launch, *names: str) -> list[str]:
    """The arguments that are given."""
    return [name for name in names if launch.arguments.get(name) is not None]


def tensors_written(launch: Launch) -> int:
    """Stores of the inputs' size; for a loss, in its backward pass."""
    if "CHANNELS" in launch.arguments:
        return len(features_of(launch, "out_ptr", "dx_ptr", "dr_ptr"))
    if "backward" not in launch.function.__name__:
        return 0
    return launch.arguments.get("STUDENT", 1) + launch.arguments.get("TEACHER", 0)


def wide_accesses(launch: Launch, dtype: torch.dtype, target: str) -> int:
    """128-bit loads or stores that a thread needs for its share of a tile."""
    settings = launch.arguments
    tile = settings.get("BLOCK") or settings.get("ROWS", 1) * (settings.get("CLASSES") or settings["CHANNELS"])
    threads = launch.options["num_warps"] * TARGETS[target].warp_size
    return max(1, tile * dtype.itemsize // 16 // threads)


def compile_for(target: str, launch: Launch, dtype: torch.dtype) -> Compiled:
    """One kernel for one GPU."""
    compiled = triton.compile(source_of(launch), target=TARGETS[target], options=launch.options)
    settings = launch.arguments
    variant = "" if "REVERSED" not in settings else " reversed" if settings["REVERSED"] else " permuted"
    if not settings.get("TEACHER", True):
        variant += ", student alone"
    if settings.get("running_mean_ptr") is not None:
        variant += ", running statistics"
    if "mean_ptr" in settings and settings["mean_ptr"] is None:
        variant += ", bias alone"
    size = settings.get("classes") or settings.get("channels")
    layout = f", C = {size}" if size else ""
    name = launch.function.__name__.strip("_").removesuffix("_kernel").replace("_", " ") + variant + layout
    if target.startswith("sm"):
        usage = nvidia_usage(compiled.asm["cubin"])
        text = compiled.asm["ptx"]
        spills = len(re.findall(r"\b(?:ld|st)\.local", text)) + usage["STACK"]
        registers, local = usage["REG"], usage["LOCAL"]
        copied = len(re.findall(r"\bcp\.async\.cg\.shared\.global .*, 0x10", text))
        loads = [words * bits for words, bits in _nvidia_widths(text, "ld")] + [128] * copied
        stores = [words * bits for words, bits in _nvidia_widths(text, "st")]
    else:
        text = compiled.asm["amdgcn"]
        registers, spills, local = (
            int(re.search(rf"\.{key}:\s+(\d+)", text)[1])  # type: ignore[index]
            for key in ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size")
        )
        loads, stores, copied = _amd_widths(text, "load"), _amd_widths(text, "store"), 0
    return Compiled(
        kernel=name,
        dtype=TYPES[dtype],
        registers=registers,
        spills=spills,
        local_bytes=local,
        wide_loads=sum(bits >= 128 for bits in loads),
        copies=copied,
        expected_loads=tensors_read(launch) * wide_accesses(launch, dtype, target),
        wide_stores=sum(bits >= 128 for bits in stores),
        expected_stores=tensors_written(launch) * wide_accesses(launch, dtype, target),
        int32_offsets=len(re.findall(r"tt\.addptr .*, tensor<\d[\dx]*xi32>", compiled.asm["ttir"])),
    )


def _nvidia_widths(ptx: str, kind: str) -> list[tuple[int, int]]:
    found = re.findall(rf"\b{kind}\.global(?:\.[a-z_:0-9]+)*?(?:\.v(\d))?\.b(\d+)", ptx)
    return [(int(words or 1), int(bits)) for words, bits in found]


def _amd_widths(assembly: str, kind: str) -> list[int]:
    sizes = {"dwordx4": 128, "dwordx2": 64, "dword": 32, "short": 16, "ushort": 16}
    found = re.findall(rf"\b(?:global|buffer)_{kind}_(dwordx4|dwordx2|dword|u?short)", assembly)
    return [sizes[size] for size in found]


def main(target: str) -> None:
    """Prints every kernel's report."""
    torch.version.hip = "offline" if target.startswith("gfx") else None  # launchers ask it for the warp size
    dtypes = (torch.bfloat16, torch.float32)
    print(
        json.dumps([asdict(compile_for(target, launch, dtype)) for dtype in dtypes for launch in all_launches(dtype)])
    )


if __name__ == "__main__":
    main(sys.argv[1])
