"""Programs of ``torch.export`` in ``.pt2`` files, read without running other code that such a file may hold."""

import json
import os
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from dfad.errors import ModelError, first_line

FORMAT = "archive_format"
"""Entry that identifies an archive of ``torch.export``."""

NORMALISATION = "dfad-normalisation.json"
"""Entry, among those for other programs, with mean and standard deviation of the images of an exported student."""

PICKLED = ("custom_obj_", "opaque_obj_", "opaque_")
"""Prefix of the names of constants that PyTorch always unpickles."""

EXPRESSION = re.compile(
    r"(?:[a-z_]\w*+(?!\s*\()|[A-Z]\w*+|\d[\d.]*|'\w+'|\)(?!\s*\()|[\s+\-*/%(,<>=!&|~])*"  # functions are capitalised
)
"""Of sizes: symbols, numbers, operators and SymPy's functions, such as ``Symbol('s31', integer=True)``; no attributes,
and no function of Python's."""


def is_exported(path: Path) -> bool:
    """Whether a file is a program of ``torch.export``, by its content."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        names = {name.rpartition("/")[2] for name in archive.namelist()}
    return FORMAT in names or "serialized_exported_program.json" in names


def load_exported(path: Path) -> tuple[nn.Module, tuple[int, ...]]:
    """The network of a program, in the one mode that it was exported in, and the size of one input.

    Args:
        path: a file for which :func:`is_exported` is true.

    Returns:
        The network, and ``(channels, height, width)``.

    Raises:
        ModelError: if it cannot be read, holds what would run code of its own, or takes anything else than one batch of
            images of any number.
    """
    _require_data_alone(path)
    try:
        with weights_alone():
            program = torch.export.load(path)
        network = program.module(check_guards=False)  # which are code in the file; what they check is found here
    except Exception as error:  # files of other versions may raise anything
        raise ModelError(
            f"The program {path} cannot be read by PyTorch {torch.__version__}: {type(error).__name__}: "
            f"{first_line(error)}. Export it again with this version: torch.export.save(program, file)."
        ) from None
    graphs = [module.graph for module in program.graph_module.modules() if isinstance(module, fx.GraphModule)]
    foreign = [node.target for graph in graphs for node in graph.nodes if not _is_plain(node)]
    if foreign:
        raise ModelError(
            f"The program {path} calls {foreign[0]}, which is none of PyTorch's operations, and was not run. Export it "
            "without operations of others."
        )
    inputs = program.graph_signature.user_inputs
    shapes = [
        tuple(node.meta["val"].shape)
        for node in program.graph.nodes
        if node.op == "placeholder" and node.name in inputs and isinstance(node.meta.get("val"), torch.Tensor)
    ]
    if len(inputs) != 1 or len(shapes) != 1 or len(shapes[0]) != 4:
        raise ModelError(f"The program {path} takes {shapes or list(inputs)}; needed is one batch of images.")
    batch, *image = shapes[0]
    if isinstance(batch, int):
        raise ModelError(
            f"The program {path} takes batches of {batch} images alone. Export it for any number: torch.export.export("
            'network, (images,), dynamic_shapes=({0: torch.export.Dim("batch", max=4096)},)).'
        )
    if not all(isinstance(size, int) for size in image):
        image = [node for node in image if isinstance(node, int)]  # channels, at most: the images' size is found
    return network, tuple(image)


def normalisation_of(path: Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of a program's images; empty unless this project wrote it.

    Args:
        path: a file for which :func:`is_exported` is true.
    """
    with zipfile.ZipFile(path) as archive:
        said = [json.loads(archive.read(name)) for name in archive.namelist() if name.endswith(f"/{NORMALISATION}")]
    mean, std = (tuple(map(float, said[0][key])) if said else () for key in ("mean", "std"))
    return mean, std


@contextmanager
def weights_alone() -> Iterator[None]:
    """Other packages' ``torch.load`` unpickles tensors and no code."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _require_data_alone(path: Path) -> None:
    """Check the entries that PyTorch unpickles, and the expressions and guards that it evaluates."""
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        found = [name for name in names if name.rpartition("/")[2].startswith(PICKLED)]
        graphs = [json.loads(archive.read(name)) for name in names if name.endswith(".json")]
    found += [text for graph in graphs for text in _code(graph) if not EXPRESSION.fullmatch(text)]
    if found:
        raise ModelError(
            f"The program {path} holds {found[0]!r}, which is more than tensors and PyTorch's operations, and was not "
            "loaded: running its code would not be safe. Export it without such objects."
        )


def _code(tree: Any) -> Iterator[str]:
    """The texts in a serialised program that are evaluated when it is loaded."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            if key == "expr_str" and isinstance(value, str):
                yield value
            elif key != "guards_code":
                yield from _code(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from _code(value)


def _is_plain(node: fx.Node) -> bool:
    target = node.target
    if node.op != "call_function" or type(target).__module__.startswith(("torch._ops", "torch._higher_order_ops")):
        return True
    return getattr(target, "__module__", None) in ("_operator", "math") or target in SYMBOLIC


SYMBOLIC = (torch.sym_int, torch.sym_float, torch.sym_max, torch.sym_min, torch.sym_not, torch.sym_ite)
"""Of sizes; they compute with numbers alone."""
