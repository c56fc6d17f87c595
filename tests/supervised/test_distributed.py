"""Teachers that several ranks train and measure together."""

import json
from typing import Any

import pytest
import torch

from dfad import evaluate, models, teacher
from dfad.data import AugmentConfig, DataConfig, batch_source, open_dataset
from dfad.data.evaluation import predict
from dfad.models.model_file import load_model
from dfad.supervised.recipes import NetworkConfig, Recipe
from dfad.supervised.trainer import SupervisedTrainer
from tests.ranks import run_command, run_ranks

CPU = torch.device("cpu")

RECIPE = Recipe(
    network=NetworkConfig("convnet", {"channels": [4, 8]}),
    augment=AugmentConfig(translate=1),
    epochs=2,
    batch_size=256,
    device="cpu",
    precision="float32",
    ema=0.9,
)

FLAGS = ["--network.kwargs", '{"channels": [4, 8]}', "--epochs=1", "--batch_size=256", "--device=cpu"]

COUNTS = (1, 3, 6, 7)
"""Of images that two or four ranks do not divide; there are fewer than ranks, or some ranks have none."""


def trained() -> dict[str, Any]:
    """After two epochs."""
    trainer = SupervisedTrainer(RECIPE, open_dataset(RECIPE.data))
    losses = [trainer.train_epoch() for _ in range(RECIPE.epochs)]
    return {"losses": torch.tensor(losses), "accuracy": trainer.accuracy(), **trainer.result.state_dict()}


def measured() -> dict[int, Any]:
    """Logits and labels of the first images."""
    torch.manual_seed(1)
    network = models.convnet(channels=(4,), in_channels=1)
    dataset = open_dataset(DataConfig())
    source = batch_source(dataset, dataset.test, "native", CPU)
    return {count: predict(network, source, count) for count in (*COUNTS, len(dataset.test))}


def work() -> tuple[dict[str, Any], dict[int, Any]]:
    return trained(), measured()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[Any]:
    return run_ranks(2, work, tmp_path_factory.mktemp("ranks"))


def test_ranks_train_what_one_trains_alone(ranks):
    expected = trained()
    for found, _ in ranks:
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=name)
        assert all(torch.equal(torch.as_tensor(found[name]), torch.as_tensor(ranks[0][0][name])) for name in found)


def test_every_image_is_measured_once_in_order(ranks, tmp_path):
    expected = measured()
    for found in [*(found for _, found in ranks), *run_ranks(4, measured, tmp_path)]:
        for count, (logits, labels) in expected.items():
            assert len(found[count][0]) == len(labels)
            assert torch.equal(found[count][1], labels)
            torch.testing.assert_close(found[count][0], logits)


def test_the_commands_write_and_print_once(tmp_path):
    done = run_command(teacher.main, [[*FLAGS, "--run_dir=run"]] * 2, tmp_path)
    assert [rank.exit_code for rank in done] == [0, 0], done
    _, manifest = load_model(tmp_path / "run" / "teacher.safetensors")
    given = ["--model=run/teacher.safetensors", "--device=cpu", "--json", "--output=measured"]
    done = run_command(evaluate.main, [given] * 2, tmp_path)
    assert [(rank.exit_code, bool(rank.output)) for rank in done] == [(0, True), (0, False)]
    figures = json.loads(done[0].output)
    assert figures["top1"] == manifest["accuracy"]
    assert figures["images"] == 360
    assert json.loads((tmp_path / "measured" / "evaluation.json").read_text()) == figures
