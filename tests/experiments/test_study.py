"""Comparisons: every arm over the seeds, and the claims; finished runs are not repeated."""

import json
import multiprocessing
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dfad import cli, reproduce
from dfad.config import GeneratorConfig, InterpolationConfig, RecordingConfig, SelectionConfig, StudentConfig
from dfad.distillation.distiller import Distiller
from dfad.errors import ConfigurationError, DfadError
from dfad.experiments import study
from dfad.experiments.comparisons import (
    COMPARISONS,
    FULL,
    INHERITED,
    PLAIN,
    REAL_DATA,
    RECIPE_FULL,
    RECIPE_LONGER,
    Beats,
    Comparison,
    Reaches,
    Sooner,
    arms,
)
from dfad.experiments.study import judge
from dfad.presets import PRESETS
from dfad.supervised.recipes import RECIPES, NetworkConfig
from tests.conftest import threads, with_method
from tests.processes import HANGING, context

CHANNELS = {"channels": [4, 8, 16]}
ARMS = [PLAIN, FULL]


@pytest.fixture(scope="module")
def comparison() -> Iterator[Comparison]:
    """Two arms and the ceiling, in seconds."""
    base = replace(
        with_method(PRESETS["digits"], rounds=4, student_steps=2, batch_size=16),
        student=StudentConfig("convnet", CHANNELS | {"in_channels": 1}),
        generator=GeneratorConfig(noise_dim=8, width=4),
        selection=SelectionConfig(bank_size=16, every=2),
        recording=RecordingConfig(log_every=2, checkpoint_every=2),
    )
    tiny = Comparison(
        arms={name: arm for name, arm in arms(base).items() if name in ARMS},
        teacher="digits",
        ceiling=replace(RECIPES["digits"], network=NetworkConfig("convnet", CHANNELS), epochs=2),
        claims=(Beats(FULL, PLAIN), Reaches(FULL, accuracy=0.01), Sooner(FULL, PLAIN, 0.5), Beats(FULL, "absent")),
        published={PLAIN: 0.99},
    )
    COMPARISONS["tiny"] = tiny
    yield tiny
    del COMPARISONS["tiny"]


@pytest.fixture(scope="module")
def finished(comparison, tmp_path_factory) -> Path:
    """The folder of the comparison, all of it run on one thread; tests copy it before they change it."""
    folder = tmp_path_factory.mktemp("finished")
    with threads(1):
        run(folder, "--output", str(folder / "results" / "reproduce-tiny.json"), "--root", str(folder))
    return folder


def again(finished: Path, tmp_path: Path, *arguments) -> dict:
    """The comparison once more, over a copy of what is finished."""
    shutil.copytree(finished / "runs", tmp_path / "runs")
    return run(tmp_path, "--root", str(finished), *arguments)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Use the threads of the finished comparison, because their number changes the last bits."""
    with threads(1):
        yield


@pytest.fixture
def nothing_runs(monkeypatch) -> None:
    """Make every run that is not finished fail."""
    monkeypatch.setattr(study, "build_distiller", None)
    monkeypatch.setattr(study, "teach", None)


def record_in(folder: Path) -> dict:
    return json.loads((folder / "runs" / "comparison.json").read_text())


def run(tmp_path, *arguments) -> dict:
    reproduce.main(["tiny", "--seeds=2", "--device=cpu", "--run_dir", str(tmp_path / "runs"), *arguments])
    return record_in(tmp_path)


def timeless(record: dict) -> dict:
    """A record without what differs between two identical comparisons."""
    return json.loads(json.dumps(record), object_hook=lambda tree: {k: v for k, v in tree.items() if k != "seconds"})


def test_it_runs_every_arm_over_the_seeds_and_writes_what_they_show(finished):
    record = record_in(finished)
    assert record["settings"]["teacher"]["checkpoint"] is record["settings"]["data"]["root"] is None
    assert str(finished) not in json.dumps(record)
    assert json.loads((finished / "results" / "reproduce-tiny.json").read_text()) == record
    assert (finished / "runs" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert list(record["arms"]) == [*ARMS, REAL_DATA]
    for name, arm in record["arms"].items():
        accuracies = arm["accuracy"]["values"]
        assert len(accuracies) == 2
        assert arm["accuracy"]["mean"] == pytest.approx(sum(accuracies) / 2)
        assert arm["accuracy"]["std"] == pytest.approx(abs(accuracies[0] - accuracies[1]) / 2**0.5)
        if name != REAL_DATA:
            assert arm["images"] == 4 * 3 * 16
            assert arm["curve"]["images"] == [2 * 3 * 16, 4 * 3 * 16]
            mixed_too = 1 if name == PLAIN else 2
            assert arm["student_images"] == mixed_too * 4 * 2 * 16
            assert arm["curve"]["student_images"] == [mixed_too * 2 * 2 * 16, mixed_too * 4 * 2 * 16]
            assert 0 < arm["petaflop"] < 1e-3
            assert arm["curve"]["mean"][-1] == pytest.approx(arm["accuracy"]["mean"])
    assert record["arms"][PLAIN]["reproduced"] is False
    assert "published" not in record["arms"][FULL]
    assert len(record["claims"]) == 3  # the one about an arm that was not run is left out


def test_what_is_finished_is_only_read_and_shown(finished, tmp_path, nothing_runs, one_thread, capsys):
    assert again(finished, tmp_path) == record_in(finished)
    printed = capsys.readouterr().out
    assert "missed" in printed
    assert printed.count("hold") == 3


def test_a_stopped_run_goes_on(finished, tmp_path, monkeypatch, one_thread):
    run_round = Distiller.run_round

    def stopping(self):
        if self.round_index == 3:
            raise KeyboardInterrupt
        return run_round(self)

    with monkeypatch.context() as patch:
        patch.setattr(Distiller, "run_round", stopping)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, "--arms", PLAIN)
    resumed = run(tmp_path, "--arms", PLAIN)
    assert timeless(resumed)["arms"][PLAIN] == timeless(record_in(finished))["arms"][PLAIN]


def test_several_processes_come_to_the_same(finished, tmp_path, monkeypatch, one_thread):
    monkeypatch.setattr(study.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(study.multiprocessing, "get_context", lambda _: context())
    together = run(tmp_path, "--workers=2", "--arms", PLAIN)
    assert timeless(together)["arms"][PLAIN] == timeless(record_in(finished))["arms"][PLAIN]


PARENT = """
import multiprocessing, time
from dfad.experiments import study
from dfad.runs.interruption import stop_requests

def work(number):
    study.run_once = loop  # a run that never ends by itself
    return study._run_of_parent(number)

def loop(number):
    with stop_requests() as stop:
        print("started", number, flush=True)
        while not stop.signal_number:
            time.sleep(0.05)
    print("saved", number, flush=True)

if __name__ == "__main__":
    started = (1, multiprocessing.get_context("spawn").Value("i", 0))
    context = multiprocessing.get_context("spawn")
    with study.ProcessPoolExecutor(2, context, study._start_process, started) as pool:
        list(pool.map(work, range(4)))
"""


def test_processes_save_their_runs_and_stop_when_the_one_that_started_them_is_killed(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert sorted(parent.stdout.readline() for _ in range(2)) == ["started 0\n", "started 1\n"]
    parent.kill()
    # to the end of the stream, which the last process closes
    rest, _ = parent.communicate(timeout=HANGING)
    assert sorted(rest.splitlines()) == ["saved 0", "saved 1"]


@pytest.mark.parametrize("flag", ["--workers", "--processes"])
def test_the_number_of_processes_has_two_flags(flag):
    assert cli.parse_flags(reproduce.Reproduce, ["digits", flag, "3"]).workers == 3


def test_several_processes_take_the_gpus_in_turns(monkeypatch, one_thread):
    taken: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    started = multiprocessing.get_context("spawn").Value("i", 0)
    for _ in range(3):
        study._start_process(1, started)
    assert taken == [0, 1, 0]


def test_the_record_tells_the_commit_that_was_begun_with(finished, tmp_path, monkeypatch):
    commits = ["before", "after"]
    monkeypatch.setattr(reproduce, "machine", lambda: {"commit": commits[0]})

    def during(runs, processes):
        commits.pop(0)
        return [study.run_once(run) for run in runs]

    monkeypatch.setattr(reproduce, "execute", during)
    assert again(finished, tmp_path, "--arms", PLAIN)["machine"] == {"commit": "before"}


def test_some_arms_alone(finished, tmp_path, nothing_runs):
    record = again(finished, tmp_path, "--arms", FULL)
    assert list(record["arms"]) == [FULL]
    assert len(record["claims"]) == 1


def test_runs_of_other_settings_are_not_mixed_in(comparison, finished, tmp_path, monkeypatch):
    other = replace(comparison, arms={name: with_method(arm, batch_size=8) for name, arm in comparison.arms.items()})
    monkeypatch.setitem(COMPARISONS, "tiny", other)
    with pytest.raises(ConfigurationError, match="batch_size 16 → 8"):
        again(finished, tmp_path, "--arms", PLAIN)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["digit"], "no comparison 'digit'. Did you mean 'digits'"),
        (["digits", "--arms", "regularised"], "no arm 'regularised'. Did you mean 'regularized'"),
        (["cifar10-resnet20"], "trains no teacher of its own. Give --teacher FILE"),
    ],
)
def test_what_cannot_be_compared(arguments, message):
    with pytest.raises(DfadError, match=message) as refused:
        reproduce.main(arguments)
    assert refused.value.exit_code == 2


def arm(*accuracies: float, curve: tuple[float, ...] = (), images: int = 100) -> dict:
    points = [images * (i + 1) // len(curve) for i in range(len(curve))]
    return {
        "accuracy": study.spread(accuracies), "images": images, "curve": {"images": points, "mean": list(curve)}
    }  # fmt: skip


@pytest.mark.parametrize(
    ("claim", "ours", "theirs", "holds"),
    [
        (Beats("a", "b"), arm(0.9, 0.92), arm(0.88, 0.9), True),  # by 2.0, standard error 1.4
        (Beats("a", "b"), arm(0.9, 0.92), arm(0.89, 0.91), False),  # by 1.0
        (Beats("a", "b"), arm(0.8, 0.8), arm(0.9, 0.9), False),
        (Reaches("a", accuracy=0.91), arm(0.9, 0.92), None, True),
        (Reaches("a", accuracy=0.92), arm(0.9, 0.92), None, False),
        (Reaches("a", share_of_teacher=0.95), arm(0.9, 0.92), None, True),  # of a teacher at 95 %
        (Reaches("a", share_of_teacher=0.97), arm(0.9, 0.92), None, False),
        (Sooner("a", "b", 0.5), arm(0.9, curve=(0.5, 0.7, 0.8, 0.9)), arm(0.7), True),
        (Sooner("a", "b", 0.5), arm(0.9, curve=(0.5, 0.6, 0.8, 0.9)), arm(0.7), False),
        (Sooner("a", "b", 0.5), arm(0.6, curve=(0.5, 0.6)), arm(0.7), False),
    ],
)
def test_claims_are_judged(claim, ours, theirs, holds):
    verdict = judge(claim, {"a": ours, "b": theirs} if theirs else {"a": ours}, teacher_accuracy=0.95)
    assert verdict["holds"] is holds


def test_one_seed_has_no_standard_error():
    assert judge(Beats("a", "b"), {"a": arm(0.9), "b": arm(0.8)}, teacher_accuracy=0.95) is None


@pytest.mark.parametrize("name", COMPARISONS)
def test_arms_differ_in_the_parts_of_the_method_alone(name):
    compared = COMPARISONS[name].arms
    base = compared.get(FULL) or compared.get(RECIPE_FULL) or next(iter(compared.values()))
    parts = {"activation", "feature_matching", "interpolation", "regularizers", "adversarial", "random_fields"}
    for config in compared.values():
        same = {part: getattr(base.method, part) for part in parts}
        if config in (compared.get(RECIPE_LONGER), compared.get(RECIPE_FULL + INHERITED)):
            continue
        student = base.student if name == "cifar10-smaller" or name.endswith("inherited") else config.student
        assert replace(config, student=student, method=replace(config.method, **same)) == base
        assert config.method.images_per_round == base.method.images_per_round
        mixing = config.method.interpolation
        if FULL not in compared and not (mixing.weight and mixing.step == "joint"):  # no further student-images
            assert config.method.student_images_per_round == base.method.student_images_per_round
    for claim in COMPARISONS[name].claims:
        assert {claim.arm, getattr(claim, "other", claim.arm)} <= set(compared)


def test_asking_the_teacher_about_mixed_images_counts_as_queries(config):
    asked = with_method(config, interpolation=InterpolationConfig(weight=1.0, labels="teacher")).method
    assert config.method.queries_per_round == config.method.images_per_round == 3 * 16
    assert asked.queries_per_round == 3 * 16 + 2 * 16
