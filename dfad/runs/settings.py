"""Settings to and from YAML, and the settings file in a run's folder."""

import dataclasses
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

import yaml

from dfad.errors import ConfigurationError, nearest

SETTINGS_FILE = "config.yaml"
"""Name of the settings file in a run's folder."""

T = TypeVar("T")


def to_tree(settings: Any) -> Any:
    """Settings as dictionaries, lists, strings, numbers, booleans and None, as YAML and JSON hold them."""
    if dataclasses.is_dataclass(settings):
        return {field.name: to_tree(getattr(settings, field.name)) for field in dataclasses.fields(settings)}
    if isinstance(settings, (tuple, list)):
        return [to_tree(item) for item in settings]
    return str(settings) if isinstance(settings, Path) else settings


def to_yaml(settings: Any) -> str:
    """Settings as the text of a file for ``--config``."""
    return yaml.safe_dump(to_tree(settings), sort_keys=False, allow_unicode=True)


def read_yaml(path: Path) -> dict[str, Any]:
    """A configuration file as nested dictionaries.

    Raises:
        ConfigurationError: if it cannot be read, or is not YAML with names at its top level.
    """
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"The configuration file {path} cannot be read: {error}.") from None
    except yaml.YAMLError as error:
        raise ConfigurationError(f"The configuration file {path} is not YAML: {error}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigurationError(
            f"The configuration file {path} holds a {type(tree).__name__}; it must hold 'name: value' lines, "
            "as --print_config prints them."
        )
    return tree


def override(settings: T, tree: Mapping[str, Any], source: str) -> T:
    """``settings`` with some values replaced by those of a nested dictionary.

    Args:
        settings: an instance of a dataclass of settings.
        tree: names and values, as YAML or JSON gives them; names that are missing keep the value they have.
            A ``factory`` without ``kwargs`` beside it has none, because those of ``settings`` belong to another.
        source: where the tree comes from, for messages.

    Raises:
        ConfigurationError: for an unknown name or an invalid value; quotes it, and says what is valid.
    """
    return _override(settings, tree, source, prefix="")


def saved_settings(folder: Path, defaults: T) -> T:
    """The settings that a run was started with.

    Args:
        folder: of the run.
        defaults: values of the settings that did not exist yet when the run was started.

    Raises:
        ConfigurationError: if the folder holds no run of this command, or its file does not fit.
    """
    path = folder / SETTINGS_FILE
    if not path.is_file():
        raise ConfigurationError(
            f"{folder} holds no {SETTINGS_FILE}, so it is not a run's folder. Name the folder of a run."
        )
    tree = read_yaml(path)
    foreign = [name for name in tree if not hasattr(defaults, name)]
    if foreign:
        raise ConfigurationError(
            f"{folder} holds the run of another command, or of another version: its {SETTINGS_FILE} sets "
            f"{', '.join(map(str, foreign))}. Resume a teacher's run with dfad teacher, a distillation with dfad train."
        )
    return override(defaults, tree, source=str(path))


GROWING = "method.rounds"
"""The only setting that may change when a run is resumed; it may only grow."""


def require_unchanged(folder: Path, saved: Any, settings: Any) -> bool:
    """Check that a run is resumed with its own settings; returns whether it is extended by more rounds.

    Raises:
        ConfigurationError: naming each setting that differs.
    """
    old, new = dict(leaves(saved)), dict(leaves(settings))
    changed = {name: value for name, value in new.items() if old[name] != value}
    rounds = changed.pop(GROWING, None)
    if rounds is not None and rounds < old[GROWING]:
        changed[GROWING] = rounds
    if changed:
        changes = "; ".join(f"{name} {old[name]!r} → {value!r}" for name, value in changed.items())
        raise ConfigurationError(
            f"{folder} cannot be resumed with other settings than it was started with. "
            f"Changed: {changes}. Leave these options out, or start a new run with --run_dir. "
            f"Only --{GROWING} may be raised."
        )
    return rounds is not None


def leaves(settings: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """All settings of a tree by the names of their flags."""
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, value


def _override(settings: Any, tree: Any, source: str, prefix: str) -> Any:
    if not isinstance(tree, Mapping):
        raise ConfigurationError(f"{source} sets {prefix.rstrip('.')} to {tree!r}; it must hold 'name: value' lines.")
    annotations = typing.get_type_hints(type(settings))
    known = [field.name for field in dataclasses.fields(settings)]
    changes: dict[str, Any] = {}
    if "factory" in tree and "kwargs" in known:
        changes["kwargs"] = {}
    for name, value in tree.items():
        if name not in known:
            raise ConfigurationError(
                f"{source} sets {prefix}{name}, which does not exist.{nearest(str(name), known)} "
                f"Known there: {', '.join(known)}."
            )
        current = getattr(settings, name)
        if dataclasses.is_dataclass(current):
            changes[name] = _override(current, value, source, f"{prefix}{name}.")
            continue
        try:
            changes[name] = _convert(value, annotations[name])
        except _Misfit as misfit:
            need, hint = misfit.args
            raise ConfigurationError(f"{source} sets {prefix}{name} to {value!r}; it must be {need}.{hint}") from None
    try:
        return dataclasses.replace(settings, **changes)
    except ValueError as error:  # "rounds is -1; it must be positive", from the dataclass itself
        raise ConfigurationError(f"{source}: {prefix}{error}.") from None


class _Misfit(Exception):
    """A value does not fit its annotation. Holds what is needed, and an optional sentence of help."""

    def __init__(self, need: str, hint: str = "") -> None:
        super().__init__(need, hint)


def _convert(value: Any, annotation: Any) -> Any:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (Union, types.UnionType):
        return _union(value, arguments)
    if origin is Literal:
        return _choice(value, arguments)
    if origin is tuple:
        return _tuple(value, arguments)
    if origin is dict:
        if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
            raise _Misfit("'name: value' lines")
        return value
    return _SCALARS[annotation](value)


def _union(value: Any, members: tuple[Any, ...]) -> Any:
    optional = types.NoneType in members
    if optional and value in (None, "None"):  # as YAML spells it, and as the command line does
        return None
    misfits = []
    for member in members:
        if member is not types.NoneType:
            try:
                return _convert(value, member)
            except _Misfit as misfit:
                misfits.append(misfit)
    needs = [misfit.args[0] for misfit in misfits] + ["null"] * optional
    raise _Misfit(" or ".join(needs), misfits[0].args[1])


def _choice(value: Any, choices: tuple[Any, ...]) -> Any:
    if isinstance(value, bool):  # YAML reads a bare on, off, yes or no as a boolean
        value = "on" if value else "off"
    for choice in choices:
        if str(choice) == str(value):
            return choice
    names = [str(choice) for choice in choices]
    raise _Misfit(f"one of {', '.join(names)}", nearest(str(value), names))


def _tuple(value: Any, members: tuple[Any, ...]) -> Any:
    items = value if isinstance(value, list) else [value]
    if members[1:] == (...,):
        members = members[:1] * len(items)
    elif len(items) != len(members):
        raise _Misfit(f"a list of {len(members)}")
    return tuple(_convert(item, member) for item, member in zip(items, members, strict=True))


def _bool(value: Any) -> bool:
    if not isinstance(value, bool):
        raise _Misfit("true or false")
    return value


def _int(value: Any) -> int:
    number = _float(value, "a whole number")
    if not number.is_integer():
        raise _Misfit("a whole number")
    try:
        return int(value)  # not via float, which has 53 bits
    except ValueError:  # "1e3"
        return int(number)


def _float(value: Any, need: str = "a number") -> float:
    try:
        if isinstance(value, bool):
            raise TypeError
        return float(value)  # "1e-3" is text to YAML, which wants 1.0e-3
    except (TypeError, ValueError, OverflowError):
        raise _Misfit(need) from None


def _str(value: Any) -> str:
    if not isinstance(value, str):
        raise _Misfit("text", " Put it in quotes." if value is not None else "")
    return value


def _path(value: Any) -> Path:
    return Path(_str(value))


_SCALARS: dict[Any, Callable[[Any], Any]] = {bool: _bool, int: _int, float: _float, str: _str, Path: _path}
