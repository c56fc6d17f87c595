"""Evaluation: each figure against another implementation, and the command."""

import json
from dataclasses import replace

import numpy as np
import pytest
import sklearn.metrics
import torch
from PIL import Image
from safetensors.torch import save_file
from scipy.special import rel_entr

from dfad import evaluate, models
from dfad.config import TeacherConfig
from dfad.data import DataConfig, open_dataset
from dfad.errors import ConfigurationError, DataError, ModelError, RunFolderError
from dfad.metrics import agreement, confusion_matrix, expected_calibration_error, teacher_divergence, top_k_accuracy
from dfad.models.factory import build
from dfad.models.model_file import load_model, save_model
from dfad.presets import TrainConfig
from dfad.runs.settings import to_yaml
from dfad.supervised.trainer import SupervisedTrainer
from tests.supervised.test_teaching import QUICK


class Asserting(torch.nn.Linear):
    """Refuses images of another size as timm's transformers do."""

    def forward(self, images):
        assert images.shape[2:] == (224, 224), "Input height doesn't match model"
        return super().forward(images.mean(dim=(2, 3)))


@pytest.fixture(scope="module")
def logits_and_labels():
    torch.manual_seed(0)
    labels = torch.randint(0, 7, (500,))
    return 2 * torch.randn(500, 7) + 3 * torch.nn.functional.one_hot(labels, 7), labels


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A briefly trained network for digits, as a file."""
    trainer = SupervisedTrainer(QUICK, open_dataset(QUICK.data))
    for _ in range(QUICK.epochs):
        trainer.train_epoch()
    path = tmp_path_factory.mktemp("model") / "teacher.safetensors"
    save_model(path, trainer.result.state_dict(), trainer.manifest(trainer.accuracy()))
    return path


def measured(capsys, *flags):
    evaluate.main([*map(str, flags), "--json", "--device", "cpu"])
    return json.loads(capsys.readouterr().out)


class TestFigures:
    @pytest.mark.parametrize("k", [1, 2, 5])
    def test_top_k(self, logits_and_labels, k):
        logits, labels = logits_and_labels
        expected = sklearn.metrics.top_k_accuracy_score(labels, logits, k=k)
        assert top_k_accuracy(logits, labels, k) == pytest.approx(expected)

    def test_confusion(self, logits_and_labels):
        logits, labels = logits_and_labels
        expected = sklearn.metrics.confusion_matrix(labels, logits.argmax(dim=1))
        assert confusion_matrix(logits, labels).tolist() == expected.tolist()

    def test_calibration_by_the_definition(self, logits_and_labels):
        logits, labels = logits_and_labels
        confidences, predictions = logits.double().softmax(dim=1).max(dim=1)
        expected = 0.0
        for bin_ in range(15):
            inside = (confidences > bin_ / 15) & (confidences <= (bin_ + 1) / 15)
            if inside.any():
                right = (predictions == labels)[inside].double().mean()
                expected += inside.double().mean() * (right - confidences[inside].mean()).abs()
        assert expected_calibration_error(logits, labels) == pytest.approx(float(expected))

    def test_certain_and_wrong_is_the_worst_calibration(self):
        logits, labels = torch.tensor([[100.0, 0.0]] * 4), torch.tensor([0, 1, 1, 1])
        assert expected_calibration_error(logits, labels) == pytest.approx(0.75)

    def test_divergence(self, logits_and_labels):
        logits, _ = logits_and_labels
        teacher = logits.flip(0)
        student_p, teacher_p = (x.double().softmax(dim=1).numpy() for x in (logits, teacher))
        assert teacher_divergence(logits, teacher) == pytest.approx(rel_entr(teacher_p, student_p).sum(axis=1).mean())
        assert teacher_divergence(logits, logits + 3) == pytest.approx(0, abs=1e-6)

    def test_agreement(self):
        student, teacher = torch.eye(4), torch.eye(4)[[0, 1, 3, 2]]
        assert agreement(student, teacher) == 0.5

    def test_a_class_without_images_has_no_accuracy(self):
        figures = evaluate.measure(torch.eye(3), torch.tensor([0, 1, 1]), ("a", "b", "c"))
        assert figures["per_class"]["b"] == {"images": 2, "accuracy": 0.5}
        assert figures["per_class"]["c"] == {"images": 0, "accuracy": None}
        assert "top5" not in figures


class TestCommand:
    def test_the_model_file_alone_suffices(self, model, capsys):
        figures = measured(capsys, "--model", model)
        _, manifest = load_model(model)
        assert figures["top1"] == manifest["accuracy"]
        assert (figures["data"], figures["images"], figures["split"]) == ("digits", 360, "test")
        assert figures["fingerprint"] == manifest["data"]["fingerprint"]
        assert np.trace(figures["confusion"]) == round(360 * figures["top1"])
        assert sum(row["images"] for row in figures["per_class"].values()) == 360

    def test_the_train_split_can_be_measured(self, model, capsys):
        assert measured(capsys, "--model", model, "--split", "train")["images"] == 1437

    def test_the_network_may_be_given_without_its_flag(self, model, capsys):
        assert measured(capsys, model, "--split", "train") == measured(capsys, "--model", model, "--split", "train")

    def test_prints_a_table(self, model, capsys):
        evaluate.main(["--model", str(model)])
        out = capsys.readouterr().out
        assert f"{load_model(model)[1]['accuracy']:.4f}" in out
        assert "expected calibration error" in out

    def test_writes_json_and_a_picture(self, model, capsys, tmp_path):
        figures = measured(capsys, "--model", model, "--output", tmp_path / "new")
        assert json.loads((tmp_path / "new" / "evaluation.json").read_text()) == figures
        with Image.open(tmp_path / "new" / "confusion.png") as picture:
            assert min(picture.size) > 300

    def test_a_network_agrees_with_itself(self, model, capsys):
        teacher = measured(capsys, "--model", model, "--teacher", model)["teacher"]
        assert teacher["agreement"] == 1
        assert teacher["kl_divergence"] == pytest.approx(0, abs=1e-9)

    def test_each_network_gets_its_own_normalisation(self, model, capsys, tmp_path):
        network, manifest = load_model(model)
        other = tmp_path / "other.safetensors"
        save_model(other, network.state_dict(), {**manifest, "mean": [0.0], "std": [1.0]})
        teacher = measured(capsys, "--model", other, "--teacher", model)["teacher"]
        assert teacher["top1"] == manifest["accuracy"]
        assert teacher["agreement"] < 1

    def test_an_unknown_normalisation_is_told(self, model, capsys, tmp_path):
        network, manifest = load_model(model)
        other = tmp_path / "other.safetensors"
        unknown = {name: value for name, value in manifest.items() if name not in ("mean", "std")}
        save_model(other, network.state_dict(), unknown)
        evaluate.main(["--model", str(other), "--teacher", str(model), "--mean", "0", "--std", "2", "--json"])
        out, err = capsys.readouterr()
        assert "does not say" not in err
        assert json.loads(out)["teacher"]["top1"] == manifest["accuracy"]  # it has its own
        evaluate.main(["--model", str(other)])
        assert "does not say how its images are normalised. Mean" in capsys.readouterr().err

    def test_images_of_another_size_are_told(self, model, capsys, tmp_path):
        network, manifest = load_model(model)
        other = tmp_path / "other.safetensors"
        save_model(other, network.state_dict(), {**manifest, "image_shape": [1, 16, 8]})
        evaluate.main(["--model", str(other)])
        assert "The images of digits have 8×8 pixels, those of" in capsys.readouterr().err
        evaluate.main(["--model", str(model)])
        assert "those of" not in capsys.readouterr().err

    def test_the_teacher_of_a_run(self, model, capsys, tmp_path):
        settings = replace(TrainConfig(), teacher=TeacherConfig(checkpoint=model))
        (tmp_path / "config.yaml").write_text(to_yaml(settings), encoding="utf-8")
        teacher = measured(capsys, "--model", model, "--teacher", tmp_path)["teacher"]
        assert (teacher["top1"], teacher["agreement"]) == (load_model(model)[1]["accuracy"], 1)

    def test_other_data_than_at_training_are_told(self, model, capsys, tmp_path):
        network, manifest = load_model(model)
        other = tmp_path / "other.safetensors"
        save_model(other, network.state_dict(), {**manifest, "data": {"name": "digits", "fingerprint": "0"}})
        evaluate.main(["--model", str(other)])
        assert "fingerprints differ" in capsys.readouterr().err

    def test_real_resnet20_reaches_its_published_accuracy(self, shared_data, capsys):
        figures = measured(
            capsys,
            "--model", shared_data / "nets" / "cifar10-resnet20.safetensors", "--factory", "resnet20",
            "--mean", 0.485, 0.456, 0.406, "--std", 0.229, 0.224, 0.225,
            "--data.name", "cifar10", "--data.root", shared_data / "cifar10-lossless-5k.tar.xz",
        )  # fmt: skip
        assert figures["images"] == 1000
        assert figures["top1"] == pytest.approx(0.915, abs=0.003)


class TestBadInput:
    def test_a_model_that_names_no_data(self, tmp_path, model):
        path = tmp_path / "bare.safetensors"
        network, manifest = load_model(model)
        save_model(path, network.state_dict(), {"architecture": manifest["architecture"]})
        with pytest.raises(ConfigurationError, match=r"Give --data\.name"):
            evaluate.main(["--model", str(path)])

    def test_a_foreign_file_without_factory(self, tmp_path):
        path = tmp_path / "foreign.safetensors"
        save_file(models.convnet().state_dict(), path)
        with pytest.raises(ModelError, match="does not say how its network is built"):
            evaluate.main(["--model", str(path), "--data.name", "digits"])

    @pytest.mark.parametrize(
        ("factory", "kwargs", "message"),
        [
            ("convnet", {"num_classes": 7, "in_channels": 1}, "has 7 classes and digits 10"),
            ("convnet", {"num_classes": 10, "in_channels": 3}, r"does not take the images of digits \(1, 8, 8\)"),
            (f"{__name__}:Asserting", {"in_features": 1, "out_features": 10}, r"AssertionError: Input height doesn't"),
        ],
    )
    def test_a_network_that_does_not_fit_the_data(self, tmp_path, factory, kwargs, message):
        path = tmp_path / "foreign.safetensors"
        save_file(build(factory, kwargs).state_dict(), path)
        flags = ["--model", str(path), "--factory", factory, "--kwargs", json.dumps(kwargs)]
        with pytest.raises(ModelError, match=message):
            evaluate.main([*flags, "--data.name", "digits"])

    def test_normalisation_of_other_channels(self, model):
        with pytest.raises(ModelError, match="3 channels, those of digits 1"):
            evaluate.main(["--model", str(model), *["--mean", "0", "0", "0", "--std", "1", "1", "1"]])

    def test_mean_without_deviation_ends_with_code_2(self, model):
        with pytest.raises(SystemExit) as raised:
            evaluate.main(["--model", str(model), "--mean", "0.5"])
        assert raised.value.code == 2

    def test_missing_data(self, model, tmp_path):
        flags = ["--model", str(model), "--data.name", "mnist", "--data.root", str(tmp_path)]
        with pytest.raises(DataError, match="holds neither"):
            evaluate.main(flags)

    def test_a_folder_that_cannot_be_made(self, model, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(RunFolderError, match="evaluation.json cannot be written: Not a directory"):
            evaluate.main(["--model", str(model), "--output", str(tmp_path / "file" / "folder")])

    def test_missing_model(self, tmp_path):
        with pytest.raises(ModelError, match="does not exist"):
            evaluate.main(["--model", str(tmp_path / "gone.safetensors")])


def test_options_of_the_data_override_those_of_the_file(model):
    command = evaluate.Evaluate(model=model, data=replace(DataConfig(name=evaluate.OF_MODEL), test_fraction=0.5))
    manifest = {"recipe": {"data": {"name": "folder", "root": "somewhere", "image_size": 12}}}
    config = evaluate._data_config(command, manifest)
    assert (config.name, str(config.root), config.image_size, config.test_fraction) == ("folder", "somewhere", 12, 0.5)
