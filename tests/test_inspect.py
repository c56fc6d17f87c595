"""``python -m dfad.inspect``: what it says of a network, and that the command that it prints runs."""

import json
import shlex
import sys
import types
from collections import OrderedDict

import pytest
import torch
from rich.console import Console
from torch import nn

from dfad import cli, inspect, models, train
from dfad.config import TeacherConfig
from dfad.inspection import inspection
from dfad.models.model_file import load_model, save_model
from dfad.models.outputs import as_outputs
from dfad.models.resnet import ResNet
from tests.hubs import filled
from tests.models.test_anatomy import Residual, Tokens

SHORT = (
    *("--method.rounds=1", "--method.student_steps=1", "--method.batch_size=4", "--method.warm_up=1"),
    *("--method.image_bank.size=8", "--generator.width=2", "--generator.noise_dim=4", "--selection.bank_size=4"),
)


@pytest.fixture
def inspected(capsys, monkeypatch, tmp_path):
    """Runs the command; returns what it found, or the message it ended with."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "user_networks", sys.modules["tests.models.test_anatomy"])

    def call(*given):
        with pytest.raises(SystemExit) as ended:
            cli.run(lambda: inspect.main([*map(str, given), "--json", "--device", "cpu"]))
        captured = capsys.readouterr()
        return json.loads(captured.out) if not ended.value.code else (ended.value.code, captured.err)

    return call


def distil(command, tmp_path):
    words = shlex.split(command)
    assert words[:3] == ["python", "-m", "dfad.train"]
    torch.save(Residual().state_dict(), "WEIGHTS")
    train.main([*words[3:], *SHORT])
    return load_model(tmp_path / words[words.index("--run_dir") + 1] / "student.safetensors")[0]


def test_a_file_of_this_project(inspected, tmp_path):
    network = models.convnet(channels=(8, 16), num_classes=4, in_channels=1)
    kwargs = {"channels": [8, 16], "num_classes": 4, "in_channels": 1}
    manifest = {"architecture": {"factory": "convnet", "kwargs": kwargs}, "image_shape": [1, 8, 8], "mean": [0.5]}
    save_model(tmp_path / "teacher.safetensors", network.state_dict(), {**manifest, "std": [0.2]})
    found = inspected("teacher.safetensors")
    assert (found["classes"], found["image_shape"], found["parameters"]) == (4, [1, 8, 8], 1340)
    assert found["norms"] == {"BatchNorm2d": 2}
    assert found["mean"] == [0.5]
    assert found["flops_per_image"] == 2 * (8 * 9 * 64 + 16 * 8 * 9 * 16 + 16 * 4)
    assert [tap["shape"] for tap in found["taps"]] == [[8, 8, 8], [16, 4, 4]]
    assert found["seconds_per_batch"] > 0
    assert "fold_batchnorm" in found["engine_parts"]
    assert any("cuda_graph" in reason for reason in found["engine_reasons"])


def test_a_callable_and_the_command_that_it_prints(inspected, tmp_path):
    found = inspected("user_networks:Residual", "--teacher.image_size", "16", "12")
    assert found["image_shape"] == [3, 16, 12]
    assert not found["trained"]
    assert "random" in found["limits"][0]
    assert "--teacher.image_size 16 12" in found["command"]
    assert found["students"] == []  # none is as small
    assert "--student package.module:callable" in found["command"]


def test_the_command_that_it_prints_runs(inspected, tmp_path, caplog):
    """Where no student fits, it names the teacher's taps, which pair with those of a student of the user's own."""
    found = inspected("user_networks:Residual", "--teacher.image_size", "16")
    taps = [tap["name"] for tap in found["taps"]]
    assert len(taps) == 3
    assert f"--teacher.taps {' '.join(taps)} --run_dir" in found["command"]
    assert "--student.taps" in found["limits"][-1]
    command = found["command"].replace("package.module:callable", "user_networks:Residual")
    student = distil(shlex.join([*shlex.split(command), "--student.taps", *taps]), tmp_path)
    assert as_outputs(student(torch.zeros(2, 3, 16, 16))).logits.shape == (2, 5)
    assert "Features are not matched" not in caplog.text


def test_a_student_that_returns_more_taps_than_pair_is_given_names(inspected, monkeypatch, tmp_path, caplog):
    """The teacher halves its images at once, and the student after its first tap."""

    def halving():
        return nn.Sequential(
            *(nn.Conv2d(3, 256, 3, 2, 1), nn.BatchNorm2d(256), nn.ReLU(), nn.Conv2d(256, 64, 3, 2, 1)),
            *(nn.BatchNorm2d(64), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 5)),
        )

    monkeypatch.setattr(sys.modules["user_networks"], "halving", halving, raising=False)
    torch.save(halving().state_dict(), tmp_path / "halving.pt")
    found = inspected("user_networks:halving", "--teacher.checkpoint", "halving.pt", "--teacher.image_size", "16")
    assert "--teacher.taps 1 4 --student.taps stages_1_1 stages_2_1" in found["command"]
    student = distil(found["command"], tmp_path)
    assert [tap.shape[1:] for tap in student(torch.zeros(2, 3, 16, 16)).taps] == [(64, 8, 8), (128, 4, 4)]
    assert "Features are not matched" not in caplog.text


def test_students_of_the_teachers_class_come_first_and_the_largest_of_them(inspected):
    found = inspected("resnet20")
    assert [student["source"] for student in found["students"]] == ["resnet14", "resnet8", "wrn_16_1"]
    assert [student["inherits"] for student in found["students"]] == [True, True, False]
    assert "--student.initial_weights teacher" in found["command"]
    assert "initial_weights" not in inspected("convnet")["command"]


def test_taps_whose_names_are_numbers_are_given_by_name(inspected, monkeypatch):
    layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 6 * 6, 5))
    monkeypatch.setattr(sys.modules["user_networks"], "flat", lambda: layers, raising=False)
    command = inspected("user_networks:flat", "--teacher.image_size", "8")["command"]
    assert "--teacher.taps 1 --run_dir" in command


def test_a_network_that_returns_its_taps_is_given_no_names(inspected, monkeypatch):
    monkeypatch.setattr(
        sys.modules["user_networks"], "tiny", lambda: models.convnet(channels=(2,), num_classes=5), raising=False
    )
    found = inspected("user_networks:tiny", "--teacher.image_size", "8")
    assert (len(found["taps"]), found["students"]) == (1, [])
    assert "--teacher.taps" not in found["command"]


def test_a_transformer_is_distilled_by_its_logits_alone(inspected):
    found = inspected("user_networks:Tokens", "--teacher.image_size=16")
    assert found["taps"] == []
    assert "--method.regularizers.batchnorm 0" in found["command"]
    assert "activation.weight" not in found["command"]
    assert "one-hot" in found["image_prior"]
    assert not {"fold_batchnorm", "fuse_batchnorm"} & set(found["engine_parts"])
    assert any("pre-norm transformers" in limit for limit in found["limits"])
    assert "no boundary at zero" in found["boundary"]


def test_torchscript_from_a_callable(inspected, monkeypatch):
    layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3))
    scripted = types.ModuleType("scripted_networks")
    scripted.network = lambda: torch.jit.script(layers)
    monkeypatch.setitem(sys.modules, "scripted_networks", scripted)
    code, message = inspected("scripted_networks:network")
    assert code == 3
    assert "TorchScript shows no convolution" in message
    found = inspected("scripted_networks:network", "--teacher.channels=3", "--teacher.image_size=8")
    assert found["classes"] == 3
    assert any("It holds TorchScript" in limit for limit in found["limits"])


def test_a_hub_says_size_and_normalisation(inspected, torchvision):
    torch.save(filled().state_dict(), torchvision)
    found = inspected("torchvision:small")
    assert (found["image_shape"], found["mean"]) == ([3, 20, 20], [0.5, 0.4, 0.3])
    assert "Small_Weights.V1" in found["image_shape_found"]
    assert found["trained"]
    assert "--teacher.checkpoint" not in found["command"]


def test_a_hub_without_its_weights_is_inspected_all_the_same(inspected, timm):
    found = inspected("timm:small")
    assert not found["trained"]
    assert "--teacher.checkpoint WEIGHTS" in found["command"]


def test_of_a_hub_what_can_start_from_the_teachers_weights_comes_first(inspected, timm, monkeypatch):
    shapes = {"net30": (16, 3), "net20": (14, 3), "net10": (16, 2)}

    def create_model(name, num_classes=10, **options):
        width, depth = shapes[name]
        return ResNet([width, 2 * width], [depth, depth], "subsampling", num_classes, 3)

    for attribute, value in {"create_model": create_model, "is_model": shapes.__contains__,
                             "list_models": lambda: list(shapes)}.items():  # fmt: skip
        monkeypatch.setattr(sys.modules["timm"], attribute, value)
    found = inspected("timm:net30", "--teacher.image_size=8")
    assert [student["source"] for student in found["students"][:2]] == ["timm:net10", "timm:net20"]
    assert [student["inherits"] for student in found["students"][:2]] == [True, False]
    assert "--student timm:net10 --student.kwargs '{\"num_classes\": 10}' --student.initial_weights" in found["command"]


def test_what_cannot_teach_is_refused(inspected, monkeypatch):
    monkeypatch.setattr(Tokens, "forward", torch.no_grad()(Tokens.forward))
    code, message = inspected("user_networks:Tokens", "--teacher.image_size=16")
    assert code == 3
    assert "No gradient of the teacher Tokens" in message


def test_tables_for_people(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "user_networks", sys.modules["tests.models.test_anatomy"])
    inspect.main(["user_networks:Residual", "--teacher.image_size=16", "--device=cpu"])
    lines = capsys.readouterr().out.rstrip().splitlines()
    assert lines[-1].startswith("python -m dfad.train --preset own --teacher user_networks:Residual")
    assert "Candidate taps" in "".join(lines)


def test_names_of_taps_are_printed_whole(inspected, monkeypatch):
    layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 6 * 6, 5))
    deep = nn.Sequential(OrderedDict({"a_name_of_many_letters" * 4: layers}))
    monkeypatch.setattr(sys.modules["user_networks"], "deep", lambda: deep, raising=False)
    config = TeacherConfig(image_size=8)
    found = inspection("user_networks:deep", config, torch.device("cpu"), timed=False)
    console = Console(width=60, record=True)
    console.print(inspect.tables(found)[1])
    text = "".join(cell for line in console.export_text().splitlines() for cell in line.split("│")[1:2])
    assert found.taps[0].name in text.replace(" ", "")
