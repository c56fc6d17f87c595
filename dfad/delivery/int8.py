"""The student in 8 bits: PyTorch's PT2E quantisation, calibrated with generated instead of real images."""

from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from dfad.delivery import program
from dfad.delivery.classifier import Delivery, Function
from dfad.errors import ExportError, first_line, not_installed
from dfad.terminal import quiet

LOGGERS = ("torchao", "torch.utils._pytree")
"""Loggers with warnings about GPU libraries and PyTorch's deprecations during the import of torchao."""


def missing() -> str:
    """The package to install first; empty if none is missing."""
    return not_installed("torchao", "quantize") if find_spec("torchao") is None else ""


def quantised(delivery: Delivery, calibration: Iterable[Tensor]) -> ExportedProgram:
    """The program of a student with 8-bit convolutions and matrix products.

    Weights get one scale per output channel, activations one per tensor, from their range in the calibration.
    BatchNorms are folded into their convolutions first.

    Args:
        delivery: the student.
        calibration: batches of images for the exported network.

    Raises:
        ExportError: if there is no program of the student, or torchao cannot quantise it.
    """
    exported = program.exported(delivery.classifier, delivery.example)
    with quiet(*LOGGERS), torch.no_grad():
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
        from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
            X86InductorQuantizer,
            get_default_x86_inductor_quantization_config,
        )

        quantizer = X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config())
        try:
            observed: Any = prepare_pt2e(exported.module(), quantizer)
            for images in calibration:
                observed(images)
            converted = _without_unused(convert_pt2e(observed))
        except Exception as error:  # torchao raises errors of many kinds
            raise ExportError(
                f"torchao cannot quantise the student: {first_line(error)}. Name the --formats without int8."
            ) from error
        return program.exported(converted, delivery.example)


def _without_unused(network: Any) -> Any:
    """The program without the original weights, which remain beside their 8-bit form."""
    used = {str(node.target) for node in network.graph.nodes if node.op == "get_attr"}
    for name, _ in (*network.named_parameters(), *network.named_buffers()):
        if name not in used:
            owner, _, attribute = name.rpartition(".")
            delattr(network.get_submodule(owner), attribute)
    return network


def read(path: Path) -> Function:
    """The function in a file of such a program."""
    with quiet(*LOGGERS):
        import torchao.quantization.pt2e.quantize_pt2e  # noqa: F401 registers the operators of the program
    return program.read(path)
