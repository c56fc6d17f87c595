"""Model files: weights and manifest together."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from dfad import models
from dfad.errors import ModelError
from dfad.models.model_file import load_model, read_manifest, save_model, weights_hash
from dfad.models.probing import as_outputs

ARCHITECTURE = {"factory": "convnet", "kwargs": {"channels": [4, 8], "num_classes": 3, "in_channels": 1}}


@pytest.fixture
def network():
    torch.manual_seed(0)
    network = models.convnet(channels=(4, 8), num_classes=3, in_channels=1)
    network(torch.randn(8, 1, 8, 8))
    return network


@pytest.fixture
def path(tmp_path, network):
    path = tmp_path / "model.safetensors"
    save_model(path, network.state_dict(), {"architecture": ARCHITECTURE, "mean": (0.5,)})
    return path


def test_the_file_alone_gives_the_network(path, network):
    loaded, manifest = load_model(path)
    assert not loaded.training
    images = torch.randn(2, 1, 8, 8)
    assert_close(loaded(images).logits, network.eval()(images).logits, rtol=0, atol=0)
    assert manifest["mean"] == [0.5]
    assert manifest["versions"]["torch"] == torch.__version__


def test_taps_of_a_foreign_network_are_restored(tmp_path):
    network = torch.nn.Linear(3, 2)
    path = tmp_path / "model.safetensors"
    kwargs = {"in_features": 3, "out_features": 2}
    save_model(path, network.state_dict(), {"architecture": {"factory": "torch.nn:Linear", "kwargs": kwargs}})
    loaded, _ = load_model(path)
    values = torch.randn(4, 3)
    assert_close(as_outputs(loaded(values)).logits, network(values))


def test_the_hash_tells_names_values_and_types(network):
    state = network.state_dict()
    reference = weights_hash(state)
    assert weights_hash(dict(reversed(state.items()))) == reference
    assert weights_hash({**state, "linear.bias": state["linear.bias"] + 1e-6}) != reference
    assert weights_hash({**state, "linear.bias": state["linear.bias"].double()}) != reference
    renamed = {name.replace("linear", "head"): value for name, value in state.items()}
    assert weights_hash(renamed) != reference


def test_changed_weights_are_noticed(path):
    manifest, state = read_manifest(path), load_file(path)
    state["linear.bias"][0] += 1
    save_file(state, path, {"manifest": json.dumps(manifest)})
    with pytest.raises(ModelError, match="not those that its manifest was written for"):
        load_model(path)


def test_a_file_of_another_program_tells_no_architecture(tmp_path, network):
    path = tmp_path / "model.safetensors"
    save_file(network.state_dict(), path)
    assert read_manifest(path) == {}
    with pytest.raises(ModelError, match="does not tell its architecture.*--factory"):
        load_model(path)


def test_a_truncated_file_is_named(path):
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ModelError, match=r"model\.safetensors cannot be read; it is truncated or damaged"):
        load_model(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ModelError, match="does not exist"):
        load_model(tmp_path / "gone.safetensors")


def test_writing_leaves_the_former_file_until_it_is_done(path, network, monkeypatch):
    before = path.read_bytes()

    def fail(descriptor):
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        save_model(path, network.state_dict(), {})
    assert path.read_bytes() == before
