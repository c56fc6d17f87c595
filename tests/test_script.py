"""The ``dfad`` script: every command by its name."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import dfad
from dfad import __main__ as script
from dfad import cli
from tests.processes import HANGING

ROOT = Path(__file__).parents[1]
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


@pytest.fixture
def call(monkeypatch, capsys):
    """Calls the script with arguments; returns exit code, standard output and standard error."""

    def called(*arguments: str) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", ["/somewhere/bin/dfad", *arguments])
        monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
        with pytest.raises(SystemExit) as ended:
            script.main()
        return ended.value.code, *capsys.readouterr()

    return called


def test_help_names_every_command_and_what_it_does(call):
    code, out, err = call("--help")
    assert (code, err) == (0, "")
    assert call() == (0, out, "")
    modules = {path.stem for path in (ROOT / "dfad").glob("*.py") if '__name__ == "__main__"' in path.read_text()}
    assert set(script.commands()) == modules - {"__main__"} | {"completion"}
    for name, summary in script.commands().items():
        assert len(summary) > 20
        assert f"  {name:<12}{summary}\n" in out


def test_an_unknown_command_is_refused_with_the_nearest_name(call):
    code, out, err = call("trian", "--seed", "1")
    assert (code, out) == (2, "")
    assert "There is no command 'trian'. Did you mean 'train'? Choose one of: " in err


def test_the_version_is_that_of_the_package(call):
    assert call("--version") == (0, f"dfad {VERSION}\n", "")
    assert dfad.__version__ == VERSION


def test_a_command_is_given_its_arguments_and_names_itself_as_it_was_called(call):
    code, out, _ = call("evaluate", "--help")
    assert code == 0
    assert out.startswith("usage: dfad evaluate ")
    code, _, err = call("evaluate", "--model", "missing.safetensors")
    assert code == 3
    assert "missing.safetensors does not exist" in err


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_offers_commands_and_options(shell, call, tmp_path):
    code, printed, _ = call("completion", shell)
    assert not code
    if shell != "bash":
        assert {"zsh": "#compdef dfad\n", "fish": "complete --no-files --command 'dfad'"}[shell] in printed
        assert "--method.rounds" in printed
        return
    (tmp_path / "completion").write_text(printed)

    def offered(*words: str) -> set[str]:
        run = f"""source completion; COMP_WORDS=({" ".join(words)}); COMP_CWORD={len(words) - 1}
            $(complete -p dfad | sed 's/.*-F \\([^ ]*\\).*/\\1/'); printf '%s\\n' "${{COMPREPLY[@]}}" """
        done = subprocess.run(["bash", "-c", run], cwd=tmp_path, capture_output=True, text=True, check=True)
        return set(done.stdout.split())

    assert offered("dfad", "tr") == {"train"}
    assert "--method.rounds" in offered("dfad", "train", "--method.r")


def test_the_options_of_a_command_are_one_dataclass_of_its_module():
    kinds = script.settings_of(script.commands())
    assert kinds["completion"] is cli.Completion
    assert all(kind.__module__ == f"dfad.{name}" for name, kind in kinds.items() if name != "completion")


def test_help_needs_neither_torch_nor_the_parser_of_flags():
    code = "import sys; sys.argv = ['dfad', '--version']; from dfad.__main__ import main\ntry: main()\n"
    code += "except SystemExit: pass\nassert not {'torch', 'tyro'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=HANGING)
    assert done.returncode == 0, done.stderr


def test_a_network_in_the_working_directory_is_found(tmp_path):
    """As with ``python -m``; the path of a script has its own directory instead."""
    (tmp_path / "netsofmine.py").write_text("from dfad.models import lenet5_half\n")
    code = "import sys; sys.path = [p for p in sys.path if p]; from dfad.__main__ import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "inspect", "netsofmine:lenet5_half", "--json"],
        cwd=tmp_path, capture_output=True, text=True, timeout=HANGING,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert '"parameters": 15738' in done.stdout
