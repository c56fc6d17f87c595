"""Training teachers: recipes, exact resuming, model files, the command."""

import json
import math
import os
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from dfad import teacher
from dfad.data import AugmentConfig, DataConfig, open_dataset
from dfad.data.evaluation import Evaluator
from dfad.errors import ConfigurationError, DataError, DivergenceError, Interrupted, ModelError, RunFolderError
from dfad.models.model_file import load_model
from dfad.runs import checkpoint
from dfad.supervised import cache
from dfad.supervised.recipes import RECIPES, NetworkConfig, Recipe
from dfad.supervised.trainer import SupervisedTrainer

QUICK = Recipe(
    network=NetworkConfig("convnet", {"channels": [8, 16]}),
    augment=AugmentConfig(translate=1),
    epochs=3,
    batch_size=32,
    device="cpu",
    precision="float32",
)
"""A second of training."""

QUICK_FLAGS = [
    "--network.kwargs", '{"channels": [8, 16]}', "--augment.translate", "1", "--epochs", "3", "--batch_size", "32",
    "--device", "cpu",
]  # fmt: skip


@pytest.fixture(scope="module")
def digits():
    return open_dataset(DataConfig())


@pytest.fixture(scope="module")
def digits_teacher() -> Path:
    return cache.cached_teacher("digits")


def weights(trainer):
    return {name: value.clone() for name, value in trainer.result.state_dict().items()}


class Dropped(nn.Module):
    """A user's network: returns only logits, has its own keyword, and draws random numbers."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, hidden), nn.Dropout(), nn.Linear(hidden, 10))

    def forward(self, images):
        return self.layers(images)


class TestRecipes:
    def test_digits_reaches_98_percent(self, digits_teacher):
        network, manifest = load_model(digits_teacher)
        accuracy = Evaluator(DataConfig(), torch.device("cpu"))(network)
        assert accuracy >= 0.98
        assert manifest["accuracy"] == accuracy

    def test_the_cached_teacher_is_trained_once(self, digits_teacher, monkeypatch):
        monkeypatch.setenv("DFAD_CACHE", str(digits_teacher.parent))
        monkeypatch.setattr(cache, "SupervisedTrainer", None)  # calling it would fail
        assert cache.cached_teacher("digits") == digits_teacher

    def test_one_that_is_there_is_taken_from_a_folder_that_cannot_be_written(
        self, digits_teacher, monkeypatch, tmp_path
    ):
        monkeypatch.setenv("DFAD_CACHE", str(tmp_path))
        shutil.copy(digits_teacher, tmp_path)
        monkeypatch.setattr(Path, "mkdir", None)  # calling it would fail
        assert cache.cached_teacher("digits") == tmp_path / digits_teacher.name

    def test_without_a_home_the_way_out_is_said(self, monkeypatch):
        for name in ("DFAD_CACHE", "XDG_CACHE_HOME"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr("os.path.expanduser", lambda path: path)  # as it is where nobody knows the user's home
        with pytest.raises(ConfigurationError, match="no home folder for the cache.*DFAD_CACHE"):
            cache.cache_folder()

    def test_another_recipe_is_another_file(self, digits_teacher, monkeypatch, tmp_path):
        monkeypatch.setenv("DFAD_CACHE", str(tmp_path))
        monkeypatch.setitem(RECIPES, "digits", QUICK)
        path = cache.cached_teacher("digits")
        assert path.name != digits_teacher.name
        assert path.parent == tmp_path

    @pytest.mark.parametrize(
        ("variables", "folder"),
        [
            ({"DFAD_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
            ({"XDG_CACHE_HOME": "/b"}, "/b/dfad"),
            ({}, "/home/someone/.cache/dfad"),
        ],
    )
    def test_the_cache_folder_follows_the_environment(self, monkeypatch, variables, folder):
        for name in ("DFAD_CACHE", "XDG_CACHE_HOME"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("HOME", "/home/someone")
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        assert cache.cache_folder() == Path(folder)

    def test_a_cache_folder_that_cannot_be_written_is_named(self, monkeypatch, tmp_path):
        (tmp_path / "file").touch()
        monkeypatch.setenv("DFAD_CACHE", str(tmp_path / "file" / "cache"))
        with pytest.raises(ConfigurationError, match=r"file/cache cannot be written: Not a directory.*DFAD_CACHE"):
            cache.cached_teacher("digits")

    def test_of_two_processes_one_trains_and_the_other_waits(self, monkeypatch, tmp_path):
        monkeypatch.setenv("DFAD_CACHE", str(tmp_path))
        monkeypatch.setitem(RECIPES, "digits", QUICK)
        trained = []
        train = cache.train
        monkeypatch.setattr(cache, "train", lambda *args, **kwargs: trained.append(args) or train(*args, **kwargs))
        with ThreadPoolExecutor() as pool:  # flock tells open files apart, not processes
            first, second = pool.map(cache.cached_teacher, ["digits", "digits"])
        assert first == second
        assert len(trained) == 1

    def test_an_unknown_recipe_is_an_error_with_the_nearest(self):
        with pytest.raises(ConfigurationError, match="no teacher recipe 'digit'. Did you mean 'digits'?"):
            cache.cached_teacher("digit")

    def test_cosine_ends_at_zero(self):
        recipe = Recipe(schedule="cosine")
        assert [recipe.factor(p) for p in (0, 0.5, 1)] == pytest.approx([1, 0.5, 0])

    def test_onecycle_rises_then_falls(self):
        recipe = Recipe(schedule="onecycle")
        assert [recipe.factor(p) for p in (0, 0.15, 0.3, 0.65, 1)] == pytest.approx([0.04, 0.52, 1, 0.5, 0])

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("epochs", 0), ("lr", -1.0), ("lr", math.nan), ("batch_size", 1), ("weight_decay", -1e-3),
            ("momentum", 1.0), ("label_smoothing", 1.0), ("ema", -0.1), ("evaluate_every", 0),
            ("checkpoint_every", 0),
        ],
    )  # fmt: skip
    def test_values_are_validated(self, name, value):
        with pytest.raises(ValueError, match=f"{name} is {value}; it must be"):
            Recipe(**{name: value})


class TestTraining:
    @pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
    def test_it_learns_and_on_a_gpu_its_steps_are_captured(self, device, digits):
        torch.use_deterministic_algorithms(False)  # which fill fresh memory
        trainer = SupervisedTrainer(replace(QUICK, device=device, precision="auto"), digits)
        before = trainer.accuracy()
        with trainer.engine.running():
            losses = [trainer.train_epoch() for _ in range(QUICK.epochs)]
            assert trainer.engine.captured == (device == "cuda")
        assert losses == sorted(losses, reverse=True)
        assert losses[-1] < losses[0] / 2
        assert trainer.accuracy() > before + 0.5

    def test_a_step_is_nesterov_on_smoothed_cross_entropy(self, digits):
        recipe = replace(QUICK, label_smoothing=0.2, weight_decay=0.1, batch_size=16, precision="float32")
        trainer = SupervisedTrainer(recipe, digits)
        weight, bias = trainer.network.linear.weight, trainer.network.linear.bias
        before = weight.detach().clone(), bias.detach().clone()
        trainer.images.normal_()
        trainer.labels.copy_(torch.arange(16) % 10)
        loss = F.cross_entropy(trainer.network(trainer.images).logits, trainer.labels, label_smoothing=0.2)
        gradients = torch.autograd.grad(loss, [weight, bias])
        assert_close(trainer.step()["loss"], loss.detach())
        for now, then, gradient, decay in zip((weight, bias), before, gradients, (0.1, 0.0), strict=True):
            total = gradient + decay * then
            assert_close(now.detach(), then - recipe.lr * (1 + recipe.momentum) * total)  # first step: g + m g

    def test_every_image_is_seen_with_its_label(self, digits):
        trainer = SupervisedTrainer(replace(QUICK, augment=AugmentConfig(), batch_size=479), digits)
        assert len(digits.train) == 3 * 479
        seen = []
        step = trainer.step
        trainer.step = lambda: seen.append((trainer.images.clone(), trainer.labels.clone())) or step()
        trainer.train_epoch()
        pixels = torch.cat([images for images, _ in seen]) * digits.std[0] + digits.mean[0]
        bytes_ = (pixels * 255).round().byte().contiguous()
        labels = torch.cat([labels for _, labels in seen]).tolist()

        def sample(image, label):
            return image.numpy().tobytes(), label

        given = sorted(map(sample, digits.train.images, digits.train.labels.tolist()))
        assert sorted(map(sample, bytes_, labels)) == given

    def test_the_average_follows_the_weights(self, digits):
        trainer = SupervisedTrainer(replace(QUICK, ema=0.75, batch_size=1000), digits)
        expected = None
        for _ in range(3):
            trainer.train_epoch()  # of one step
            now = trainer.network.linear.weight.detach().clone()
            expected = now if expected is None else 0.75 * expected + 0.25 * now
        assert_close(trainer.result.linear.weight.detach(), expected)
        assert not torch.equal(trainer.result.linear.weight, trainer.network.linear.weight)

    def test_same_seed_same_weights(self, digits):
        results = []
        for seed in (0, 0, 1):
            torch.manual_seed(len(results))  # what is outside must not matter
            trainer = SupervisedTrainer(replace(QUICK, seed=seed), digits)
            trainer.train_epoch()
            results.append(trainer.result.linear.weight.detach())
        assert torch.equal(results[0], results[1])
        assert not torch.equal(results[0], results[2])

    @pytest.mark.parametrize("network", ["convnet", "tests.supervised.test_teaching:Dropped"])
    @pytest.mark.parametrize("ema", [0.0, 0.9])
    def test_resuming_is_exact(self, digits, tmp_path, network, ema):
        kwargs = {"hidden": 8} if "Dropped" in network else {"channels": [8, 16]}
        recipe = replace(QUICK, network=NetworkConfig(network, kwargs), ema=ema)
        whole = SupervisedTrainer(recipe, digits)
        for _ in range(3):
            whole.train_epoch()
        first = SupervisedTrainer(recipe, digits)
        first.train_epoch()
        checkpoint.save(tmp_path, first.state_dict())
        torch.manual_seed(99)
        resumed = SupervisedTrainer(recipe, digits)
        resumed.load_state_dict(checkpoint.load(tmp_path))
        while resumed.epoch < 3:
            resumed.train_epoch()
        assert_close(weights(resumed), weights(whole), rtol=0, atol=0)

    @pytest.mark.parametrize("switch", ["on", "off"])
    def test_the_layout_is_chosen(self, digits, switch):
        trainer = SupervisedTrainer(replace(QUICK, channels_last=switch), digits)
        weight = trainer.network.stages[1][0].weight
        assert weight.is_contiguous(memory_format=torch.channels_last) == (switch == "on")
        assert trainer.train_epoch() < 2.3

    def test_the_precision_is_chosen(self, digits):
        trainer = SupervisedTrainer(replace(QUICK, precision="bfloat16"), digits)
        seen = []
        trainer.network.linear.register_forward_hook(lambda _, inputs, output: seen.append(output.dtype))
        trainer.images.zero_()
        trainer.labels.zero_()
        trainer.step()
        assert seen == [torch.bfloat16]
        assert trainer.network.linear.weight.dtype == torch.float32

    def test_a_cuda_graph_without_a_gpu_is_refused(self, digits):
        with pytest.raises(ConfigurationError, match="cuda_graph"):
            SupervisedTrainer(replace(QUICK, cuda_graph="on"), digits)

    def test_divergence_stops(self, digits):
        trainer = SupervisedTrainer(replace(QUICK, lr=1e30), digits)
        with pytest.raises(DivergenceError, match="in epoch 1. Lower --lr, now 1e"):
            trainer.train_epoch()

    def test_a_network_of_other_classes_is_refused(self, digits):
        recipe = replace(QUICK, network=NetworkConfig("convnet", {"num_classes": 7}))
        with pytest.raises(ModelError, match=r"has 7 classes and digits 10.* Set --network.kwargs '..num_classes"):
            SupervisedTrainer(recipe, digits)

    def test_a_network_of_other_images_is_refused(self, digits):
        with pytest.raises(ModelError, match=r"LeNet does not take the images of digits.* \(1, 8, 8\)"):
            SupervisedTrainer(replace(QUICK, network=NetworkConfig("lenet5")), digits)

    def test_a_batch_larger_than_the_data_is_refused(self, digits):
        with pytest.raises(ConfigurationError, match="batch_size is 2000, but digits has only 1437"):
            SupervisedTrainer(replace(QUICK, batch_size=2000), digits)


class TestCommand:
    def test_leaves_a_model_that_explains_itself(self, tmp_path, capsys, digits):
        run_dir = tmp_path / "run"
        teacher.main([*QUICK_FLAGS, "--run_dir", str(run_dir)])
        network, manifest = load_model(run_dir / "teacher.safetensors")
        assert manifest["architecture"]["factory"] == "convnet"
        assert manifest["architecture"]["kwargs"] == {"num_classes": 10, "in_channels": 1, "channels": [8, 16]}
        assert manifest["image_shape"] == [1, 8, 8]
        assert manifest["mean"] == pytest.approx(digits.mean)
        assert manifest["data"] == {"name": "digits", "fingerprint": digits.fingerprint}
        assert manifest["recipe"]["epochs"] == 3
        assert manifest["accuracy"] == Evaluator(DataConfig(), torch.device("cpu"))(network)
        assert f"{manifest['accuracy']:.4f}" in capsys.readouterr().out
        records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        assert [record["epoch"] for record in records] == [1, 2, 3]
        assert records[-1]["accuracy"] == manifest["accuracy"]

    def test_stopped_and_resumed_it_ends_with_the_same_weights(self, tmp_path, monkeypatch):
        flags = [*QUICK_FLAGS, "--checkpoint_every", "3"]  # the stop comes before the first
        teacher.main([*flags, "--run_dir", str(tmp_path / "whole")])
        train_epoch = SupervisedTrainer.train_epoch

        def interrupted(trainer):
            loss = train_epoch(trainer)
            os.kill(os.getpid(), signal.SIGTERM)
            return loss

        with monkeypatch.context() as patch:
            patch.setattr(SupervisedTrainer, "train_epoch", interrupted)
            with pytest.raises(Interrupted, match="Stopped after epoch 1 of 3.*--resume") as raised:
                teacher.main([*flags, "--run_dir", str(tmp_path / "part")])
        assert raised.value.exit_code == 128 + signal.SIGTERM
        assert not (tmp_path / "part" / "teacher.safetensors").exists()
        teacher.main(["--resume", str(tmp_path / "part")])
        states = [load_model(tmp_path / name / "teacher.safetensors")[0].state_dict() for name in ("whole", "part")]
        assert_close(*states, rtol=0, atol=0)

    def test_checkpoints_come_as_often_as_asked(self, tmp_path, monkeypatch):
        saved = []
        monkeypatch.setattr(checkpoint, "save", lambda folder, state: saved.append(state["epoch"]))
        teacher.main([*QUICK_FLAGS, "--checkpoint_every", "2", "--run_dir", str(tmp_path / "run")])
        assert saved == [2, 3]

    def test_a_run_is_not_overwritten_unless_asked(self, tmp_path):
        flags = [*QUICK_FLAGS, "--run_dir", str(tmp_path / "run")]
        teacher.main(flags)
        with pytest.raises(RunFolderError, match="already holds a run"):
            teacher.main(flags)
        teacher.main([*flags, "--overwrite"])

    def test_resuming_with_other_settings_is_refused(self, tmp_path):
        teacher.main([*QUICK_FLAGS, "--run_dir", str(tmp_path / "run")])
        with pytest.raises(ConfigurationError, match=r"lr 0\.1 → 0\.2"):
            teacher.main(["--resume", str(tmp_path / "run"), "--lr", "0.2"])

    def test_missing_data_leave_no_run(self, tmp_path):
        flags = ["--preset", "mnist", "--data.root", str(tmp_path), "--run_dir", str(tmp_path / "run")]
        with pytest.raises(DataError, match="holds neither train-images-idx3-ubyte"):
            teacher.main(flags)
        assert not (tmp_path / "run").exists()

    def test_an_unknown_preset_is_an_error_with_the_nearest(self):
        with pytest.raises(ConfigurationError, match="no preset 'cifar'. Did you mean 'cifar10'?"):
            teacher.main(["--preset", "cifar"])

    def test_a_wrong_value_ends_with_code_2(self):
        with pytest.raises(ConfigurationError, match=r"lr is -1\.0; it must be positive") as raised:
            teacher.main(["--lr", "-1"])
        assert raised.value.exit_code == 2

    def test_the_recipe_of_mnist_learns_the_real_images(self, tmp_path, shared_data):
        flags = ["--preset", "mnist", "--epochs", "1", "--data.root", str(shared_data / "mnist")]
        teacher.main([*flags, "--device", "cpu", "--run_dir", str(tmp_path / "run")])
        _, manifest = load_model(tmp_path / "run" / "teacher.safetensors")
        assert manifest["accuracy"] >= 0.95  # after one of the recipe's eight epochs
