"""The student as a program of ``torch.export``, which needs only PyTorch, not the code of the network."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from dfad.delivery.classifier import Delivery, Function
from dfad.errors import ExportError, first_line
from dfad.files import write_atomically
from dfad.models.exported import NORMALISATION


def exported(classifier: nn.Module, example: torch.Tensor) -> ExportedProgram:
    """The program of a classifier, for batches of any size.

    Args:
        classifier: a module from images to logits.
        example: two images.

    Raises:
        ExportError: if torch.export cannot trace it, or finds that it takes batches of only one size.
    """
    with torch.no_grad():
        try:
            return torch.export.export(classifier, (example,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
        except Exception as error:  # a network may fail in any way
            raise ExportError(
                f"torch.export cannot make a program of the student: {first_line(error)}. Its forward must be made of "
                "PyTorch's operations, take batches of any size, and not branch on values of tensors. Name the "
                "--formats that need no program, such as safetensors and huggingface."
            ) from error


def write(delivery: Delivery, path: Path) -> None:
    """Write the program.

    Args:
        delivery: the student.
        path: ends in ``.pt2``.

    Raises:
        ExportError: see :func:`exported`.
    """
    save(exported(delivery.classifier, delivery.example), path, delivery)


def save(program: ExportedProgram, path: Path, delivery: Delivery) -> None:
    """Write any program of the student, with the normalisation of its images."""
    mean, std = delivery.taken_normalisation
    about = {NORMALISATION: json.dumps({"mean": mean, "std": std})}
    write_atomically(path, lambda file: torch.export.save(program, file, extra_files=about))


def read(path: Path) -> Function:
    """The function in such a file."""
    function: Any = torch.export.load(path).module()
    return function
