"""Networks from factory paths, weights from files."""

import pickle

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from dfad.errors import ModelError
from dfad.models import factory as factories
from dfad.models import probing, weights
from dfad.models.taps import Outputs


class Plain(nn.Module):
    """A network that returns logits alone."""

    def __init__(self, num_classes: int = 4, channels: int = 3, size: int = 8) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.linear = nn.Linear(6 * size * size, num_classes)

    def forward(self, images):
        return self.linear(self.norm(self.conv(images)).relu().flatten(1))


class Exploit:
    """A pickle that would run code."""

    def __reduce__(self):
        return (exec, ("raise SystemExit('the pickle ran')",))


NOT_A_MODULE = dict
HERE = __name__


@pytest.fixture
def factory(monkeypatch):
    """The path of the class above, importable by its test module's name."""
    import sys

    monkeypatch.setitem(sys.modules, "user_networks", sys.modules[__name__])
    return "user_networks:Plain"


def test_a_factory_is_called_with_its_keyword_arguments(factory):
    assert factories.build(factory, {"num_classes": 7}).linear.out_features == 7


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("resnet200", {}, r"no network 'resnet200'\. Did you mean 'resnet20'\?"),
        ("no.such.package:network", {}, "cannot be imported: ModuleNotFoundError"),
        ("user_networks:Plein", {}, "Did you mean 'Plain'"),
        ("user_networks:HERE", {}, "is a str; it must be callable"),
        ("user_networks:NOT_A_MODULE", {}, "returned a dict"),
        ("user_networks:Plain", {"depth": 3}, r"called with \{'depth': 3\} failed: TypeError"),
    ],
)
def test_a_factory_that_cannot_be_used_is_refused(name, kwargs, message, factory):
    with pytest.raises(ModelError, match=message):
        factories.build(name, kwargs)


def save_as(kind, network, path):
    state = network.state_dict()
    if kind == "safetensors":
        path = path.with_suffix(".safetensors")
        save_file(state, path)
    elif kind == "nested":
        torch.save({"state_dict": {f"module.{n}": v for n, v in state.items()}, "epoch": 3}, path)
    elif kind == "compiled in DataParallel":
        torch.save({f"module._orig_mod.{n}": v for n, v in state.items()}, path)
    else:
        torch.save(state, path)
    return path


@pytest.mark.parametrize("kind", ["safetensors", "torch.save", "nested", "compiled in DataParallel"])
def test_weights_are_loaded_whole(kind, tmp_path):
    network, other = Plain(), Plain()
    weights.load_weights(other, save_as(kind, network, tmp_path / "w.pt"))
    for name, value in network.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name


def test_a_wrong_architecture_is_told_by_its_first_names(tmp_path):
    path = save_as("torch.save", Plain(num_classes=5), tmp_path / "w.pt")
    state = torch.load(path, weights_only=True)
    state["extra"] = state.pop("conv.bias")
    torch.save(state, path)
    with pytest.raises(ModelError) as refused:
        weights.load_weights(Plain(), path)
    message = str(refused.value)
    assert "1 missing, first conv.bias" in message
    assert "1 unexpected, first extra" in message
    assert "2 mis-shaped, first linear.weight ((5, 384) in the file, (4, 384) in the network)" in message


def test_missing_and_truncated_files_are_refused(tmp_path):
    with pytest.raises(ModelError, match="does not exist"):
        weights.read_weights(tmp_path / "none.pt")
    for kind in ("safetensors", "torch.save"):
        path = save_as(kind, Plain(), tmp_path / "w.pt")
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(ModelError, match="truncated or of another format"):
            weights.read_weights(path)


@pytest.mark.parametrize("write", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_a_pickle_that_holds_code_is_refused_and_not_run(write, tmp_path):
    write(Exploit(), tmp_path / "evil.pt")
    with pytest.raises(ModelError, match="would not be safe"):
        weights.read_weights(tmp_path / "evil.pt")


def test_a_whole_module_is_refused_too(tmp_path):
    torch.save(Plain(), tmp_path / "module.pt")
    with pytest.raises(ModelError, match="save its state dict alone"):
        weights.read_weights(tmp_path / "module.pt")


def test_a_file_without_tensors_is_refused(tmp_path):
    torch.save({"epoch": 3}, tmp_path / "w.pt")
    with pytest.raises(ModelError, match="without tensors"):
        weights.read_weights(tmp_path / "w.pt")


def test_the_image_shape_is_found_by_dry_forwards():
    assert probing.image_shape_of(Plain(channels=2, size=28)) == (2, 28, 28)
    assert probing.image_shape_of(Plain(channels=2, size=20), image_size=20) == (2, 20, 20)
    with pytest.raises(ModelError, match=r"took no image of 2 channels and any of"):
        probing.image_shape_of(Plain(channels=2, size=20))
    with pytest.raises(ModelError, match="no convolution"):
        probing.image_shape_of(nn.Linear(4, 2))


def test_a_dry_forward_leaves_the_network_as_it_was():
    network = Plain().train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    outputs = probing.dry_forward(network, (3, 8, 8))
    assert outputs.logits.shape == (2, 4)
    assert not outputs.taps
    assert network.training
    assert network.norm.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_taps_are_taken_of_a_network_that_returns_logits_alone(factory):
    network = factories.build(factory, taps=["conv", "norm"])
    outputs = probing.dry_forward(network, (3, 8, 8))
    assert isinstance(outputs, Outputs)
    assert [tuple(tap.shape) for tap in outputs.taps] == [(2, 6, 8, 8)] * 2
    with pytest.raises(ModelError, match=r"'nom' to tap\. Did you mean 'norm'"):
        factories.build(factory, taps=["nom"])


def test_a_network_that_returns_something_else_is_refused():
    with pytest.raises(ModelError, match="returned a tuple"):
        probing.as_outputs((torch.zeros(2, 3), None))
