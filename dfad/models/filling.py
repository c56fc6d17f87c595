"""State dicts put into networks: names and shapes matched, what differs said."""

import logging
import re
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from dfad.errors import ModelError, name_of

log = logging.getLogger(__name__)

WRAPPER_PREFIXES = ("module.", "_orig_mod.", "model.", "network.", "net.")
"""Prefixes that DataParallel, torch.compile and common trainers add to every name."""

JUNK = re.compile(r"(^|\.)(total_ops|total_params|n_averaged)$|^(criterion|loss|loss_fn)\.")
"""Names that profilers, weight averages and trainers add to a network's own weights."""

EXTRA_STATE = "_extra_state"
"""Last part of the name of a module's extra state, which need not be a tensor."""


def fill(network: nn.Module, weights: Mapping[str, Any], path: Path) -> None:
    """Put weights that were read from a file into a network, all names and shapes matching.

    Args:
        network: the network, written in place.
        weights: its state dict. Prefixes before all names are removed, and further entries are
            skipped with a line in the log.
        path: the file, for messages.

    Raises:
        ModelError: if they belong to another architecture; names the first missing, unexpected and mis-shaped entries.
    """
    wanted = network.state_dict()
    given = without_prefix(weights, wanted, path)
    junk = [name for name in given if name not in wanted and JUNK.search(name)]
    _log_skipped(path, junk)
    given = {name: value for name, value in given.items() if name not in junk}
    unfit = misfit(wanted, given)
    if unfit:
        raise ModelError(
            f"The checkpoint {path} belongs to another architecture than {name_of(network)}. {unfit} "
            "Check factory and kwargs against the network that was saved."
        )
    filled = OrderedDict(given)
    vars(filled).update(vars(wanted))  # the version of each module's entries, which some refuse to do without
    try:
        network.load_state_dict(filled, strict=False)
    except (RuntimeError, NotImplementedError) as error:  # tensors without values, sparse ones, other sizes than said
        detail = next((line for line in str(error).splitlines()[1:] if line.strip()), str(error)).strip()
        raise ModelError(
            f"The checkpoint {path} cannot be loaded into {name_of(network)}: {detail} Save dense tensors that "
            "have values."
        ) from error


def misfit(wanted: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    """Sentences on what a state dict lacks, has too much, or has in other shapes; nothing where it fits.

    Args:
        wanted: a network's state dict.
        given: another one, which is to be loaded into it.
    """
    tied = shared_tensors(wanted)
    there = {tied.get(name, name) for name in given}
    missing = [n for n in wanted if n not in given and not _dispensable(n) and tied.get(n, n) not in there]
    unexpected = [n for n in given if n not in wanted]
    misshaped = [
        f"{n} ({tuple(given[n].shape)} in the file, {tuple(value.shape)} in the network)"
        for n, value in wanted.items()
        if isinstance(value, Tensor) and n in given and not is_lazy(value) and given[n].shape != value.shape
    ]
    counts = {"missing": missing, "unexpected": unexpected, "mis-shaped": misshaped}
    found = [f"{len(names)} {kind}, first {names[0]}." for kind, names in counts.items() if names]
    return " ".join([*found, *_other_classes(given, wanted, misshaped)])


def _other_classes(given: Mapping[str, Any], wanted: Mapping[str, Any], misshaped: list[str]) -> Iterator[str]:
    """If only the last layer differs in its length: how many classes the file is for."""
    last = [name for name, value in wanted.items() if isinstance(value, Tensor) and value.ndim == 2][-1:]
    for name in last:
        if misshaped and name in given and len(misshaped) <= 2 and given[name].shape[1:] == wanted[name].shape[1:]:
            classes = given[name].shape[0]
            given_so = f"kwargs '{{\"num_classes\": {classes}}}', if its factory takes that"
            yield f"The file is of a network with {classes} classes: {given_so}."


def without_prefix(given: Mapping[str, Any], wanted: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
    """The weights under the names of the network; further entries are skipped if all of these exist."""
    needed = [name for name in wanted if not _dispensable(name)]
    if not needed or given.keys() & wanted.keys():
        return given
    prefixes = [name.removesuffix(needed[0]) for name in given if name.endswith("." + needed[0])]
    whole = [prefix for prefix in prefixes if all(prefix + name in given for name in needed)]
    if len(whole) > 1:
        raise ModelError(
            f"The checkpoint {path} holds the weights of {len(whole)} networks of this kind: "
            f"{', '.join(prefix.rstrip('.') for prefix in whole)}. Choose one with --teacher.checkpoint_key, "
            "--student.checkpoint_key or, of dfad.evaluate, --checkpoint_key."
        )
    if whole:
        prefix = whole[0]
        _log_skipped(path, [name for name in given if not name.startswith(prefix)])
        return {name.removeprefix(prefix): value for name, value in given.items() if name.startswith(prefix)}
    # another architecture: without the wrappers' prefixes, the differences are readable
    while not given.keys() & wanted.keys() and (prefix := _common_prefix(given)):
        given = {name.removeprefix(prefix): value for name, value in given.items()}
    return given


def _log_skipped(path: Path, names: list[str]) -> None:
    if names:
        log.info("%s: %d entries besides the network's weights were skipped, first %s.", path, len(names), names[0])


def _dispensable(name: str) -> bool:
    # counters that old files lack and inference does not use; optional extra state
    return name.endswith("num_batches_tracked") or name.rpartition(".")[2] == EXTRA_STATE


def shared_tensors(state: Mapping[str, Any]) -> dict[str, str]:
    """Maps every name of a tensor to its first name; tied weights have several."""
    first: dict[tuple[Any, ...], str] = {}
    return {
        name: first.setdefault(_place(value), name)
        for name, value in state.items()
        if isinstance(value, Tensor) and not is_lazy(value) and value.numel()
    }


def _place(tensor: Tensor) -> tuple[Any, ...]:
    storage = tensor.untyped_storage().data_ptr()
    return storage, tensor.storage_offset(), tensor.dtype, tuple(tensor.shape), tensor.stride()


def _common_prefix(names: Iterable[str]) -> str:
    return next((prefix for prefix in WRAPPER_PREFIXES if all(name.startswith(prefix) for name in names)), "")
