"""From defaults, preset, file and flags to one configuration."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pytest
import torch
import yaml
from rich.console import Console

from dfad import cli
from dfad.config import DistillConfig, MethodConfig, OptimizerConfig, StudentConfig
from dfad.errors import ConfigurationError
from dfad.runs.settings import SETTINGS_FILE, to_yaml
from tests.processes import HANGING

PRESETS = {"plain": DistillConfig(), "short": DistillConfig(method=MethodConfig(rounds=7), seed=1)}


@dataclass(frozen=True, kw_only=True)
class Example(cli.Command):
    settings: Annotated[DistillConfig, cli.Settings] = DistillConfig()


def command(*arguments: object) -> Example:
    return cli.parse(Example(preset="plain"), PRESETS, [str(argument) for argument in arguments])


def parse(*arguments: object) -> DistillConfig:
    return command(*arguments).settings


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_precedence_is_default_preset_file_flags(tmp_path):
    file = write(tmp_path / "c.yaml", "seed: 2\nmethod: {batch_size: 32}\noptimizer: {student: {lr: 1e-2}}\n")
    assert parse() == DistillConfig()
    assert parse("--preset", "short").seed == 1
    from_file = parse("--preset", "short", "--config", file)
    assert (from_file.seed, from_file.method.rounds, from_file.method.batch_size) == (2, 7, 32)
    assert from_file.optimizer.student.lr == 0.01
    assert parse("--preset", "short", "--config", file, "--seed", 3).seed == 3


def test_the_file_may_name_the_preset(tmp_path):
    assert parse("--config", write(tmp_path / "c.yaml", "preset: short\n")).method.rounds == 7
    for none in ("3", "[short]"):
        with pytest.raises(ConfigurationError, match="There is no preset"):
            parse("--config", write(tmp_path / "c.yaml", f"preset: {none}\n"))


def test_keyword_arguments_belong_to_their_factory(tmp_path):
    preset = {"own": DistillConfig(student=StudentConfig("convnet", {"channels": [4]}))}

    def student(*arguments: object) -> StudentConfig:
        given = ["--preset=own", *map(str, arguments)]
        return cli.parse(Example(preset="own"), preset, given).settings.student

    for given in (["--student.factory", "mine:net"], ["--student.factory=mine:net"], ["--student", "mine:net"]):
        assert student(*given) == StudentConfig("mine:net")
        assert student(*given, '--student.kwargs={"width": 2}') == StudentConfig("mine:net", {"width": 2})
    file = write(tmp_path / "c.yaml", "student: {factory: mine:net}\n")
    assert student("--config", file) == StudentConfig("mine:net")
    assert student("--config", write(tmp_path / "c.yaml", "student: {taps: [a]}\n")).kwargs == {"channels": [4]}
    assert student("--teacher=mine:net").kwargs == {"channels": [4]}
    assert student('--student.kwargs={"width": 2}') == StudentConfig("convnet", {"width": 2})


def test_booleans_are_plain_flags():
    assert parse("--fused").fused
    assert not parse("--no-fused").fused


def test_print_config_prints_a_file_that_gives_the_same_settings(tmp_path, capsys):
    flags = [
        "--method.rounds",
        9,
        "--teacher.kwargs",
        '{"depth": [1, 2]}',
        "--teacher.mean",
        0.5,
        "--teacher.std",
        0.25,
    ]
    with pytest.raises(SystemExit) as stopped:
        parse(*flags, "--print_config")
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert yaml.safe_load(printed)["method"]["rounds"] == 9
    assert parse("--config", write(tmp_path / "c.yaml", printed)) == parse(*flags)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("metod: {rounds: 3}", r"c\.yaml sets metod, which does not exist\. Did you mean 'method'\?"),
        ("method: {rounds: many}", r"c\.yaml sets method\.rounds to 'many'; it must be a whole number\."),
        ("method: {rounds: 0}", r"c\.yaml: method\.rounds is 0; it must be positive"),
        ("[1, 2]", "holds a list"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(text, message, tmp_path):
    with pytest.raises(ConfigurationError, match=message):
        parse("--config", write(tmp_path / "c.yaml", text))


def test_an_unknown_preset_is_refused_with_the_nearest_name():
    with pytest.raises(ConfigurationError, match=r"no preset 'shrt'\. Did you mean 'short'\?"):
        parse("--preset", "shrt")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--metod.rounds", "3"], "--method.rounds"),
        (["--method.rounds", "-1"], "rounds is -1"),
        (["--method.rounds", "1.5"], "--method.rounds"),
        (["--method.batch_size", "0"], "batch_size is 0"),
        (["--method.activation.weight", "-0.1"], "weight is -0.1"),
        (["--method.activation.weight", "nan"], "weight is nan"),
        (["--method.interpolation.weight", "inf"], "weight is inf"),
        (["--method.activation.margin", "0"], "margin is 0"),
        (["--method.temperature", "-2"], "temperature is -2"),
        (["--method.discrepancy", "l3"], "l3"),
        (["--optimizer.student.lr", "0"], "lr is 0"),
        (["--optimizer.student.milestones", "0.5", "0.2"], "milestones"),
        (["--teacher.kwargs", "[1]"], "JSON object"),
        (["--teacher.kwargs", "{depth: 20}"], "{depth: 20} is not JSON such as '{\"depth\": 20}'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_flag_that_does_not_fit_is_refused_with_its_value(flags, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(*flags)
    assert stopped.value.code == 2
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_a_value_that_does_not_fit_at_the_outermost_level_is_refused_too():
    with pytest.raises(ConfigurationError, match="seed is -1"):
        parse("--seed", -1)


def test_a_resumed_run_takes_its_saved_settings_and_no_others(tmp_path):
    saved = DistillConfig(seed=5, method=MethodConfig(rounds=3))
    (tmp_path / SETTINGS_FILE).write_text(to_yaml(saved))
    assert parse("--resume", tmp_path) == saved
    assert parse("--resume", tmp_path, "--seed", 5) == saved
    assert command("--resume", tmp_path).folder() == tmp_path
    with pytest.raises(ConfigurationError, match="Changed: seed 5 → 6"):
        command("--resume", tmp_path, "--seed", 6).folder()
    with pytest.raises(ConfigurationError, match="Changed: seed 5 → 1"):
        command("--resume", tmp_path, "--preset", "short").folder()
    with pytest.raises(ConfigurationError, match="holds no config.yaml"):
        parse("--resume", tmp_path / "elsewhere")


def test_where_memory_runs_out_the_command_says_what_to_do(capsys):
    def ends(command):
        with pytest.raises(SystemExit) as ended:
            cli.run(command)
        return ended.value.code, capsys.readouterr().err

    def on_a_gpu():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    for command, said in (
        (lambda: torch.empty(10**15), "4,000,000.0 GB were asked for at once. Take smaller batches"),
        (lambda: bytearray(1 << 60), "without a message"),
        (on_a_gpu, "Tried to allocate 2.00 GiB. Take smaller batches"),
    ):
        code, message = ends(command)
        assert code == 2
        assert message.startswith("\nThere is not enough memory: ")
        assert said in message
    with pytest.raises(RuntimeError, match="must match"):  # another fault of the program keeps its traceback
        cli.run(lambda: torch.zeros(2) + torch.zeros(3))


def test_schedules():
    assert OptimizerConfig(schedule="constant").factor(0.9) == 1
    cosine = OptimizerConfig(schedule="cosine")
    assert (cosine.factor(0), cosine.factor(0.5), cosine.factor(1)) == (1, pytest.approx(0.5), 0)
    step = OptimizerConfig(schedule="step", milestones=(0.2, 0.4), decay=0.1)
    assert [step.factor(p) for p in (0.19, 0.2, 0.41)] == pytest.approx([1, 0.1, 0.01])


class TestStreams:
    """With every kind of shell the command works, or says in one line why not."""

    @pytest.fixture
    def stdout(self, monkeypatch):
        """Reads what a command writes to a pipe of an encoding; closed at once where asked."""
        opened = []

        def connect(encoding: str, *, closed: bool = False):
            reading, writing = os.pipe()
            os.set_blocking(reading, False)
            stream = os.fdopen(writing, "w", encoding=encoding)
            opened.append(stream)
            monkeypatch.setattr("sys.stdout", stream)
            if closed:
                os.close(reading)
            return lambda: os.read(reading, 65536)

        yield connect
        for stream in opened:
            stream.close()

    def ends(self, command) -> object:
        with pytest.raises(SystemExit) as stopped:
            cli.run(command)
        return stopped.value.code

    @pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
    def test_any_encoding_takes_any_text(self, stdout, encoding):
        read = stdout(encoding)
        assert self.ends(lambda: print("╭─ 8×8 → é │ 漢 \udce4")) == 0
        assert read().decode(encoding) == {
            "ascii": "+- 8x8 -> e | ? ?\n", "cp1252": "+- 8×8 -> é | ? ?\n", "utf-8": "╭─ 8×8 → é │ 漢 ?\n",
        }[encoding]  # fmt: skip

    def test_help_in_ascii(self, stdout):
        read = stdout("ascii")
        assert self.ends(lambda: parse("--help")) == 0
        assert read().decode("ascii").startswith("usage: ")

    def test_a_reader_that_has_enough_ends_nothing(self, stdout, capsys):
        stdout("utf-8", closed=True)
        assert self.ends(lambda: print("a" * 100_000)) == 0
        stdout("utf-8", closed=True)
        assert self.ends(lambda: Console().print("a\n" * 10_000)) == 0
        stdout("utf-8", closed=True)

        def fail():
            print("a" * 100)
            raise ConfigurationError("refused")

        assert self.ends(fail) == 2
        assert capsys.readouterr().err == "\nrefused\n"

    def test_without_any_stream(self, monkeypatch):
        monkeypatch.setattr("sys.stdout", None)
        monkeypatch.setattr("sys.stderr", None)
        assert self.ends(lambda: parse("--help")) == 0

    def test_from_a_shell(self, tmp_path):
        command = f"{sys.executable} -m dfad.train --help | head -n 1"
        plain = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", "LC_ALL": "C", "PYTHONIOENCODING": "ascii"}
        done = subprocess.run(
            command, shell=True, cwd=tmp_path, env=plain, capture_output=True, text=True, timeout=HANGING
        )
        assert (done.stdout, done.stderr) == ("usage: python -m dfad.train [-h] [OPTIONS]\n", "")
