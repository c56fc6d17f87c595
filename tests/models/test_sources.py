"""Networks by name, from folders and files; stand-ins take the place of timm, torchvision and transformers."""

import dataclasses
import json
import pickle
import sys
import zipfile
from collections import namedtuple

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import dfad
from dfad import models
from dfad.config import StudentConfig
from dfad.errors import ModelError, name_of
from dfad.models import hubs
from dfad.models.exported import load_exported
from dfad.models.factory import build
from dfad.models.model_file import save_model
from dfad.models.outputs import Outputs
from dfad.models.sources import architecture_of, load, shape_of
from dfad.models.wrappers import LogitsAlone
from dfad.runs.report import student_architecture
from tests.hubs import MEAN, STD, OfMapping, Small, filled

Pair = namedtuple("Pair", ["logits", "features"])


class OfTuple(Small):
    def forward(self, images):
        logits = super().forward(images)
        return Pair(logits, images)


def assert_same(network, other):
    images = torch.randn(3, 3, 8, 8)
    torch.testing.assert_close(network.eval()(images), other.eval()(images))


class TestTimm:
    def test_published_weights_come_out_of_the_cache(self, timm):
        save_file(filled().state_dict(), timm / "model.safetensors")
        found = load("timm:small")
        assert_same(found.network, filled())
        assert found.trained
        assert (found.images.mean, found.images.std) == (MEAN, STD)
        assert shape_of(found) == (3, 12, 16)
        assert "state_dict" not in found.network.pretrained_cfg  # or each copy would hold the weights twice

    def test_without_the_file_the_message_says_how_to_get_it(self, timm):
        with pytest.raises(ModelError, match=r"hf download timm/small\.own .*Nothing is downloaded"):
            load("timm:small")

    def test_own_weights(self, timm, tmp_path):
        torch.save(filled().state_dict(), tmp_path / "own.pt")
        assert_same(dfad.load_network("timm:small", tmp_path / "own.pt"), filled())

    def test_published_weights_for_other_classes_are_refused(self, timm):
        save_file(filled().state_dict(), timm / "model.safetensors")
        with pytest.raises(ModelError, match="for 4 classes, and 7 are asked for.*random"):
            load("timm:small", kwargs={"num_classes": 7})

    def test_own_weights_of_other_classes_are_named(self, timm, tmp_path):
        torch.save(Small(9).state_dict(), tmp_path / "own.pt")
        with pytest.raises(ModelError, match=r"with 9 classes: kwargs '\{\"num_classes\": 9\}', if its factory takes"):
            load("timm:small", tmp_path / "own.pt")

    def test_a_normalisation_of_other_channels_is_left_out(self, timm):
        found = load("timm:small", kwargs={"in_chans": 1}, pretrained=False)
        assert found.images.mean == ()

    def test_unknown_names(self, timm):
        with pytest.raises(ModelError, match=r"no network 'smal'\. Did you mean 'small'\?"):
            build("timm:smal")

    def test_its_own_factory_stays_a_callable(self, timm):
        assert isinstance(build("timm:create_model", {"name": "small"}), Small)


class TestTorchvision:
    def test_published_weights_and_their_images(self, torchvision):
        torch.save(filled().state_dict(), torchvision)
        found = load("torchvision:small")
        assert_same(found.network, filled())
        assert (shape_of(found), found.images.mean) == ((3, 20, 20), MEAN)
        assert shape_of(found, image_size=(6, 8)) == (3, 6, 8)

    def test_code_in_a_cached_file_is_not_run(self, torchvision):
        torch.save(print, torchvision)
        with pytest.raises(ModelError, match="small-1234.pth is a pickle that holds more than tensors"):
            load("torchvision:small")

    def test_arguments_that_it_does_not_take(self, torchvision):
        torch.save(filled().state_dict(), torchvision)
        with pytest.raises(ModelError, match=r"torchvision:small called with \{'depth': 3\} failed: TypeError"):
            load("torchvision:small", kwargs={"depth": 3})

    def test_without_the_file(self, torchvision):
        with pytest.raises(ModelError, match=r"download https://nowhere\.example/small-1234\.pth into .*checkpoints"):
            load("torchvision:small")

    def test_a_student_is_random(self, torchvision):
        torch.save(filled().state_dict(), torchvision)
        torch.manual_seed(8)
        assert not torch.equal(load("torchvision:small", pretrained=False).network.fc.weight, filled().fc.weight)

    def test_that_does_not_fit_this_torch(self, monkeypatch):
        def broken(name):
            raise RuntimeError("operator torchvision::nms does not exist")

        monkeypatch.setattr(hubs.importlib, "import_module", broken)
        with pytest.raises(ModelError, match=r"torchvision cannot be imported: .*nms.*made for PyTorch"):
            build("torchvision:resnet18")


class TestHuggingFace:
    def test_a_folder(self, transformers):
        torch.save(filled().state_dict(), transformers / "pytorch_model.bin")
        found = load(f"hf:{transformers}")
        assert_same(found.network, filled())
        assert shape_of(found) == (3, 14, 14)
        assert found.images.mean == MEAN

    @pytest.mark.parametrize(
        ("processor", "size"),
        [
            ({"size": 9}, (9, 9)),
            ({"size": {"height": 9, "width": 7}}, (9, 7)),
            ({"size": {"shortest_edge": 9}, "crop_size": {"height": 8, "width": 8}, "do_center_crop": True}, (8, 8)),
            ({"size": {"longest_edge": 9}}, None),
        ],
    )
    def test_sizes_as_image_processors_say_them(self, transformers, processor, size):
        (transformers / "preprocessor_config.json").write_text(json.dumps(processor))
        torch.save(filled().state_dict(), transformers / "pytorch_model.bin")
        assert load(f"hf:{transformers}").images.size == size

    @pytest.mark.parametrize(
        ("processor", "mean", "std"),
        [
            ({"do_normalize": False, "image_mean": MEAN}, (0, 0, 0), (1, 1, 1)),
            ({"rescale_factor": 2 / 255, "image_mean": [1] * 3, "image_std": [4] * 3}, (0.5,) * 3, (2,) * 3),
            ({"do_rescale": False, "image_mean": [51] * 3, "image_std": [255] * 3}, (0.2,) * 3, (1,) * 3),
            ({"do_rescale": False, "do_normalize": False}, (0, 0, 0), (1 / 255,) * 3),
            ({"size": 9}, (), ()),
        ],
    )
    def test_normalisations_as_image_processors_say_them(self, transformers, processor, mean, std):
        (transformers / "preprocessor_config.json").write_text(json.dumps(processor))
        torch.save(filled().state_dict(), transformers / "pytorch_model.bin")
        images = load(f"hf:{transformers}").images
        assert (images.mean, images.std) == (pytest.approx(mean), pytest.approx(std))

    def test_code_in_a_folder_is_not_run(self, transformers):
        (transformers / "config.json").write_text(json.dumps({"auto_map": {"AutoConfig": "own.Config"}}))
        with pytest.raises(ModelError, match=r"code of its own, which this program does not run\. Name what builds"):
            load(f"hf:{transformers}")

    def test_weights_without_a_head_are_refused(self, transformers):
        state = {name: value for name, value in filled().state_dict().items() if not name.startswith("fc")}
        torch.save(state, transformers / "pytorch_model.bin")
        with pytest.raises(ModelError, match=r"2 are missing or of another shape, first fc\.bias, and would be random"):
            load(f"hf:{transformers}")

    def test_classes_have_one_name_everywhere(self, transformers):
        assert build(f"hf:{transformers}", {"num_classes": 7}).fc.out_features == 7

    def test_a_name_that_is_not_here(self, transformers):
        with pytest.raises(ModelError, match=r"neither a folder.*not cached\. Nothing is downloaded.*hf download a/b"):
            load("hf:a/b")

    def test_an_empty_folder(self, transformers, tmp_path):
        (tmp_path / "empty").mkdir()
        with pytest.raises(ModelError, match=r"holds no config\.json; it is empty"):
            load(f"hf:{tmp_path / 'empty'}")

    def test_a_folder_without_its_prefix(self, transformers):
        with pytest.raises(ModelError, match=f"Name it hf:{transformers}"):
            load(str(transformers))


@pytest.mark.parametrize("kind", [OfMapping, OfTuple])
class TestLogitsAlone:
    def test_returns_logits_in_either_mode(self, kind):
        network, images = filled(kind), torch.randn(2, 3, 8, 8)
        wrapped = LogitsAlone(network)
        for mode in (True, False):
            expected = (
                network.train(mode)(images)["logits"] if kind is OfMapping else network.train(mode)(images).logits
            )
            torch.testing.assert_close(wrapped(images), expected)

    def test_compiles_as_one_graph(self, kind):
        wrapped, images = LogitsAlone(filled(kind)), torch.randn(2, 3, 8, 8)
        compiled = torch.compile(wrapped, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(images), wrapped(images))

    def test_is_not_seen_in_names_copies_and_files(self, kind, tmp_path):
        network = filled(kind)
        wrapped = LogitsAlone(network)
        assert wrapped.state_dict().keys() == network.state_dict().keys()
        assert pickle.loads(pickle.dumps(wrapped)).network.fc.weight.equal(network.fc.weight)
        wrapped.train()
        assert network.norm.training

    def test_messages_name_the_network_itself(self, kind):
        assert name_of(LogitsAlone(filled(kind))) == kind.__name__
        assert name_of(nn.Linear(1, 1)) == "Linear"


def test_a_callable_that_returns_a_mapping_is_wrapped(monkeypatch):
    monkeypatch.setitem(sys.modules, "user_networks", sys.modules[__name__])
    network = dfad.load_network("user_networks:OfMapping")
    assert isinstance(network, LogitsAlone)
    assert not network.training
    assert isinstance(dfad.load_network("user_networks:Small"), Small)


class TestFiles:
    @pytest.fixture
    def file(self, tmp_path):
        network = models.convnet(channels=(4, 8), num_classes=4, in_channels=1)
        path = tmp_path / "network.safetensors"
        architecture = {"factory": "convnet", "kwargs": {"channels": [4, 8], "num_classes": 4, "in_channels": 1}}
        manifest = {"architecture": architecture, "image_shape": [1, 8, 8], "mean": [0.5], "std": [0.2]}
        save_model(path, network.state_dict(), manifest)
        return path

    def test_of_this_project(self, file):
        found = load(str(file))
        assert (shape_of(found), found.images.mean) == ((1, 8, 8), (0.5,))
        assert shape_of(found, image_size=12) == (1, 12, 12)
        assert isinstance(found.network(torch.zeros(2, 1, 8, 8)), Outputs)

    def test_its_weights_are_of_images_as_it_says(self, file, tmp_path):
        kwargs = {"channels": [4, 8], "num_classes": 4, "in_channels": 1}
        found = load("convnet", file, kwargs=kwargs)
        assert (shape_of(found), found.images.mean, found.images.std) == ((1, 8, 8), (0.5,), (0.2,))
        assert str(file) in found.images.origin
        assert found.manifest["image_shape"] == [1, 8, 8]
        others = tmp_path / "others.safetensors"
        save_file(load("convnet", file, kwargs=kwargs).network.state_dict(), others)
        assert load("convnet", others, kwargs=kwargs).image_shape is None
        assert load(str(file), others).images.mean == (0.5,)

    def test_takes_no_arguments(self, file):
        with pytest.raises(ModelError, match="holds its network whole; it takes no keyword arguments"):
            load(str(file), kwargs={"num_classes": 3})

    def test_a_student_of_a_file_is_described_as_the_file_describes_it(self, file):
        config = StudentConfig(factory=str(file))
        assert student_architecture(load(str(file)).network, config)["factory"] == "convnet"
        assert architecture_of("resnet20", {"num_classes": 3})["kwargs"] == {"num_classes": 3}

    def test_a_missing_file(self):
        with pytest.raises(ModelError, match="no/such.safetensors does not exist"):
            load("no/such.safetensors")


class TestExported:
    def export(self, path, network=None, *, dynamic=True):
        batch = {0: torch.export.Dim("batch", max=1024)}
        images = torch.zeros(2, 3, 8, 6)
        program = torch.export.export(
            network or filled(), (images,), dynamic_shapes=(batch if dynamic else None,), strict=False
        )
        torch.export.save(program, path)
        return path

    def test_computes_what_its_network_does(self, tmp_path):
        found = load(str(self.export(tmp_path / "small.pt2")))
        assert (shape_of(found), found.exported, found.trained) == ((3, 8, 6), True, True)
        images = torch.randn(5, 3, 8, 6)
        torch.testing.assert_close(found.network(images), filled()(images))

    def test_of_a_fixed_batch(self, tmp_path):
        with pytest.raises(ModelError, match="batches of 2 images alone"):
            load(str(self.export(tmp_path / "small.pt2", dynamic=False)))

    def test_weights_from_elsewhere_are_refused(self, tmp_path):
        path = self.export(tmp_path / "small.pt2")
        with pytest.raises(ModelError, match="takes no weights"):
            load(str(path), tmp_path / "own.pt")
        with pytest.raises(ModelError, match=r"a program of torch\.export.*Name it alone"):
            load("resnet20", path)

    @pytest.mark.parametrize(
        "expression",
        ["__import__('os')", "exec('x')", "(exec)('x')", "().__class__", "open ('x')", "Symbol('s; import os')"],
    )
    def test_expressions_that_would_run_code_are_refused(self, tmp_path, expression):
        path = self.export(tmp_path / "small.pt2")
        changed = tmp_path / "changed.pt2"
        with zipfile.ZipFile(path) as archive, zipfile.ZipFile(changed, "w") as other:
            for name in archive.namelist():
                data = archive.read(name)
                if name.endswith("model.json"):
                    tree = json.loads(data)
                    tree["graph_module"]["planted"] = {"expr_str": expression}
                    data = json.dumps(tree).encode()
                other.writestr(name, data)
        with pytest.raises(ModelError, match="more than tensors.*not loaded"):
            load_exported(changed)

    def test_pickled_constants_are_refused(self, tmp_path):
        path = self.export(tmp_path / "small.pt2")
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("small/data/constants/custom_obj_0", pickle.dumps(print))
        with pytest.raises(ModelError, match="custom_obj_0.*not loaded"):
            load_exported(path)

    def test_operations_of_others_are_refused(self, tmp_path, monkeypatch):
        path = self.export(tmp_path / "small.pt2")
        program = torch.export.load(path)
        node = next(node for node in program.graph.nodes if node.op == "call_function")
        node.target = torch.hub.load  # as a name in the file would lead to it
        monkeypatch.setattr(torch.export, "load", lambda path: program)
        monkeypatch.setattr(type(program), "module", lambda self, check_guards: nn.Identity())
        with pytest.raises(ModelError, match="none of PyTorch's operations"):
            load_exported(path)

    def test_a_file_that_is_damaged(self, tmp_path):
        path = self.export(tmp_path / "small.pt2")
        damaged = tmp_path / "damaged.pt2"
        with zipfile.ZipFile(path) as archive, zipfile.ZipFile(damaged, "w") as other:
            for name in archive.namelist():
                if not name.endswith("weight_0"):
                    other.writestr(name, archive.read(name))
        with pytest.raises(ModelError, match="cannot be read by PyTorch"):
            load(str(damaged))


def test_settings_hold_a_size_or_a_pair():
    config = dfad.DistillConfig().teacher
    assert dataclasses.replace(config, image_size=(48, 64)).image_size == (48, 64)
    with pytest.raises(ValueError, match="image_size is .*positive"):
        dataclasses.replace(config, image_size=(48, 0))
