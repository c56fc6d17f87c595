"""From defaults, preset, file and flags to one configuration; from errors to exit codes.

Tyro reads the flags. A configuration file is turned into flags first, so that one parser judges both and
precedence is the order of reading: default < preset < file < flags.
"""

import argparse
import dataclasses
import json
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import tyro
import yaml

from dfad.errors import ConfigurationError, DfadError, nearest


def _json_object(arguments: list[str]) -> dict[str, Any]:
    value = json.loads(arguments[0])
    if not isinstance(value, dict):
        raise ValueError(f"{arguments[0]} is not a JSON object such as '{{\"depth\": 20}}'")
    return value


SETTINGS_FILE = "config.yaml"
"""In a run's folder."""

Action = Annotated[bool, tyro.conf.FlagCreatePairsOff]
"""A flag that asks for something once, so that its negation has no meaning."""

Keywords = Annotated[
    dict[str, Any],
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="JSON",
        instance_from_str=_json_object,
        is_instance=lambda value: isinstance(value, dict),
        str_from_instance=lambda value: [json.dumps(value)],
    ),
]
"""Keyword arguments; a JSON object on the command line."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """A command over a tree of settings that it can read from a preset and a file, and whose run it can resume.

    A command derives from this class and adds ``settings: Annotated[ItsConfig, tyro.conf.arg(name="")]``.
    """

    preset: str = ""
    """Settings to start from, by name."""

    config: Path | None = None
    """YAML file of settings; they override the preset's and are overridden by flags."""

    print_config: Action = False
    """Print the resulting settings as such a file, and stop."""

    resume: Path | None = None
    """Folder of a run to continue from its last checkpoint, with the settings saved there."""

    run_dir: Path | None = None
    """Folder of a new run; one in runs/ named after preset and time where not given."""

    overwrite: Action = False
    """Replace a run that the run's folder already holds."""


CommandT = TypeVar("CommandT", bound=Command)
T = TypeVar("T")


def parse(default: CommandT, presets: Mapping[str, Any], arguments: Sequence[str] | None = None) -> CommandT:
    """The command that the arguments ask for, its settings resolved.

    Args:
        default: the command with its default preset and settings.
        presets: settings by name.
        arguments: the command line; by default the process's.

    Raises:
        ConfigurationError: for an unknown preset, an unreadable file, settings that differ from a resumed run's, or
            flags that exclude one another.
        SystemExit: with code 2, from tyro and with its message, for an unknown option or a value that does not fit;
            with code 0 after ``--help`` and ``--print_config``.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for option in ("--preset", "--config", "--resume"):
        early.add_argument(option)
    chosen, _ = early.parse_known_args(arguments)

    saved = saved_settings(Path(chosen.resume), default.settings) if chosen.resume else None  # type: ignore[attr-defined]
    tree = read_yaml(Path(chosen.config)) if chosen.config else {}
    preset = chosen.preset or tree.pop("preset", None) or default.preset
    if preset not in presets:
        raise ConfigurationError(
            f"There is no preset {preset!r}.{nearest(preset, presets)} Choose one of: {', '.join(presets)}."
        )
    if saved is not None and not chosen.preset and not chosen.config:
        settings = saved
    else:
        settings = override(presets[preset], tree, source=str(chosen.config))

    prepared = dataclasses.replace(default, preset=preset, settings=settings)  # type: ignore[call-arg]
    command = _tyro(prepared, arguments, prog=_program())
    if saved is not None:
        require_unchanged(Path(chosen.resume), saved, command.settings)  # type: ignore[attr-defined]
    if command.resume and (command.run_dir or command.overwrite):
        raise ConfigurationError(
            f"--resume {command.resume} continues a run in its own folder. Leave out --run_dir and --overwrite, which "
            "are for new runs."
        )
    if command.print_config:
        print(to_yaml(command.settings), end="")  # type: ignore[attr-defined]
        raise SystemExit(0)
    return command


def run(command: Callable[[], None]) -> NoReturn:
    """Run a command and exit; an error meant for people is shown as its paragraph alone."""
    try:
        command()
    except DfadError as error:
        print(f"\n{error}" if error.exit_code < 128 else error, file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from None
    raise SystemExit(0)


def to_tree(settings: Any) -> Any:
    """Settings as dictionaries, lists, strings, numbers, booleans and None: what YAML and JSON hold."""
    if dataclasses.is_dataclass(settings):
        return {field.name: to_tree(getattr(settings, field.name)) for field in dataclasses.fields(settings)}
    if isinstance(settings, (tuple, list)):
        return [to_tree(item) for item in settings]
    return str(settings) if isinstance(settings, Path) else settings


def to_yaml(settings: Any) -> str:
    """Settings as a file for ``--config``."""
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


def override(settings: Any, tree: Mapping[str, Any], source: str) -> Any:
    """``settings`` with the values of a nested dictionary in their place.

    Args:
        settings: an instance of a dataclass of settings.
        tree: names and values; a part of the settings is enough.
        source: where the tree comes from, for messages.

    Raises:
        ConfigurationError: for an unknown name.
        SystemExit: from tyro, for a value that does not fit.
    """
    return _tyro(settings, list(_flags(tree, settings, source)), prog=source)


def _tyro(default: T, arguments: Sequence[str], prog: str | None = None) -> T:
    try:
        return tyro.cli(type(default), prog=prog, args=arguments, default=default, use_underscores=True)
    except ValueError as error:  # tyro words those of nested dataclasses itself, but not those of the outermost
        raise ConfigurationError(f"{error}.") from None


def _program() -> str:
    # tyro would name the file of the module
    spec = sys.modules["__main__"].__spec__
    return f"python -m {spec.name}" if spec else Path(sys.argv[0]).name


def saved_settings(folder: Path, defaults: Any) -> Any:
    """The settings that a run was started with.

    Raises:
        ConfigurationError: if the folder holds no run.
    """
    path = folder / SETTINGS_FILE
    if not path.is_file():
        raise ConfigurationError(
            f"{folder} cannot be resumed: it holds no {SETTINGS_FILE}, so it is not a run's folder. "
            "Name a folder that a run has made."
        )
    return override(defaults, read_yaml(path), source=str(path))


def require_unchanged(folder: Path, saved: Any, settings: Any) -> None:
    """Refuse to resume with other settings.

    Raises:
        ConfigurationError: naming each setting that differs.
    """
    old, new = dict(_leaves(saved)), dict(_leaves(settings))
    changes = [f"{name} {old[name]!r} → {value!r}" for name, value in new.items() if old[name] != value]
    if changes:
        raise ConfigurationError(
            f"{folder} cannot be resumed with other settings than it was started with. "
            f"Changed: {'; '.join(changes)}. Leave these options out, or start a new run with --run_dir."
        )


def _leaves(settings: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            yield from _leaves(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, value


def _flags(tree: Mapping[str, Any], settings: Any, source: str, prefix: str = "") -> Iterator[str]:
    known = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    for name, value in tree.items():
        flag = f"--{prefix}{name}"
        if name not in known:
            raise ConfigurationError(
                f"{source} sets {prefix}{name}, which does not exist.{nearest(str(name), known)} "
                f"Known there: {', '.join(known)}."
            )
        if dataclasses.is_dataclass(known[name]):
            if not isinstance(value, dict):
                raise ConfigurationError(
                    f"{source} sets {prefix}{name} to {value!r}; it must hold 'name: value' lines."
                )
            yield from _flags(value, known[name], source, f"{prefix}{name}.")
        elif isinstance(value, bool) and isinstance(known[name], bool):
            yield flag if value else f"--{prefix}no_{name}"
        elif isinstance(value, dict):
            yield from (flag, json.dumps(value))
        elif isinstance(value, list):
            yield from (flag, *map(str, value))
        else:
            yield from (flag, str(value))
