"""The campaign, on digits that stand in for CIFAR-10."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dfad.assembly import load_teacher
from dfad.config import TeacherConfig
from dfad.data import DataConfig, open_dataset
from dfad.data.evaluation import Evaluator
from dfad.distillation.distiller import Distiller
from dfad.distillation.estimate import Estimate
from dfad.errors import Interrupted
from tools.gpu import campaign, rehearsal

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> tuple[Path, Path, Path]:
    return rehearsal.make(tmp_path_factory.mktemp("data"))


BASE = campaign.SCALES["gpu"].base
WARM_UP = 2.0
COST = Estimate(
    1,
    1,
    1,
    flops_per_round=10**12,
    total_flops=10**15,
    peak_memory=1,
    seconds_per_round=0.5,
    total_seconds=WARM_UP + 0.5 * BASE.method.rounds,
)


@pytest.fixture
def run(data, tmp_path, monkeypatch):
    """The command in a folder, with two epochs or two rounds."""
    seen = []

    def two_rounds(config, teacher, evaluate, seconds, looks):
        seen.append((config, evaluate))
        fitted = replace(config, method=replace(config.method, rounds=2), selection=replace(config.selection, every=1))
        return fitted, COST

    monkeypatch.setattr(campaign, "fitting_epochs", lambda *_: 2)
    monkeypatch.setattr(campaign, "fitting_rounds", two_rounds)

    def command(what: str, *flags: str, archive: Path = data[0]) -> dict:
        folders = [f"--{name}={tmp_path / name}" for name in ("kept", "work", "result")]
        (tmp_path / "kept").mkdir(exist_ok=True)
        campaign.main([what, "--scale=rehearsal", "--seconds=300", f"--data={archive}", *folders, *flags])
        return json.loads((tmp_path / "result").read_text())

    command.seen = seen
    return command


def test_the_teacher_that_is_kept_is_the_one_that_is_measured(run, data, tmp_path):
    result = run("teacher")
    path = tmp_path / "kept" / "teacher.safetensors"
    teacher = load_teacher(TeacherConfig(checkpoint=path))
    evaluate = Evaluator(DataConfig("folder", data[0]), CPU, teacher.normalisation)
    assert result["accuracy"] == evaluate(teacher.network)
    assert result["accuracy_before_rounding"] == pytest.approx(result["accuracy"], abs=0.05)
    assert (result["epochs"], result["test_images"]) == (2, 80)
    assert str(tmp_path) not in json.dumps(result)
    assert str(data[0]) not in json.dumps(result)
    dtypes = {tensor.ndim: tensor.dtype for tensor in load_file(path).values()}
    assert (dtypes[4], dtypes[1]) == (torch.bfloat16, torch.float32)
    assert not (tmp_path / "work" / "teacher").exists()  # its checkpoints are needed no more


def test_a_student_that_is_stopped_goes_on(run, tmp_path, monkeypatch):
    run("teacher")
    run_round = Distiller.run_round

    def stopping(distiller):
        if distiller.round_index == 0:
            os.kill(os.getpid(), signal.SIGINT)
        return run_round(distiller)

    with monkeypatch.context() as patch:
        patch.setattr(Distiller, "run_round", stopping)
        with pytest.raises(Interrupted):
            run("student", "--arm=recipe without either part")
    (facts,) = (tmp_path / "work").glob("*either-part*.json")
    before = json.loads(facts.read_text())["seconds"]
    assert before > 0
    result = run("student", "--arm=recipe without either part")
    assert len(run.seen) == 1  # what fits is measured once
    assert result["rounds"] == 2
    assert result["seconds"] > before  # of both calls
    assert [look["round"] for look in result["curve"]] == [1, 2]
    assert result["curve"][-1]["seconds"] == pytest.approx(result["seconds"])
    assert result["curve"][-1]["accuracy"] == result["accuracy"]
    assert result["name"] == "jpeg: convnet, recipe without either part, 300 s"
    assert result["teraflop_per_second"] == 2
    assert result["settings"]["method"]["interpolation"]["weight"] == 0
    assert [path.suffix for path in (tmp_path / "kept").glob("*either-part*")] == [".png"]


def test_a_network_of_others_is_shown_images_as_it_knows_them(run, data):
    _, lossless, network = data
    result = run("student", f"--network={network}", archive=lossless)
    ((config, evaluate),) = run.seen
    shown = campaign.CIFAR10_RESNET20.teacher
    assert (evaluate.dataset.mean, evaluate.dataset.std) == (shown.mean, shown.std)
    assert config.student.factory == "resnet20"
    assert config.method.activation.weight > 0
    assert config.method.regularizers.batchnorm > 0
    assert (result["test_images"], result["rounds"]) == (80, 2)


@pytest.mark.parametrize(("seconds", "epochs"), [(0.1, 1), (5.6, 5), (1e6, 40)])
def test_as_many_epochs_as_fit(seconds, epochs, data, monkeypatch):
    monkeypatch.setattr(campaign, "timed", lambda run: 1.0)
    recipe = replace(campaign.SCALES["rehearsal"].recipe, data=DataConfig("folder", data[0]))
    # a second for each epoch, and one for a look after every tenth
    assert campaign.fitting_epochs(recipe, open_dataset(recipe.data), seconds) == epochs


@pytest.mark.parametrize(("seconds", "rounds", "every"), [(0.1, 4, 1), (12, 19, 5)])
def test_as_many_rounds_as_fit(seconds, rounds, every, monkeypatch):
    monkeypatch.setattr(campaign, "timed", lambda run: 0.1)
    monkeypatch.setattr(campaign, "estimate", lambda probe: COST)
    monkeypatch.setattr(campaign, "build_distiller", lambda *_: None)
    monkeypatch.setattr(campaign, "build_student", lambda *_: None)
    config, cost = campaign.fitting_rounds(BASE, None, None, seconds, looks=4)
    # two seconds for the generator's warm-up, half a second for each round, a tenth for each look and the last
    assert (config.method.rounds, config.selection.every, cost) == (rounds, every, COST)
    assert config.selection.bank_size == BASE.selection.bank_size
