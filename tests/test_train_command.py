"""``python -m dfad.train`` as users see it: output, files, errors and recovery."""

import json
import os
import pty
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from dfad import cli, train
from dfad.errors import DfadError, ExportError
from dfad.models.factory import build
from dfad.models.model_file import load_model
from dfad.runs import checkpoint
from dfad.runs.recorder import read_history
from dfad.runs.settings import SETTINGS_FILE, to_tree
from tests import processes
from tests.conftest import RUN_FILES
from tests.models.test_loading import Exploit
from tests.processes import Process

SMALL = [
    "--method.rounds=4",
    "--method.student_steps=1",
    "--method.batch_size=8",
    "--generator.noise_dim=4",
    "--generator.width=4",
    "--selection.bank_size=16",
    "--selection.every=2",
    "--recording.log_every=1",
    "--recording.checkpoint_every=1",
]
"""The default command with little to do."""

NETWORKS = ("student", "student_best", "generator")


def program(*given: object) -> list[str]:
    return ["-m", "dfad.train", *map(str, given)]


def environment(**changes: str) -> dict[str, str]:
    plain = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR", "TERM")}
    return plain | {"OMP_NUM_THREADS": "1"} | changes


def run(*given: object, cwd: Path, **changes: str) -> subprocess.CompletedProcess[str]:
    return processes.run(program(*given), cwd, environment(**changes))


def start(*given: object, cwd: Path) -> Process:
    return Process(program(*given), cwd, environment())


def lines_of(path: Path) -> int:
    return path.read_text().count("\n") if path.exists() else 0


def wait_until(condition, process: Process, every: float = 0.0005) -> None:
    """Wait until a condition, checked every some seconds, holds or the process has ended."""
    deadline = time.monotonic() + processes.HANGING
    while not condition() and process.poll() is None:
        assert time.monotonic() < deadline, "the process neither went on nor ended"
        time.sleep(every)


def recorded_rounds(folder: Path) -> list[int]:
    return [json.loads(line)["round"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same_networks(folder: Path, expected: Path) -> None:
    for name in NETWORKS:
        found, wanted = load_file(folder / f"{name}.safetensors"), load_file(expected / f"{name}.safetensors")
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key], wanted[key]) for key in wanted), name


def test_the_default_command(tmp_path):
    command = [sys.executable, *program("--fused", *SMALL)]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=processes.HANGING
    )
    assert done.returncode == 0, done.stderr
    for row in ("teacher", "student", "accuracy", "agreement", "parameters", "images generated", "rounds per second"):
        assert row in done.stdout
    assert re.search(r"parameters\W+94,186\W+24,058", done.stdout)
    assert re.search(rf"images generated\W+{4 * 2 * 8}\b", done.stdout)
    assert re.search(r"│ seconds\W+\d+\.\d", done.stdout)
    assert "INFO" not in done.stdout
    assert len(re.findall(r"Loss kernels: .*cpp.*, on cpu\.", done.stderr)) == 1
    assert re.search(r"Round 4/4 .*agreement .*accuracy .*student .*generator .*rounds/s ", done.stderr)
    assert "\x1b" not in done.stdout + done.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("digits-")
    assert {path.name for path in folder.iterdir()} == RUN_FILES
    assert recorded_rounds(folder) == [1, 2, 3, 4]
    result = json.loads((folder / "result.json").read_text())
    assert result["rounds"] == 4
    assert result["captured"] is False
    assert 0 <= result["accuracy"] <= 1


def test_without_fused_kernels_the_log_says_so(tmp_path, command):
    assert "Loss kernels: PyTorch reference, on cpu." in command("--no_fused", *SMALL, "--method.rounds=1").stderr


class Outcome:
    """The result of a command that ran in this process."""

    def __init__(self, exit_code: int, stdout: str, stderr: str) -> None:
        self.exit_code, self.stdout, self.stderr = exit_code, stdout, stderr


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Runs the command in this process, from an empty folder."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(sys, "path", list(sys.path))

    def call(*given: object) -> Outcome:
        with pytest.raises(SystemExit) as stopped:
            cli.run(lambda: train.main([str(argument) for argument in given]))
        captured = capsys.readouterr()
        return Outcome(int(stopped.value.code or 0), captured.out, captured.err)

    return call


SIGNALLED = """
import os, sys
from dfad import cli, train
from dfad.distillation.distiller import Distiller
number, during, *arguments = sys.argv[1:]
run_round = Distiller.run_round
def signalled(distiller):
    if distiller.round_index == int(during):
        os.kill(os.getpid(), int(number))
    return run_round(distiller)
Distiller.run_round = signalled
cli.run(lambda: train.main(arguments))
"""
"""The command, which gets a signal in the round after a given one."""

ROUNDS = 20
RUN = (f"--method.rounds={ROUNDS}", "--no_evaluate")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    done = run(*SMALL, *RUN, "--run_dir=run", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "run"


class TestInterrupted:
    def test_killed_at_any_moment_and_resumed_it_ends_with_the_same_bits(self, whole, tmp_path):
        random_ = random.Random(2102_11638)
        folder = tmp_path / "run"
        temporary = folder / (checkpoint.NAME + ".tmp")
        some_round = random_.randint(2, 6)
        moments = {
            "set-up": folder.exists,
            "a round": lambda: lines_of(folder / "metrics.jsonl") >= some_round,
            "writing a checkpoint": lambda: lines_of(folder / "metrics.jsonl") >= 8 and temporary.exists(),
            "the last things": lambda: (folder / "generator.safetensors").exists(),
        }
        for name, reached in moments.items():
            started = (folder / SETTINGS_FILE).exists()
            given = ["--resume=run"] if started else [*SMALL, *RUN, "--run_dir=run"]
            process = start(*given, cwd=tmp_path)
            wait_until(reached, process)
            time.sleep(random_.uniform(0, 0.02))
            process.kill()
            _, errors = process.communicate()
            assert process.returncode in (-signal.SIGKILL, 0), f"{name}: {errors}"
        done = run("--resume=run", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert_same_networks(folder, whole)
        assert recorded_rounds(folder) == list(range(1, ROUNDS + 1))

    def test_asked_to_stop_it_writes_a_checkpoint_and_can_be_resumed(self, whole, tmp_path):
        folder = tmp_path / "run"
        given = [*SMALL, *RUN, "--run_dir=run"]
        for signal_, during in ((signal.SIGINT, 2), (signal.SIGTERM, 5)):
            words = ["-c", SIGNALLED, str(int(signal_)), str(during), *given]
            stopped = processes.run(words, tmp_path, environment())
            assert stopped.returncode == 128 + signal_, stopped.stderr
            assert f"Stopped after round {during + 1} of {ROUNDS}. Continue with --resume run." in stopped.stderr
            assert "Traceback" not in stopped.stderr
            assert checkpoint.load(folder)["round"] == during + 1
            given = ["--resume=run"]
        done = run("--resume=run", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert_same_networks(folder, whole)
        assert recorded_rounds(folder) == list(range(1, ROUNDS + 1))

    def test_the_saved_settings_are_the_resolved_ones_and_reproduce_the_run(self, whole, command, tmp_path):
        saved = yaml.safe_load((whole / "config.yaml").read_text())
        assert saved["method"]["rounds"] == ROUNDS
        assert saved["method"]["interpolation"] == to_tree(train.PRESETS["digits"])["method"]["interpolation"]
        printed = command("--config", whole / "config.yaml", "--print_config")
        assert (printed.exit_code, printed.stdout) == (0, (whole / "config.yaml").read_text())
        again = run("--config", whole / "config.yaml", "--run_dir=again", cwd=tmp_path)
        assert again.returncode == 0, again.stderr
        assert_same_networks(tmp_path / "again", whole)


@pytest.fixture(scope="module")
def short(tmp_path_factory) -> Path:
    """The folder of a finished run of four rounds; tests copy it."""
    folder = tmp_path_factory.mktemp("short")
    done = run(*SMALL, "--no_evaluate", "--run_dir=run", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "run"


class TestExtended:
    """``--resume RUN --method.rounds N`` goes on with a run, a finished one too."""

    def test_a_finished_run_goes_on_as_one_of_the_new_length(self, short, command):
        shutil.copytree(short, "run")
        Path("run/export").mkdir()
        bank = checkpoint.load(Path("run"))["bank"]
        slow = [json.dumps(record | {"rounds_per_second": 1e-3}) for record in read_history(short)]
        Path("run/metrics.jsonl").write_text("\n".join(slow) + "\n")
        extended = command("--resume=run", "--method.rounds=7")
        assert extended.exit_code == 0, extended.stderr
        assert "run is extended: its learning rates go on as those of a run of the new length" in extended.stderr
        assert "run/export holds the student as it was before" in " ".join(extended.stderr.split())
        assert recorded_rounds(Path("run")) == [1, 2, 3, 4, 5, 6, 7]
        assert yaml.safe_load(Path("run/config.yaml").read_text())["method"]["rounds"] == 7
        result = json.loads(Path("run/result.json").read_text())
        assert result["rounds"] == 7
        assert result["seconds"] > 4 / 1e-3  # of both processes
        assert result["rounds_per_second"] == pytest.approx(7 / result["seconds"])
        state = checkpoint.load(Path("run"))
        assert state["round"] == 7
        assert all(torch.equal(*pair) for pair in zip(bank["images"], state["bank"]["images"], strict=True))
        rate = state["student_optimizer"]["param_groups"][0]["lr"]
        planned = train.PRESETS["digits"].optimizer.student
        assert float(rate) == pytest.approx(planned.lr * planned.factor(6 / 7), rel=1e-5)
        result = Path("run/result.json").read_text()
        again = command("--resume=run")
        assert (again.exit_code, recorded_rounds(Path("run"))[-1]) == (0, 7)
        assert Path("run/result.json").read_text() == result  # with the times of the processes that ran the rounds

    def test_cut_and_resumed_it_ends_with_the_same_bits(self, short, command):
        for name in ("one", "two"):
            shutil.copytree(short, name)
        assert command("--resume=one", "--method.rounds=9").exit_code == 0
        assert command("--resume=two", "--method.rounds=9").exit_code == 0
        Path("two/checkpoint.pt").unlink()  # as a kill in round 9 leaves it
        Path("two/checkpoint-previous.pt").rename("two/checkpoint.pt")
        assert command("--resume=two").exit_code == 0
        assert_same_networks(Path("one"), Path("two"))

    @pytest.mark.parametrize("given", [["--method.rounds=3"], ["--method.rounds=9", "--seed=1"]])
    def test_nothing_else_changes(self, given, short, command):
        shutil.copytree(short, "run")
        before = Path("run/config.yaml").read_bytes()
        refused = command("--resume=run", *given)
        assert refused.exit_code == 2
        assert "Only --method.rounds may be raised." in refused.stderr
        assert Path("run/config.yaml").read_bytes() == before

    def test_the_end_says_whether_it_improved_and_how_to_go_on(self, command, monkeypatch):
        ended = command(*SMALL, "--no_evaluate", "--run_dir=run")
        assert "Agreement was measured too seldom" in ended.stderr
        monkeypatch.setattr(train, "improves", lambda history: True)
        ended = command(*SMALL, "--no_evaluate", "--run_dir=other")
        assert "To go on: dfad train --resume other --method.rounds 8" in ended.stderr


class TestBadInput:
    """Errors: one paragraph on standard error, the documented exit code, and no files."""

    @pytest.mark.parametrize(
        ("given", "exit_code", "words"),
        [
            (["--preset=digit"], 2, ["no preset 'digit'", "Did you mean 'digits'?"]),
            (["--metod.rounds=3"], 2, ["--metod.rounds", "--method.rounds"]),
            (["--method.batch_size=0"], 2, ["batch_size is 0", "2 or more"]),
            (["--method.activation.weight=-1"], 2, ["weight is -1", "not negative"]),
            (["--method.interpolation.weight=nan"], 2, ["weight is nan", "finite"]),
            (["--method.regularizers.diversity=inf"], 2, ["diversity is inf", "finite"]),
            (["--method.activation.margin=-0.5"], 2, ["margin is -0.5", "positive"]),
            (["--teacher.mean=nan", "--teacher.std=1"], 2, ["mean is (nan,)", "finite"]),
            (["--method.temperature=0"], 2, ["temperature is 0", "positive"]),
            (["--method.rounds=many"], 2, ["--method.rounds", "many"]),
            (["--device=cuda:99"], 2, ["'cuda:99' is not available", "--device auto"]),
            (["--device=abacus"], 2, ["no device 'abacus'", "cpu"]),
            (["--config=nowhere.yaml"], 2, ["nowhere.yaml cannot be read"]),
            (["--resume=nowhere"], 2, ["nowhere holds no config.yaml", "Name the folder of a run."]),
            (["--teacher.recipe=digit"], 2, ["no teacher recipe 'digit'", "Did you mean 'digits'?"]),
            (["--teacher.factory=no.where:net", "--teacher.checkpoint=w.pt"], 3, ["no.where:net", "PYTHONPATH"]),
            (["--teacher.factory=builtins:dict", "--teacher.checkpoint=w.pt"], 3, ["returned a dict", "nn.Module"]),
            (["--teacher.checkpoint=nowhere.safetensors"], 3, ["nowhere.safetensors does not exist"]),
            (["--teacher.checkpoint=nowhere.pt"], 3, ["nowhere.pt does not exist"]),
            (["--teacher.checkpoint=thesis"], 3, ["thesis is a folder", "No file in it ends in"]),
            (["--preset=own", "--student.factory=convnet"], 3, ["--teacher.recipe NAME, one of digits, mnist"]),
            (["--preset=own", "--teacher=lenet5"], 3, ["The teacher lenet5 has no trained weights. Give --teacher."]),
            (["--preset=mnist"], 3, ["python -m dfad.teacher --preset mnist --data.root FOLDER",
                                     "--teacher.checkpoint runs/mnist-teacher/teacher.safetensors"]),
            (["--teacher.mean", "0.5", "0.5", "--teacher.std", "1", "1"], 3, ["mean (0.5, 0.5)", "1 channels"]),
            (["--data.bits=17"], 2, ["bits is 17", "between 1 and 16"]),
            (["--student.factory=convnt"], 3, ["no network 'convnt'", "Did you mean 'convnet'?"]),
            (["--student.kwargs={\"num_classes\": 9, \"in_channels\": 1}"], 3, ["9 classes", "teacher 10"]),
            (["--student.kwargs={\"in_channels\": 3}"], 3, ["does not take the teacher's images (1, 8, 8)"]),
            (["--student.checkpoint=nowhere.pt"], 3, ["nowhere.pt does not exist", "safetensors"]),
            (["--run_dir=file/run"], 4, ["file is a file", "--run_dir"]),
            (["--run_dir=/proc/run"], 4, ["/proc/run cannot be created", "--run_dir"]),
            (["--run_dir=thesis"], 4, ["files that are not a run's", "--run_dir"]),
            (["--data.name=mnist", "--data.root=nowhere"], 6, ["nowhere", "--data.root"]),
            (["--data.name=mnst"], 6, ["no data set 'mnst'", "Did you mean 'mnist'?"]),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, list) and value[0].startswith("--") else None,
    )  # fmt: skip
    def test_is_refused(self, given, exit_code, words, command):
        Path("file").write_text("a file")
        Path("thesis").mkdir()
        Path("thesis/thesis.tex").write_text("years of work")
        torch.save({"weight": torch.zeros(1)}, "w.pt")
        self.assert_refused(command, given, exit_code, words)

    def assert_refused(self, command, given, exit_code, words):
        before = sorted(Path.cwd().rglob("*"))
        refused = command(*SMALL, *given)
        message = " ".join(refused.stderr.replace("│", " ").split())
        assert refused.exit_code == exit_code, message
        for word in words:
            assert word in message
        assert not refused.stdout
        assert "Traceback" not in message
        assert sorted(Path.cwd().rglob("*")) == before

    def test_checkpoints_that_cannot_be_loaded_are_refused(self, command):
        kwargs = '--teacher.kwargs={"channels": [4, 8], "in_channels": 1}'
        network = build("convnet", {"channels": [4, 8, 16], "in_channels": 1})
        torch.save(network.state_dict(), "other.pt")
        Path("cut.pt").write_bytes(Path("other.pt").read_bytes()[:-200])
        torch.save(Exploit(), "evil.pt")
        for name, words in {
            "other.pt": ["another architecture", "unexpected, first stages.2", "mis-shaped, first linear.weight"],
            "cut.pt": ["truncated"],
            "evil.pt": ["would not be safe", "only its state dict"],
        }.items():
            given = ["--teacher.factory=convnet", kwargs, f"--teacher.checkpoint={name}"]
            self.assert_refused(command, given, 3, words)
        given = ["--student.checkpoint=other.pt"]
        self.assert_refused(command, given, 3, ["other.pt belongs to another architecture", "stages.0.0.weight (("])

    def test_teachers_that_the_method_cannot_use_are_refused(self, command):
        Path("mine.py").write_text(
            "from torch import nn\n"
            "def net():\n"
            "    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), "
            "nn.Linear(4, 10))\n"
        )
        torch.save(dict(build("mine:net").state_dict()) if sys.path.insert(0, ".") is None else {}, "w.pt")
        own = ["--teacher.factory=mine:net", "--teacher.checkpoint=w.pt", "--method.activation.weight=0"]
        self.assert_refused(
            command, [*own, "--teacher.image_size=8"], 3, ["has no BatchNorm", "--method.regularizers.batchnorm 0"]
        )

    def test_a_folder_that_holds_a_run_is_refused_and_its_run_kept(self, short, command):
        shutil.copytree(short, "run")
        before = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
        self.assert_refused(command, ["--run_dir=run"], 4, ["already holds a run", "--resume run", "--overwrite"])
        for given, words in (
            (["--resume=run", "--seed=4"], ["other settings", "seed 0 → 4", "--run_dir"]),
            (["--resume=run", "--overwrite"], ["--resume run continues a run", "--overwrite"]),
        ):
            refused = command(*given)
            assert refused.exit_code == 2
            assert all(word in refused.stderr for word in words), refused.stderr
        assert {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()} == before
        assert command(*SMALL, "--seed=4", "--run_dir=run", "--overwrite").exit_code == 0
        assert Path("run/student.safetensors").read_bytes() != before[Path("run/student.safetensors")]


def test_a_diverging_run_keeps_its_last_good_checkpoint(command):
    diverging = ["--optimizer.student.lr=1e6", "--optimizer.student.schedule=constant", "--method.rounds=500"]
    diverging += ["--method.interpolation.weight=0"]  # slow enough to leave a checkpoint
    refused = command(*SMALL, *diverging, "--run_dir=run")
    assert refused.exit_code == 5
    rounds = int(re.search(r"became NaN or infinite by round (\d+)\. The last good checkpoint is kept in run\.",
                           refused.stderr)[1])  # fmt: skip
    state = checkpoint.load(Path("run"))
    assert 0 < state["round"] < rounds
    assert all(value.isfinite().all() for value in state["student"].values())
    assert not Path("run/student.safetensors").exists()
    again = command("--resume=run")
    assert again.exit_code == 5, "what diverged once does so again"
    assert checkpoint.load(Path("run"))["round"] == state["round"]


def test_an_error_of_the_program_is_not_hidden(monkeypatch):
    with pytest.raises(ZeroDivisionError):
        cli.run(lambda: 1 // 0)


def test_a_factory_is_found_in_the_current_folder(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from dfad.models import convnet\n"
        "def net(width=8):\n"
        "    return convnet(channels=(width, width), num_classes=4, in_channels=1)\n"
    )
    (tmp_path / "save.py").write_text(
        "import torch, mine\ntorch.manual_seed(0)\ntorch.save({'state_dict': mine.net(6).state_dict()}, 'w.pt')\n"
    )
    assert processes.run(["save.py"], tmp_path, environment()).returncode == 0
    given = [
        *SMALL, "--method.rounds=1", "--no_evaluate", "--run_dir=run",
        "--teacher.factory=mine:net", "--teacher.kwargs={\"width\": 6}", "--teacher.checkpoint=w.pt",
        "--teacher.image_size=12", "--student.factory=mine:net",
    ]  # fmt: skip
    done = run(*given, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "student.safetensors").exists()


def on_terminal(program: list[str], cwd: Path, **changes: str) -> str:
    """What a program shows on a pseudo-terminal."""
    controller, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, *program],
        cwd=cwd,
        env=environment(TERM="xterm-256color", COLUMNS="120", **changes),
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
    )
    os.close(terminal)
    shown = bytearray()
    while True:
        try:
            shown += os.read(controller, 65536)
        except OSError:  # on Linux, the other end is closed
            break
    os.close(controller)
    assert process.wait() == 0, shown.decode()
    return shown.decode()


COLOUR = re.compile(r"\x1b\[(?:[0-9]*;)*(?:3[0-8]|4[0-8]|9[0-7]|10[0-7])[;m]")


RECORD = """
from dfad.runs.recorder import Recorder
from dfad.terminal import configure_logging
configure_logging()
with Recorder(None, 4) as recorder:
    recorder.write(4, {"rounds_per_second": 1.0, "student_loss": 0.5, "generator_loss": -1.0})
"""
"""As a command does it, without its networks and data."""


def test_a_terminal_shows_progress_in_colour_unless_told_otherwise(tmp_path):
    colourful = on_terminal(program(*SMALL), tmp_path)
    plain = on_terminal(["-c", RECORD], tmp_path, NO_COLOR="1")
    for shown in (colourful, plain):
        assert re.search(r"Distilling .*4/4.*student .*generator .*rounds/s ", shown)
        assert "Round 4/4" not in shown
    assert COLOUR.search(colourful)
    assert not COLOUR.search(plain)


BUNDLES = {
    "loss": """--fused --seed 3 --device cpu --method.discrepancy kl --method.temperature 2 --method.adversarial 0.5
        --method.student_batchnorm eval --method.activation.weight 0.2 --method.activation.margin 0.5
        --method.activation.scaling batchmean --method.activation.stage_weights halving
        --method.activation.generator_weight 0.1 --method.feature_matching.weight 0.1
        --method.interpolation.weight 0.3
        --method.interpolation.concentration 0.4 --method.interpolation.coefficient batch
        --method.interpolation.labels teacher --method.interpolation.temperature 2
        --method.interpolation.batchnorm keep --method.interpolation.step own
        --method.regularizers.batchnorm 0.2 --method.regularizers.one_hot 0.2
        --method.regularizers.diversity 1""",
    "optimizers": """--optimizer.backend torch
        --optimizer.student.name adamw --optimizer.student.lr 1e-3 --optimizer.student.betas 0.8 0.9
        --optimizer.student.weight_decay 0.01 --optimizer.student.schedule step
        --optimizer.student.milestones 0.5 --optimizer.student.decay 0.5 --optimizer.student.momentum 0.5
        --optimizer.generator.name sgd --optimizer.generator.lr 1e-2 --optimizer.generator.momentum 0.5
        --optimizer.generator.weight_decay 1e-4 --optimizer.generator.schedule constant
        --optimizer.generator.milestones 0.1 0.9 --optimizer.generator.decay 0.3
        --optimizer.generator.betas 0.5 0.999 --collapse.response reset --collapse.budget 1 --collapse.grace 0.2
        --collapse.class_entropy 0.2 --collapse.pairwise_diversity 0.05""",
    "engine": """--no_fused --engine.precision bfloat16 --engine.channels_last on --engine.fused_optimizers on
        --engine.fold_batchnorm on --engine.fuse_batchnorm on --engine.merge_upsampling on
        --engine.fuse_convolutions off --engine.keep_memory on --engine.cuda_graph off --engine.compile off
        --engine.two_streams off --engine.cast_weights off --engine.batchnorm local
        --engine.sent_gradients bfloat16""",
    "recipe": """--method.warm_up 3 --method.generator_steps 2 --method.adversary agreeing
        --method.image_bank.size 64 --method.image_bank.newest 0.5 --method.random_fields.share 0.25
        --method.augmentation.flip
        --method.augmentation.crop 0.25 --method.augmentation.padding zero --method.augmentation.cutout 0.25
        --method.augmentation.colour 0.1 --method.interpolation.weight 0.5 --method.interpolation.labels teacher
        --method.interpolation.step within --method.regularizers.one_hot 1 --optimizer.student.warm_up 0.1
        --optimizer.generator.warm_up 0.1""",
    "networks": """--preset digits --teacher.recipe digits --teacher.channels 1 --teacher.image_size 8
        --teacher.mean 0.3 --teacher.std 0.4 --student.kwargs {"channels":[4,8],"in_channels":1}
        --student.initial_weights teacher
        --method.activation.weight 0 --method.feature_matching.unpaired skip
        --method.regularizers.without_statistics skip""",
    "files": """--config settings.yaml --teacher.factory tests.models.test_loading:Plain --teacher.kwargs {"channels":1}
        --teacher.checkpoint teacher.pt --teacher.checkpoint_key ema --teacher.taps conv
        --student.factory tests.models.test_loading:Plain
        --student.kwargs {"channels":1} --student.checkpoint teacher.pt --student.checkpoint_key model
        --student.taps norm
        --method.regularizers.batchnorm 0 --no_evaluate""",
    "data": """--evaluate --data.name digits --data.root . --data.download --data.backend native --data.image_size 8
        --data.channels 1 --data.bits 12 --data.test_fraction 0.3 --data.skip_corrupt""",
}
"""Every flag with a value other than its default, if a CPU supports more than one."""

ALSO_RUN = {
    *(flag.partition("=")[0] for flag in SMALL),
    "--print_config",
    "--resume",
    "--overwrite",
    "--run_dir",
    "--dry_run",
}
"""By every bundle, and by the tests above."""


def test_a_dry_run_writes_nothing(command):
    done = command(*SMALL, "--dry_run", "--run_dir=run")
    assert done.exit_code == 0, done.stderr
    assert "seconds per round" in done.stdout
    assert not list(Path.cwd().iterdir())


@pytest.mark.parametrize("bundle", BUNDLES)
def test_every_flag_is_run(bundle, command):
    Path("settings.yaml").write_text("recording: {log_every: 2}\n")
    state = build("tests.models.test_loading:Plain", {"channels": 1}).state_dict()
    torch.save({"model": state, "ema": state}, "teacher.pt")
    done = command(*SMALL, "--method.rounds=2", *BUNDLES[bundle].split(), "--run_dir=run")
    assert done.exit_code == 0, done.stderr
    assert (Path("run") / "curves.png").exists()


def test_no_flag_is_left_out(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")  # tyro puts panels side by side where there is room
    with pytest.raises(SystemExit):
        train.main(["--help"])
    help_lines = [line for line in capsys.readouterr().out.splitlines() if re.match(r"\W+--", line)]
    offered = {flag for line in help_lines for flag in re.findall(r"--[a-z][a-z0-9_.]*", line)} - {"--help"}
    run_ = ALSO_RUN | {word for bundle in BUNDLES.values() for word in bundle.split() if word.startswith("--")}
    negations = {flag for flag in offered if flag.rpartition(".")[2].lstrip("-").startswith("no_")}
    assert len(offered) > 50
    assert offered - run_ <= negations
    assert run_ <= offered


def test_the_documented_exit_codes_are_those_of_the_errors():
    documented = {int(code) for code in re.findall(r"(?<=[ ;])(\d+) ", train.Train.__doc__.partition("Exit codes:")[2])}
    raised = {kind.exit_code for kind in DfadError.__subclasses__() if "exit_code" in vars(kind)}
    raised.remove(ExportError.exit_code)
    assert documented == {0, 130, 143} | raised


def test_a_teacher_and_a_student_are_named_by_one_flag_each(command, tmp_path, whole):
    printed = yaml.safe_load(command("--teacher", "timm:a", "--student=mynets:b", "--print_config").stdout)
    assert (printed["teacher"]["factory"], printed["student"]["factory"]) == ("timm:a", "mynets:b")
    assert printed["student"]["kwargs"] == {}  # and not those of the preset's network
    printed = yaml.safe_load(command("--student=b", '--student.kwargs={"c": 1}', "--print_config").stdout)
    assert printed["student"]["kwargs"] == {"c": 1}

    student = whole / "student.safetensors"
    done = command(*SMALL, "--method.rounds=1", "--method.activation.weight=0", "--no_evaluate", "--preset=own",
                   "--method.warm_up=1", "--method.image_bank.size=16", "--teacher", student, "--student", student,
                   "--run_dir", tmp_path / "run", "--data.name=mnist")  # fmt: skip
    assert done.exit_code == 0, done.stderr
    assert "The data set mnist is not used: --evaluate measures" in done.stderr
    again = load_model(tmp_path / "run" / "student.safetensors")[1]
    assert again["architecture"] == load_model(student)[1]["architecture"]


@pytest.mark.parametrize("given", ["random", "teacher", "own"])
def test_weights_of_the_teacher_are_proposed_where_they_fit(given, command, tmp_path):
    kwargs = {"widths": [4, 8], "shortcut": "subsampling", "num_classes": 10, "in_channels": 1}
    networks = {"teacher": kwargs | {"depths": [2, 2]}, "student": kwargs | {"depths": [1, 1]}}
    flags = [] if given == "own" else [f"--student.initial_weights={given}"]
    for role, arguments in networks.items():
        weights = tmp_path / f"{role}.pt"
        torch.save(build("dfad.models.resnet:ResNet", arguments).state_dict(), weights)
        flags += [f"--{role}=dfad.models.resnet:ResNet", f"--{role}.kwargs", json.dumps(arguments)]
        flags += [f"--{role}.checkpoint={weights}"] if role == "teacher" or given == "own" else []
    done = command(*SMALL, *flags, "--teacher.image_size=8", "--dry_run", "--run_dir", tmp_path / "run")
    assert done.exit_code == 0, done.stderr
    assert ("--student.initial_weights teacher starts from their weights" in done.stderr) is (given == "random")
    assert ("tensors of its teacher's whole" in done.stderr) is (given == "teacher")


def test_weights_in_the_students_file_are_not_replaced_by_its_teachers(command, whole):
    student = whole / "student.safetensors"
    refused = command("--teacher", student, "--student", student, "--student.initial_weights=teacher")
    assert refused.exit_code == 3
    assert f"The student {student} has weights of its own" in " ".join(refused.stderr.split())


def test_a_program_of_torch_export_cannot_be_a_student(command, tmp_path, whole):
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    batch = {0: torch.export.Dim("batch", max=1024)}
    program = torch.export.export(network, (torch.zeros(2, 1, 8, 8),), dynamic_shapes=(batch,))
    torch.export.save(program, tmp_path / "student.pt2")
    refused = command("--teacher", whole / "student.safetensors", "--student", tmp_path / "student.pt2")
    assert refused.exit_code == 3
    assert "has one mode and cannot be trained" in refused.stderr
