"""From defaults, preset, file and flags to one configuration."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pytest
import yaml

from dfad import cli
from dfad.config import DistillConfig, MethodConfig, OptimizerConfig
from dfad.errors import ConfigurationError
from dfad.runs.settings import SETTINGS_FILE, to_yaml

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


def test_schedules():
    assert OptimizerConfig(schedule="constant").factor(0.9) == 1
    cosine = OptimizerConfig(schedule="cosine")
    assert (cosine.factor(0), cosine.factor(0.5), cosine.factor(1)) == (1, pytest.approx(0.5), 0)
    step = OptimizerConfig(schedule="step", milestones=(0.2, 0.4), decay=0.1)
    assert [step.factor(p) for p in (0.19, 0.2, 0.41)] == pytest.approx([1, 0.1, 0.01])
