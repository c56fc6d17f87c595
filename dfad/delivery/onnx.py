"""The student in ONNX, for other runtimes than PyTorch."""

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

PACKAGES = ("onnx", "onnxscript", "onnxruntime")

LOGGERS = ("torch.onnx", "onnxscript", "onnx_ir")
"""Loggers that report every pass over the graph, and packages that are not needed."""


def missing() -> str:
    """The package to install first; empty if none is missing."""
    absent = [package for package in PACKAGES if find_spec(package) is None]
    return not_installed(absent[0], "onnx") if absent else ""


def write(delivery: Delivery, path: Path) -> None:
    """Write the student.

    Args:
        delivery: the student.
        path: ends in ``.onnx``.

    Raises:
        ExportError: if there is no program of it, or ONNX lacks one of its operations.
    """
    save(program.exported(delivery.classifier, delivery.example), path)


def save(exported: ExportedProgram, path: Path) -> None:
    """Write a program in ONNX: ``images``, a batch of any size, to ``logits``.

    Raises:
        ExportError: if ONNX lacks one of its operations.
    """
    with quiet(*LOGGERS):
        try:
            converted: Any = torch.onnx.export(
                exported, dynamo=True, verbose=False, input_names=["images"], output_names=["logits"]
            )
        except Exception as error:  # the exporter raises errors of many kinds
            raise ExportError(
                f"The student cannot be written in ONNX: {first_line(error)}. Name the --formats without onnx."
            ) from error
        converted.save(str(path))


def read(path: Path) -> Function:
    """The function in such a file, run by ONNX Runtime on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def function(images: Tensor) -> Tensor:
        (logits,) = session.run(["logits"], {"images": images.numpy()})
        return torch.from_numpy(logits)

    return function
