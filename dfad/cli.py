"""From defaults, preset, file and flags to one configuration; from errors to exit codes.

Tyro reads the flags, :mod:`dfad.runs.settings` the files; precedence is the order of reading: default < preset < file <
flags.
"""

import argparse
import dataclasses
import io
import json
import os
import re
import signal
import sys
import textwrap
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeVar, Union

import tyro

from dfad.errors import ConfigurationError, DfadError, first_line, is_out_of_memory, unknown
from dfad.ranks import GRACE, current_ranks, launched, restarts
from dfad.runs.folder import check_folder
from dfad.runs.settings import SETTINGS_FILE, override, read_yaml, saved_settings, to_yaml
from dfad.terminal import prepare_streams, silence_stdout

LESS_MEMORY = (
    "Take smaller batches, a smaller network or another --device; `dfad train --dry_run` says what a run needs. What "
    "was saved stays, and a run is continued with --resume."
)
"""What to do where memory runs out."""

Action = Annotated[bool, tyro.conf.FlagCreatePairsOff]
"""A flag that triggers an action, so it has no negated form."""

Positional = tyro.conf.Positional

Settings = tyro.conf.arg(name="")
"""Marks the field of a command whose own fields are flags without a prefix: ``Annotated[ItsConfig, Settings]``."""


def also(*flags: str) -> Any:
    """Marks a field with other flags that mean the same: ``Annotated[int, also("--old-name")]``."""
    return tyro.conf.arg(aliases=flags)


_registry = tyro.constructors.ConstructorRegistry()


@_registry.primitive_rule
def _json_rule(of: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec[Any] | None:
    """Keyword arguments are a JSON object on the command line."""
    if of.type_origin is not dict:
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="JSON",
        instance_from_str=_json_object,
        is_instance=lambda value: isinstance(value, dict),
        str_from_instance=lambda value: [json.dumps(value)],
    )


def _json_object(arguments: list[str]) -> dict[str, Any]:
    try:
        value = json.loads(arguments[0])
    except json.JSONDecodeError as error:
        raise ValueError(f"{arguments[0]} is not JSON such as '{{\"depth\": 20}}': {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{arguments[0]} is not a JSON object such as '{{\"depth\": 20}}'")
    return value


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """A command over a tree of settings that it can read from a preset and a file, and whose run it can resume.

    A command derives from this class and adds ``settings: Annotated[ItsConfig, cli.Settings]``.
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
    """Folder of a new run; by default one in runs/, named after preset and time."""

    overwrite: Action = False
    """Replace a run that the run's folder already holds."""

    def folder(self, prefix: str = "") -> Path:
        """The run's folder, checked before any expensive work.

        Raises:
            RunFolderError: if the run cannot use the folder.
            ConfigurationError: if the run to be resumed was started with other settings.
        """
        named = Path("runs") / time.strftime(f"{prefix}{self.preset}-%Y%m%d-%H%M%S")
        return current_ranks().of_first(lambda: self._checked(self.resume or self.run_dir or named))

    def _checked(self, folder: Path) -> Path:
        settings = self.settings  # type: ignore[attr-defined]
        check_folder(folder, settings, resume=self.resumes(folder), overwrite=self.overwrite)
        return folder

    def resumes(self, folder: Path) -> bool:
        """Whether the run in a folder goes on: as asked for, or because the launcher starts it again."""
        again = restarts() > 0 and self.run_dir is not None and (folder / SETTINGS_FILE).exists()
        return self.resume is not None or again


REPORTED = "reported"
"""Message of a rank to the others that it has shown the error."""

CommandT = TypeVar("CommandT", bound=Command)
T = TypeVar("T")


def parse(default: CommandT, presets: Mapping[str, Any], arguments: Sequence[str] | None = None) -> CommandT:
    """The command that the arguments ask for, its settings resolved.

    Args:
        default: the command with its default preset and settings.
        presets: settings by name.
        arguments: the command line; by default the process's.

    Raises:
        ConfigurationError: for an unknown preset, an unreadable file, a folder that holds no run to resume, or flags
            that exclude one another.
        SystemExit: with code 2, from tyro and with its message, for an unknown option or a value that does not fit;
            with code 0 after ``--help`` and ``--print_config``.
    """
    arguments = _in_full(sys.argv[1:] if arguments is None else arguments)
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for option in ("--preset", "--config", "--resume"):
        early.add_argument(option)
    chosen, _ = early.parse_known_args(arguments)

    saved = saved_settings(Path(chosen.resume), default.settings) if chosen.resume else None  # type: ignore[attr-defined]
    tree = read_yaml(Path(chosen.config)) if chosen.config else {}
    preset = str(chosen.preset or tree.pop("preset", None) or default.preset)
    if preset not in presets:
        raise ConfigurationError(unknown("preset", preset, presets))
    if saved is not None and not chosen.preset and not chosen.config:
        settings = saved
    else:
        settings = override(presets[preset], tree, source=str(chosen.config))

    prepared = dataclasses.replace(default, preset=preset, settings=settings)  # type: ignore[call-arg]
    command = parse_flags(type(default), arguments, prepared)
    if command.resume and (command.run_dir or command.overwrite):
        raise ConfigurationError(
            f"--resume {command.resume} continues a run in its own folder. Leave out --run_dir and --overwrite, which "
            "are for new runs."
        )
    if command.print_config:
        print(to_yaml(command.settings), end="")  # type: ignore[attr-defined]
        raise SystemExit(0)
    return command


NETWORKS = ("--teacher", "--student")
"""Flags that are short for the factory of a network."""


def _in_full(arguments: Sequence[str]) -> list[str]:
    """The arguments with ``--teacher`` as ``--teacher.factory``, and without keyword arguments of another factory."""
    full = []
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        full.append(f"{flag}.factory{equals}{value}" if flag in NETWORKS else argument)
    given = {argument.partition("=")[0] for argument in full}
    networks = [flag.removesuffix(".factory") for flag in sorted(given) if flag.endswith(".factory")]
    return full + [f"{network}.kwargs={{}}" for network in networks if f"{network}.kwargs" not in given]


def run(command: Callable[[], None]) -> NoReturn:
    """Run a command and exit; an error meant for people is shown as its paragraph alone."""
    prepare_streams()
    rank = 0
    with suppress(ConfigurationError):  # which the command will report
        rank, _ = launched()
    try:
        code = _exit_code_of_rank(rank, command) if rank else _exit_code(command)
    except Exception:
        current_ranks().leave_word(REPORTED)
        raise
    if code:
        current_ranks().leave_word(REPORTED)
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        silence_stdout()
    raise SystemExit(code)


def _exit_code_of_rank(rank: int, command: Callable[[], None]) -> Any:
    """Of a rank after the first: silent, but for an error that is its alone."""
    said = io.StringIO()
    with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere), redirect_stderr(said):
        try:
            code = _exit_code(command)
        except Exception:  # which Python would show without the rank
            traceback.print_exc()
            code = 1
    if code and not current_ranks().heard(REPORTED, within=GRACE):
        print(textwrap.indent(said.getvalue().strip(), f"rank {rank}: "), file=sys.stderr)
    return code


def _exit_code(command: Callable[[], None]) -> Any:
    try:
        command()
    except SystemExit as ended:
        # rich exits with 1 where the reader of the output has
        return 0 if isinstance(ended.__context__, BrokenPipeError) else ended.code
    except BrokenPipeError:  # the reader of the output, such as head, has exited
        return 0
    except DfadError as error:
        with suppress(BrokenPipeError):
            print(f"\n{error}" if error.exit_code < 128 else error, file=sys.stderr)
        return error.exit_code
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        asked = re.search(r"you tried to allocate (\d+) bytes", str(error))
        said = f"{int(asked[1]) / 1e9:,.1f} GB were asked for at once" if asked else first_line(error)
        print(f"\nThere is not enough memory: {said}. {LESS_MEMORY}", file=sys.stderr)
        return ConfigurationError.exit_code
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0


def parse_flags(kind: type[T], arguments: Sequence[str] | None = None, default: T | None = None) -> T:
    """A dataclass of the flags on the command line.

    Args:
        kind: the dataclass; its docstrings are the help texts.
        arguments: the command line; by default the process's.
        default: an instance whose values serve where no flag is given; the fields' defaults without one.

    Raises:
        ConfigurationError: for values that do not fit one another.
        SystemExit: with code 2, from tyro and with its message, for an unknown option or a value that does not fit;
            with code 0 after ``--help``.
    """
    try:
        return tyro.cli(
            kind,
            prog=_program(),
            args=arguments,
            default=tyro.MISSING_NONPROP if default is None else default,
            use_underscores=True,
            registry=_registry,
        )
    except ValueError as error:  # tyro reports errors of nested dataclasses itself, but not those of the outermost one
        raise ConfigurationError(f"{error}.") from None


@dataclasses.dataclass(frozen=True)
class Completion:
    """Print what lets a shell complete commands and options: source <(dfad completion bash)."""

    shell: Annotated[Literal["bash", "zsh", "fish"], Positional]
    """Which shell."""


def print_completion(shell: str, commands: Mapping[str, type]) -> None:
    """Print a shell's completion script for the ``dfad`` script.

    Args:
        shell: bash, zsh or fish.
        commands: the dataclass of each command's options.
    """
    subcommand = tyro.conf.subcommand
    kinds = [Annotated[kind, subcommand(name, prefix_name=False)] for name, kind in commands.items()]
    any_of_them: Any = Union[tuple(kinds)]  # noqa: UP007
    arguments = ["--tyro-print-completion", shell]
    tyro.cli(any_of_them, prog="dfad", args=arguments, use_underscores=True, registry=_registry)


def _program() -> str:
    # tyro would name the file of the module
    spec = sys.modules["__main__"].__spec__
    if spec is None or spec.name.endswith(".__main__"):
        return Path(sys.argv[0]).name
    return f"python -m {spec.name}"
