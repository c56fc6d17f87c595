"""Model files: weights and manifest together."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from dfad import models
from dfad.errors import ModelError, RunFolderError
from dfad.models.model_file import load_model, read_manifest, save_model, weights_hash
from dfad.models.outputs import as_outputs

FIXTURES = Path(__file__).parents[1] / "fixtures"
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


def test_taps_can_be_named_where_a_file_has_none(tmp_path):
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    (tmp_path / "two_layers.py").write_text(
        "from torch import nn\n\ndef build():\n    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))\n"
    )
    architecture = {"factory": "two_layers:build", "taps": ["1"]}
    save_model(tmp_path / "model.safetensors", network.state_dict(), {"architecture": architecture})
    values = torch.randn(5, 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        recorded, _ = load_model(tmp_path / "model.safetensors")
        named, _ = load_model(tmp_path / "model.safetensors", taps=["0"])
    (tap,) = recorded(values).taps
    assert_close(tap, network(values))
    (tap,) = named(values).taps
    assert_close(tap, network[0](values))


def test_a_foreign_network_is_built_by_its_factory(tmp_path):
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
    with pytest.raises(ModelError, match="does not say how its network is built.*--factory"):
        load_model(path)


def test_a_truncated_file_is_named(path):
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ModelError, match=r"model\.safetensors \(100 bytes\) cannot be read; it is truncated"):
        load_model(path)


@pytest.mark.parametrize("name", ["gone.safetensors", "gone.pt"])
def test_a_missing_file_is_named(tmp_path, name):
    with pytest.raises(ModelError, match=f"{name} does not exist"):
        load_model(tmp_path / name)


@pytest.mark.parametrize("name", ["student", "generator"])
def test_files_of_before_are_read(name):
    network, manifest = load_model(FIXTURES / f"{name}-of-0.1.0.safetensors")
    assert manifest["versions"]["dfad"] == "0.1.0"
    if name == "student":
        assert as_outputs(network(torch.zeros(2, *manifest["image_shape"]))).logits.shape == (2, 10)
    else:
        assert network(torch.zeros(2, 4)).shape == (2, 1, 8, 8)


class Shared(torch.nn.Module):
    """A tied weight, a block with two names, slices of one tensor, and extra state."""

    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
        self.second.weight = self.first.weight
        block = torch.nn.Linear(3, 3)
        self.blocks = torch.nn.ModuleList([block, block])
        table = torch.randn(4, 3)
        self.register_buffer("table", table)
        self.register_buffer("row", table[1:3])
        self.extra = {"version": 2, "names": ["a", None]}

    def get_extra_state(self):
        return self.extra

    def set_extra_state(self, state):
        self.extra = state


def test_shared_tensors_are_stored_once_and_everything_comes_back(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "user_networks", sys.modules[__name__])
    network, path = Shared(), tmp_path / "model.safetensors"
    save_model(path, network.state_dict(), {"architecture": {"factory": "user_networks:Shared"}})
    assert load_file(path).keys() == network.state_dict().keys() - {
        "second.weight", "blocks.1.weight", "blocks.1.bias", "_extra_state",
    }  # fmt: skip
    loaded, _ = load_model(path)
    assert loaded.extra == network.extra
    assert loaded.second.weight is loaded.first.weight
    state = loaded.state_dict()
    assert all(
        torch.equal(state[name], value) for name, value in network.state_dict().items() if name != "_extra_state"
    )


@pytest.mark.parametrize(
    "extra", [{1: "a"}, (1, 2), {"when": object()}, float("nan")], ids=["key", "tuple", "object", "nan"]
)
def test_extra_state_that_would_not_come_back_is_refused(extra, tmp_path):
    network = Shared()
    network.extra = extra
    with pytest.raises(ModelError, match="holds _extra_state, a .* stored neither as a tensor nor as JSON"):
        save_model(tmp_path / "model.safetensors", network.state_dict(), {})
    assert not list(tmp_path.iterdir())


def test_writing_leaves_the_former_file_until_it_is_done(path, network, monkeypatch):
    before = path.read_bytes()

    def fail(descriptor):
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(RunFolderError, match=r"model\.safetensors cannot be written: disk full\. The last whole one"):
        save_model(path, network.state_dict(), {})
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]
