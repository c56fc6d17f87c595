"""Settings to and from YAML, without a parser of flags."""

import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import pytest
import yaml

from dfad.config import DistillConfig, Keywords, MethodConfig
from dfad.errors import ConfigurationError
from dfad.presets import PRESETS, TrainConfig
from dfad.runs.settings import override, read_yaml, require_unchanged, saved_settings, to_yaml
from dfad.supervised.recipes import RECIPES, Recipe

BEFORE = Path(__file__).parents[1] / "fixtures" / "run-of-0.1.0"


@dataclass(frozen=True)
class Inner:
    rate: float = 1.0

    def __post_init__(self) -> None:
        if self.rate <= 0:
            raise ValueError(f"rate is {self.rate}; it must be positive")


@dataclass(frozen=True)
class Example:
    flag: bool = False
    count: int = 1
    rate: float = 1.0
    name: str | None = None
    switch: Literal["auto", "on", "off"] = "auto"
    channels: Literal[1, 3] | None = None
    size: int | None = None
    path: Path | None = None
    names: tuple[str, ...] = ()
    pair: tuple[float, float] = (0.1, 0.2)
    keywords: Keywords = field(default_factory=dict)
    inner: Inner = Inner()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("flag: yes", {"flag": True}),
        ("count: 3", {"count": 3}),
        ("count: '3'", {"count": 3}),
        ("count: 1e3", {"count": 1000}),
        ("count: 1000.0", {"count": 1000}),
        ("count: '9007199254740993'", {"count": 2**53 + 1}),
        ("rate: 1e-3", {"rate": 0.001}),
        ("rate: 2", {"rate": 2.0}),
        ("name: teacher", {"name": "teacher"}),
        ("name: null", {"name": None}),
        ("name: None", {"name": None}),
        ("switch: off", {"switch": "off"}),
        ("switch: 'on'", {"switch": "on"}),
        ("switch: on", {"switch": "on"}),
        ("channels: 3", {"channels": 3}),
        ("channels: '3'", {"channels": 3}),
        ("channels: null", {"channels": None}),
        ("size: 32", {"size": 32}),
        ("path: a/b", {"path": Path("a/b")}),
        ("names: [a, b]", {"names": ("a", "b")}),
        ("names: []", {"names": ()}),
        ("names: a", {"names": ("a",)}),
        ("pair: [1e-1, 3]", {"pair": (0.1, 3.0)}),
        ("keywords: {depth: [1, {a: 2}]}", {"keywords": {"depth": [1, {"a": 2}]}}),
        ("inner: {rate: 2}", {"inner": Inner(2.0)}),
        ("inner: {}", {}),
    ],
)
def test_a_value_becomes_what_its_annotation_asks(text, expected):
    settings = override(Example(), yaml.safe_load(text), "c.yaml")
    assert settings == replace(Example(), **expected)
    for name, value in expected.items():
        assert type(getattr(settings, name)) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("flagg: yes", "c.yaml sets flagg, which does not exist. Did you mean 'flag'? Known there: flag, count"),
        ("3: yes", "c.yaml sets 3, which does not exist."),
        ("inner: {rat: 1}", "c.yaml sets inner.rat, which does not exist. Did you mean 'rate'? Known there: rate."),
        ("inner: 3", "c.yaml sets inner to 3; it must hold 'name: value' lines."),
        ("inner: {rate: 0}", "c.yaml: inner.rate is 0.0; it must be positive."),
        ("flag: 1", "c.yaml sets flag to 1; it must be true or false."),
        ("flag: 'yes'", "c.yaml sets flag to 'yes'; it must be true or false."),
        ("count: 1.5", "c.yaml sets count to 1.5; it must be a whole number."),
        ("count: true", "c.yaml sets count to True; it must be a whole number."),
        ("count: .inf", "c.yaml sets count to inf; it must be a whole number."),
        ("count: null", "c.yaml sets count to None; it must be a whole number."),
        ("size: big", "c.yaml sets size to 'big'; it must be a whole number or null."),
        ("rate: fast", "c.yaml sets rate to 'fast'; it must be a number."),
        ("rate: false", "c.yaml sets rate to False; it must be a number."),
        ("rate: [1]", "c.yaml sets rate to [1]; it must be a number."),
        ("name: 3", "c.yaml sets name to 3; it must be text or null. Put it in quotes."),
        ("path: 3", "c.yaml sets path to 3; it must be text or null. Put it in quotes."),
        ("switch: atuo", "c.yaml sets switch to 'atuo'; it must be one of auto, on, off. Did you mean 'auto'?"),
        ("channels: 2", "c.yaml sets channels to 2; it must be one of 1, 3 or null."),
        ("names: [1]", "c.yaml sets names to [1]; it must be text. Put it in quotes."),
        ("pair: [1]", "c.yaml sets pair to [1]; it must be a list of 2."),
        ("pair: [1, x]", "c.yaml sets pair to [1, 'x']; it must be a number."),
        ("keywords: [1]", "c.yaml sets keywords to [1]; it must be 'name: value' lines."),
        ("keywords: {1: 2}", "c.yaml sets keywords to {1: 2}; it must be 'name: value' lines."),
    ],
)
def test_what_does_not_fit_is_refused_with_its_place_and_what_would(text, message):
    with pytest.raises(ConfigurationError) as refused:
        override(Example(), yaml.safe_load(text), "c.yaml")
    assert str(refused.value).startswith(message)


@pytest.mark.parametrize(("text", "message"), [("[1, 2]", "holds a list"), ("a: [", "is not YAML")])
def test_a_file_that_holds_no_settings_is_refused(text, message, tmp_path):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigurationError, match=message):
        read_yaml(tmp_path / "c.yaml")


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match=r"nowhere\.yaml cannot be read"):
        read_yaml(tmp_path / "nowhere.yaml")


def test_an_empty_file_changes_nothing(tmp_path):
    (tmp_path / "c.yaml").write_text("# nothing\n")
    assert read_yaml(tmp_path / "c.yaml") == {}


@pytest.mark.parametrize(
    "settings", [*PRESETS.values(), *RECIPES.values()], ids=[*PRESETS, *(f"teacher {name}" for name in RECIPES)]
)
def test_every_setting_survives_the_file(settings, tmp_path):
    (tmp_path / "c.yaml").write_text(to_yaml(settings))
    assert override(type(settings)(), read_yaml(tmp_path / "c.yaml"), "file") == settings


def test_settings_of_before_are_read_and_new_ones_take_their_defaults(tmp_path):
    saved = saved_settings(BEFORE, TrainConfig())
    assert (saved.method.rounds, saved.teacher.checkpoint, saved.engine.compile) == (
        6,
        Path("teacher.safetensors"),
        "off",
    )
    assert saved.student.kwargs == {"channels": [4, 8, 8], "in_channels": 1}
    tree = read_yaml(BEFORE / "config.yaml")
    del tree["collapse"], tree["method"]["temperature"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    older = saved_settings(tmp_path, TrainConfig())
    assert older == replace(saved, method=replace(saved.method, temperature=1.0))


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="holds no config.yaml"):
        saved_settings(tmp_path, Recipe())


def test_a_run_of_another_command_is_refused(tmp_path):
    (tmp_path / "config.yaml").write_text(to_yaml(Recipe()))
    with pytest.raises(ConfigurationError, match="the run of another command.*network.*dfad teacher"):
        saved_settings(tmp_path, TrainConfig())


def test_changed_settings_are_named():
    saved = DistillConfig(seed=5, method=MethodConfig(rounds=3))
    with pytest.raises(ConfigurationError, match=r"Changed: seed 5 → 6; method\.rounds 3 → 2\."):
        require_unchanged(Path("run"), saved, DistillConfig(seed=6, method=MethodConfig(rounds=2)))
    assert not require_unchanged(Path("run"), saved, saved)
    assert require_unchanged(Path("run"), saved, DistillConfig(seed=5, method=MethodConfig(rounds=4)))


def test_the_library_reads_settings_without_a_parser_of_flags():
    code = (
        "import sys; sys.modules['tyro'] = None\n"
        "import dfad.assembly, dfad.distillation.distiller, dfad.experiments.study, dfad.supervised.teaching\n"
        "assert 'dfad.cli' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
