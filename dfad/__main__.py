"""``dfad COMMAND``: every command of this package under one name; a command is imported when it is called."""

import ast
import dataclasses
import importlib
import sys
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import NoReturn

from dfad.environment import version
from dfad.errors import ConfigurationError, unknown
from dfad.terminal import prepare_streams

COMPLETION = "completion"

USAGE = """usage: {program} COMMAND [OPTIONS]
       {program} COMMAND --help
       {program} --version

Data-free distillation: a small classifier from a large one, without any data.

{commands}
"""


def main() -> NoReturn:
    """Run the command that the arguments name, and exit."""
    prepare_streams()
    program = "python -m dfad" if Path(sys.argv[0]).stem == "__main__" else Path(sys.argv[0]).name
    name, *arguments = sys.argv[1:] or ["--help"]
    known = commands()
    if name in ("--help", "-h"):
        lines = (f"  {command:<12}{summary}" for command, summary in known.items())
        print(USAGE.format(program=program, commands="\n".join(lines)), end="")
        raise SystemExit(0)
    if name == "--version":
        print(f"dfad {version()}")
        raise SystemExit(0)
    if name not in known:
        print(f"\n{unknown('command', name, known)}", file=sys.stderr)
        raise SystemExit(ConfigurationError.exit_code)
    if not sys.flags.safe_path:
        sys.path.append("")  # the working directory, as with python -m: networks of the user's own are found there
    sys.argv[0] = f"{program} {name}"  # as the command's own help names it
    from dfad import cli  # PyTorch comes with it: two seconds

    if name == COMPLETION:
        cli.run(lambda: cli.print_completion(cli.parse_flags(cli.Completion, arguments).shell, settings_of(known)))
    cli.run(lambda: importlib.import_module(f"dfad.{name}").main(arguments))


def commands() -> dict[str, str]:
    """The commands, each with what its module says of it in its first sentence."""
    found = {COMPLETION: "print what lets a shell complete commands and options: source <(dfad completion bash)"}
    for path in files("dfad").iterdir():
        if path.name.endswith(".py"):
            says = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
            name = path.name.removesuffix(".py")
            if says.startswith(f"``python -m dfad.{name}"):
                found[name] = " ".join(says.partition("\n\n")[0].partition("``: ")[2].split()).rstrip(".")
    return dict(sorted(found.items()))


def settings_of(names: Mapping[str, str]) -> dict[str, type]:
    """The dataclass of each command's options, the one that its module defines."""
    found = {}
    for name in names:
        module = importlib.import_module("dfad.cli" if name == COMPLETION else f"dfad.{name}")
        if name == COMPLETION:
            found[name] = module.Completion
            continue
        (found[name],) = (
            kind for kind in vars(module).values()
            if isinstance(kind, type) and dataclasses.is_dataclass(kind) and kind.__module__ == module.__name__
        )  # fmt: skip
    return found


if __name__ == "__main__":
    main()
