"""Networks from factory paths, weights from files."""

import pickle
import zipfile
from collections import OrderedDict, namedtuple
from dataclasses import dataclass

import pytest
import safetensors.torch
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dfad.copies import in_float32
from dfad.errors import ModelError, first_line
from dfad.models import factory as factories
from dfad.models import outputs as outputs_module
from dfad.models import probing, weights
from dfad.models.taps import Outputs


class Plain(nn.Module):
    """A network that returns only logits."""

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


class NetworkOfFour(Plain):
    def __init__(self) -> None:
        super().__init__()


def of_width(width: int = 4) -> nn.Module:
    return Plain(channels=width)


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


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        (None, "Build it with 7 classes."),
        ("convnet", "Set --student.kwargs '{\"num_classes\": 7}'."),
        ("user_networks:Plain", "Set --student.kwargs '{\"num_classes\": 7}'."),
        ("timm:resnet18", "Set --student.kwargs '{\"num_classes\": 7}'."),
        ("builtins:dict", "Name another network, which has 7."),
        ("student.safetensors", "Name another network, which has 7."),
        (
            "user_networks:of_width",
            "user_networks:of_width takes width, and no num_classes: change its code, or name another network, which "
            "has 7.",
        ),
        (
            "user_networks:NetworkOfFour",
            "user_networks:NetworkOfFour takes no arguments: change its code, or name another network, which has 7.",
        ),
    ],
)
def test_the_remedy_for_other_classes_is_one_that_the_factory_takes(name, remedy, factory):
    assert factories.remedy_for_classes(name, 7, "--student") == remedy


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
        with pytest.raises(ModelError, match="truncated or in another format"):
            weights.read_weights(path)


def test_a_file_that_one_may_not_read_is_not_called_damaged(tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        raise PermissionError(13, "Permission denied")

    torch.save(Plain().state_dict(), tmp_path / "w.pt")
    monkeypatch.setattr(torch, "load", refuse)
    with pytest.raises(ModelError, match=r"There is no permission to read the checkpoint .*w\.pt\.$"):
        weights.read_weights(tmp_path / "w.pt")


@pytest.mark.parametrize("write", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_a_pickle_that_holds_code_is_refused_and_not_run(write, tmp_path):
    write(Exploit(), tmp_path / "evil.pt")
    with pytest.raises(ModelError, match="would not be safe"):
        weights.read_weights(tmp_path / "evil.pt")


def test_a_whole_module_is_refused_too(tmp_path):
    torch.save(Plain(), tmp_path / "module.pt")
    with pytest.raises(ModelError, match=rf"save only its state dict.* It holds {Plain.__module__}\.Plain\.$"):
        weights.read_weights(tmp_path / "module.pt")


def test_a_file_without_tensors_is_refused_and_says_what_it_holds(tmp_path):
    torch.save({"epoch": 3, "args": {"lr": 0.1}}, tmp_path / "w.pt")
    with pytest.raises(ModelError, match="has no tensors; it holds epoch, args"):
        weights.read_weights(tmp_path / "w.pt")


class TestWhatLiesThere:
    """The content decides, not the name; the error says what a file is that is often mistaken for weights."""

    @pytest.mark.parametrize(
        ("name", "content", "kind"),
        [
            ("w.h5", b"\x89HDF\r\n\x1a\n", "HDF5 file, as Keras"),
            ("w.pt", b"\x1c\0\0\0TFL3", "TensorFlow Lite"),
            ("w.onnx", b"\x08\x07", "ONNX"),
        ],
    )
    def test_files_of_other_frameworks(self, tmp_path, name, content, kind):
        (tmp_path / name).write_bytes(content + bytes(100))
        with pytest.raises(ModelError, match=f"{kind}.*rebuild the network in PyTorch"):
            weights.read_weights(tmp_path / name)

    def test_a_file_of_keras(self, tmp_path):
        with zipfile.ZipFile(tmp_path / "w.keras", "w") as archive:
            archive.writestr("model.weights.h5", b"")
        with pytest.raises(ModelError, match="a file of Keras"):
            weights.read_weights(tmp_path / "w.keras")

    def test_folders_of_nothing_and_of_tensorflow(self, tmp_path):
        with pytest.raises(ModelError, match="It is empty"):
            weights.read_weights(tmp_path)
        (tmp_path / "saved_model.pb").touch()
        with pytest.raises(ModelError, match="TensorFlow's SavedModel"):
            weights.read_weights(tmp_path)

    def test_safetensors_under_another_name(self, tmp_path):
        network, other = Plain(), Plain()
        save_file(network.state_dict(), tmp_path / "pytorch_model.bin")
        weights.load_weights(other, tmp_path / "pytorch_model.bin")
        assert torch.equal(other.conv.weight, network.conv.weight)

    def test_a_pickle_under_the_name_of_safetensors(self, tmp_path):
        network, other = Plain(), Plain()
        torch.save(network.state_dict(), tmp_path / "model.safetensors")
        weights.load_weights(other, tmp_path / "model.safetensors")
        assert torch.equal(other.conv.weight, network.conv.weight)

    @pytest.mark.parametrize(
        ("names", "message"),
        [
            (["config.json", "model.safetensors"], r"is a folder.*Name a file in it: .*/model\.safetensors"),
            (["model.safetensors.index.json", "model-00001-of-00002.safetensors"], "in several parts"),
            (["config.json"], r"No file in it ends in \.safetensors"),
        ],
    )
    def test_a_folder(self, tmp_path, names, message):
        for name in names:
            (tmp_path / name).touch()
        with pytest.raises(ModelError, match=message):
            weights.read_weights(tmp_path)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "pointer of Git LFS"),
            (b"\n<!DOCTYPE html><html>Sign in</html>", "is a web page"),
            (b"", "is empty"),
            (b"learning rate: 0.1\nrounds: 20\n", "is a text file, not a file of weights"),
            ("Gewichte für später\n".encode(), "is a text file, not a file of weights"),
            (b"1 2 3\n" * 100, "is a text file, not a file of weights"),
        ],
    )
    @pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
    def test_something_else(self, tmp_path, name, content, message):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ModelError, match=message):
            weights.read_weights(tmp_path / name)

    def test_torchscript(self, tmp_path):
        torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)).save(tmp_path / "w.pt")
        with pytest.raises(ModelError, match=r"TorchScript archive.*torch\.jit\.load"):
            weights.read_weights(tmp_path / "w.pt")


class TestLargerCheckpoints:
    """Weights in larger checkpoints: found if unambiguous, otherwise chosen by a key."""

    @pytest.fixture
    def network(self):
        return Plain()

    def loads(self, network, content, tmp_path, key=None) -> bool:
        torch.save(content, tmp_path / "w.pt")
        other = Plain()
        weights.load_weights(other, tmp_path / "w.pt", key)
        return torch.equal(other.conv.weight, network.conv.weight)

    def test_one_state_dict_under_an_unusual_key_is_taken(self, network, tmp_path, caplog):
        caplog.set_level("INFO")
        moments = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]}
        content = {"params": network.state_dict(), "optimizer": moments, "epoch": torch.tensor(3)}
        assert self.loads(network, content, tmp_path)
        assert "are those under 'params'" in caplog.text

    def test_of_several_one_must_be_chosen(self, network, tmp_path):
        content = {"teacher": network.state_dict(), "ema": {"module": Plain().state_dict()}, "epoch": 3}
        with pytest.raises(
            ModelError, match=r"several state dicts: teacher, ema\.module\. .*--teacher\.checkpoint_key"
        ):
            self.loads(network, content, tmp_path)
        assert self.loads(network, content, tmp_path, "teacher")
        assert not self.loads(network, content, tmp_path, "ema.module")
        assert not self.loads(network, content, tmp_path, "ema")

    def test_a_key_of_a_level_that_holds_several_is_answered_with_them(self, network, tmp_path):
        content = {"ema": {"fast": network.state_dict(), "slow": Plain().state_dict()}, "epoch": 3}
        with pytest.raises(ModelError, match=r"no weights under 'ema'\..* There are: ema\.fast, ema\.slow\."):
            self.loads(network, content, tmp_path, "ema")
        assert self.loads(network, content, tmp_path, "ema.fast")

    def test_what_lies_beside_the_usual_one_is_said(self, network, tmp_path, caplog):
        caplog.set_level("INFO")
        content = {"state_dict": network.state_dict(), "state_dict_ema": Plain().state_dict()}
        assert self.loads(network, content, tmp_path)
        assert "it also holds 'state_dict_ema'" in caplog.text
        assert not self.loads(network, content, tmp_path, "state_dict_ema")

    def test_a_key_that_is_not_there_is_answered_with_those_that_are(self, network, tmp_path):
        with pytest.raises(ModelError, match=r"no weights under 'emma'\. Did you mean 'ema'\? There are: ema"):
            self.loads(network, {"ema": network.state_dict()}, tmp_path, "emma")

    @pytest.mark.parametrize("key", [None, "backbone"])
    def test_any_prefix_is_stripped_where_the_whole_network_is_behind_it(self, network, tmp_path, key, caplog):
        caplog.set_level("INFO")
        content = {f"backbone.{name}": value for name, value in network.state_dict().items()}
        content |= {"criterion.weight": torch.ones(4), "neck.0.weight": torch.ones(2)}
        assert self.loads(network, {"state_dict": content, "epoch": 3}, tmp_path, key)
        assert key or "2 entries besides the network's weights were skipped, first criterion.weight" in caplog.text

    def test_of_several_networks_in_one_state_dict_one_must_be_chosen(self, network, tmp_path):
        content = {f"teacher.{name}": value for name, value in network.state_dict().items()}
        content |= {f"student.{name}": value for name, value in Plain().state_dict().items()}
        with pytest.raises(ModelError, match="weights of 2 networks of this kind: teacher, student"):
            self.loads(network, content, tmp_path)
        assert self.loads(network, content, tmp_path, "teacher")
        assert not self.loads(network, content, tmp_path, "student")

    @pytest.mark.parametrize("prefix", ["", "module."])
    def test_junk_is_skipped_with_a_line(self, network, tmp_path, caplog, prefix):
        caplog.set_level("INFO")
        content = {prefix + name: value for name, value in network.state_dict().items()}
        content |= {f"{prefix}conv.total_ops": torch.zeros(1), f"{prefix}total_params": torch.zeros(1)}
        content |= {"n_averaged": torch.tensor(7), "criterion.weight": torch.ones(4)}
        assert self.loads(network, content, tmp_path)
        assert "2 entries besides the network's weights were skipped" in caplog.text or not prefix
        assert "entries besides the network's weights were skipped, first conv.total_ops" in caplog.text

    def test_what_is_no_junk_is_still_another_architecture(self, network, tmp_path):
        with pytest.raises(ModelError, match=r"1 unexpected, first head2\.weight"):
            self.loads(network, {**network.state_dict(), "head2.weight": torch.ones(1)}, tmp_path)

    def test_half_precision_is_cast(self, network, tmp_path):
        half = {
            name: value.half() if value.is_floating_point() else value for name, value in network.state_dict().items()
        }
        torch.save(half, tmp_path / "w.pt")
        other = Plain()
        weights.load_weights(other, tmp_path / "w.pt")
        assert other.conv.weight.dtype == torch.float32
        torch.testing.assert_close(other.conv.weight, network.conv.weight, rtol=1e-3, atol=1e-4)


class Tied(Plain):
    """Two convolutions of one weight, one block twice, and extra state."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1)
        self.second.weight = self.first.weight
        block = nn.Linear(3, 3)
        self.blocks = nn.ModuleList([block, block])
        self.state = {"version": 2, "seen": [1, 2]}

    def get_extra_state(self):
        return self.state

    def set_extra_state(self, state):
        self.state = state


class TestTied:
    @pytest.fixture
    def network(self):
        torch.manual_seed(1)
        return Tied()

    def check(self, network, path):
        other = Tied()
        other.state = None
        weights.load_weights(other, path)
        for name, value in network.state_dict().items():
            assert name.endswith("_extra_state") or torch.equal(other.state_dict()[name], value), name
        assert other.second.weight is other.first.weight

    def test_a_name_that_the_file_lacks_may_be_that_of_a_tensor_that_it_has(self, network, tmp_path):
        for dropped in (["second.weight", "blocks.0.weight"], ["first.weight", "blocks.1.weight"]):
            state = {name: value for name, value in network.state_dict().items() if name not in dropped}
            torch.save(state, tmp_path / "w.pt")
            self.check(network, tmp_path / "w.pt")

    def test_files_of_safetensors_own_writer(self, network, tmp_path):
        plain = {name: value for name, value in network.state_dict().items() if isinstance(value, torch.Tensor)}
        network.get_extra_state = lambda: torch.ones(1)
        safetensors.torch.save_model(network, tmp_path / "w.safetensors")
        read = weights.read_weights(tmp_path / "w.safetensors")
        assert plain.keys() <= read.keys()
        self.check(network, tmp_path / "w.safetensors")

    def test_extra_state_of_a_pickle_is_restored(self, network, tmp_path):
        torch.save(network.state_dict(), tmp_path / "w.pt")
        other = Tied()
        other.state = None
        weights.load_weights(other, tmp_path / "w.pt")
        assert other.state == network.state


def test_weights_of_a_lazy_network(tmp_path):
    def lazy():
        return nn.Sequential(nn.Flatten(), nn.LazyLinear(4))

    network, other = lazy(), lazy()
    network(torch.zeros(2, 1, 3, 3))
    torch.save(network.state_dict(), tmp_path / "w.pt")
    weights.load_weights(other, tmp_path / "w.pt")
    assert torch.equal(other[1].weight, network[1].weight)


def test_the_image_shape_is_found_by_dry_forwards():
    assert probing.image_shape_of(Plain(channels=2, size=28)) == (2, 28, 28)
    assert probing.image_shape_of(Plain(channels=2, size=20), image_size=20) == (2, 20, 20)
    with pytest.raises(ModelError, match=r"images of 2 channels and 32×32, 28×28.* or 299×299 pixels: Runtime.*mat1"):
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


Named = namedtuple("Named", ["features", "logits"])


@dataclass
class ModelOutput:
    loss: object
    logits: torch.Tensor
    hidden_states: tuple = ()


class TestOutputs:
    logits, features = torch.randn(2, 4), torch.randn(2, 7)
    maps = torch.randn(2, 3, 8, 8)

    @pytest.mark.parametrize(
        ("result", "entry"),
        [
            ((logits, None), "0"),
            ([maps, logits], "1"),
            (Named(features, logits), "logits"),
            ({"features": features, "logits": logits}, "logits"),
            (OrderedDict(aux=maps, out=logits), "out"),
            (ModelOutput(None, logits), "logits"),
        ],
        ids=lambda value: type(value).__name__ if not isinstance(value, str) else value,
    )
    def test_logits_are_found_among_other_things(self, result, entry):
        assert outputs_module.logits_entry(result)[0] == entry
        outputs = outputs_module.as_outputs(result)
        assert torch.equal(outputs.logits, self.logits)
        assert outputs.taps == ()
        assert outputs_module.as_outputs(Outputs(result, (self.maps,))).taps == (self.maps,)

    @pytest.mark.parametrize(
        ("result", "message"),
        [
            ((maps, None), r"returned a tuple of 0: \(2, 3, 8, 8\), 1: NoneType; it must return logits"),
            ({"mask": torch.ones(2, 3, dtype=torch.int64)}, r"returned a dict of mask: \(2, 3\)"),
            ("logits", "returned a str; it must return logits"),
            (None, "returned a NoneType"),
        ],
    )
    def test_what_holds_none_is_refused_with_its_entries(self, result, message):
        with pytest.raises(ModelError, match=message):
            outputs_module.as_outputs(result)

    @pytest.mark.parametrize("dtype", outputs_module.HALF)
    def test_half_precision_becomes_float32_but_under_autocast(self, dtype):
        assert outputs_module.as_outputs(self.logits.to(dtype)).logits.dtype == torch.float32
        with torch.autocast("cpu", torch.bfloat16):
            assert outputs_module.as_outputs(self.logits.to(dtype)).logits.dtype == dtype

    def test_it_is_compiled_as_one_graph(self):
        compiled = torch.compile(
            lambda x: outputs_module.as_outputs({"logits": x.half(), "other": (x,)}).logits + 1,
            fullgraph=True,
            backend="eager",
        )
        torch.testing.assert_close(compiled(self.logits), self.logits.half().float() + 1)

    def test_the_log_says_once_which_entry_is_taken(self, caplog):
        class Several(Plain):
            def forward(self, images):
                return {"features": images, "scores": super().forward(images)}

        caplog.set_level("INFO")
        probing.dry_forward(Several(), (3, 8, 8), announce=True)
        probing.dry_forward(Several(), (3, 8, 8))
        assert caplog.messages == ["Several returns a dict; its entry 'scores' is taken as the logits."]

    @pytest.mark.parametrize("squeezed", [True, False])
    def test_one_logit_is_refused_with_the_way_out(self, squeezed):
        network = nn.Sequential(Plain(num_classes=1), nn.Flatten(0 if squeezed else 1))
        with pytest.raises(ModelError, match=r"cat\(\[torch\.zeros_like\(z\), z\], dim=1\)"):
            probing.dry_forward(network, (3, 8, 8))


class Picky(nn.Module):
    """Takes images of one size, with errors like those of transformers."""

    def __init__(self, size, channels=3) -> None:
        super().__init__()
        self.size = size
        self.conv = nn.Conv2d(channels, 4, 1)

    def forward(self, images):
        assert images.shape[-1] == self.size, "Wrong image height!"
        return self.conv(images).mean((2, 3))


def declared(network, **attributes):
    for name, value in attributes.items():
        setattr(network, name, value)
    return nn.Sequential(network)


class Config:
    def __init__(self, **attributes) -> None:
        vars(self).update(attributes)


class TestImageSize:
    @pytest.mark.parametrize(
        "network",
        [
            declared(Picky(20), pretrained_cfg={"input_size": (3, 20, 20)}),
            declared(Picky(20), default_cfg=Config(input_size=(3, 20, 20))),
            declared(Picky(20), config=Config(image_size=20, num_channels=3)),
            declared(Picky(20), config=Config(image_size=[20, 20])),
            declared(Picky(20), image_size=20),
            declared(
                Picky(20),
                default_cfg={"input_size": (3, 224, 224)},
                patch_embed=declared(nn.Identity(), img_size=(20, 20))[0],
            ),
        ],
        ids=["timm", "timm's class", "transformers", "transformers, both sides", "torchvision", "timm, as built"],
    )
    def test_is_what_the_network_says(self, network, caplog):
        caplog.set_level("INFO")
        assert probing.image_shape_of(network) == (3, 20, 20)
        assert "configuration says that its images are of 20×20" in caplog.text
        assert "guessed" not in caplog.text

    def test_a_size_that_is_given_counts_more(self):
        network = declared(Picky(24), config=Config(image_size=20, num_channels=3))
        assert probing.image_shape_of(network, image_size=24) == (3, 24, 24)

    def test_any_exception_is_a_size_that_does_not_run_and_a_guess_is_said(self, caplog):
        assert probing.image_shape_of(Picky(64, channels=2)) == (2, 64, 64)
        assert "is guessed: it takes 64×64 pixels" in caplog.text
        assert "--teacher.image_size" in caplog.text

    def test_a_wrong_declaration_is_not_believed(self, caplog):
        assert probing.image_shape_of(declared(Picky(28), image_size=20)) == (3, 28, 28)
        assert "guessed" in caplog.text

    def test_networks_of_imagenet_are_tried_at_224_first(self):
        pooled = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 1000))
        assert probing.image_shape_of(pooled) == (3, 224, 224)

    def test_a_network_that_runs_and_returns_no_logits_is_not_told_to_change_its_images(self):
        with pytest.raises(ModelError, match="needed is") as refused:
            probing.image_shape_of(nn.Conv2d(1, 4, 3))
        assert "image_size" not in str(refused.value)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
    def test_a_forward_pass_that_casts_is_not_told_to_change_its_images(self, dtype):
        class Casting(Plain):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x.to(dtype))

        with pytest.raises(ModelError, match="must not cast them") as refused:
            probing.image_shape_of(Casting(), image_size=8)
        assert "image_size" not in str(refused.value)

    def test_where_memory_runs_out_nobody_is_told_to_change_the_images(self):
        class Large(Plain):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x) + torch.empty(10**15).sum()

        with pytest.raises(ModelError, match="not enough memory for it") as refused:
            probing.image_shape_of(Large(), image_size=8)
        assert "image_size" not in str(refused.value)

    def test_failing_everywhere_names_the_first_reason(self):
        with pytest.raises(ModelError, match=r"20×20 pixels: AssertionError: Wrong image height!"):
            probing.image_shape_of(Picky(24), image_size=20)


class TestFloat32:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_weights_of_other_precisions_are_cast(self, dtype, caplog):
        caplog.set_level("INFO")
        network = Plain().to(dtype)
        cast = in_float32(network, copied=True)
        assert probing.dry_forward(cast, (3, 8, 8)).logits.dtype == torch.float32
        assert network.conv.weight.dtype == dtype
        assert f"has weights in {str(dtype).removeprefix('torch.')}" in caplog.text
        assert in_float32(network, copied=False) is network
        assert network.conv.weight.dtype == torch.float32

    def test_a_network_in_float32_is_itself(self):
        network = Plain()
        assert in_float32(network, copied=True) is network


class Versioned(nn.Linear):
    """Refuses entries of a version that it does not know, as torchvision's MNASNet does."""

    _version = 2

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *others):
        if local_metadata.get("version") not in (1, 2):
            raise ValueError(f"version is {local_metadata.get('version')}")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *others)


@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors"])
def test_modules_learn_the_version_of_their_entries(name, tmp_path):
    network, other = Versioned(3, 2), Versioned(3, 2)
    save = save_file if name.endswith("safetensors") else torch.save
    save(dict(network.state_dict()), tmp_path / name)
    weights.load_weights(other, tmp_path / name)
    assert torch.equal(other.weight, network.weight)


def test_a_list_of_parts_is_no_file_of_weights(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    with pytest.raises(ModelError, match="lists the parts.*max_shard_size"):
        weights.read_weights(tmp_path / "model.safetensors.index.json")


def test_an_error_without_a_message_says_so():
    assert first_line(AssertionError()) == "without a message"
    assert first_line(ValueError("One.\nTwo.")) == "One"
