"""Stand-ins for timm, torchvision and transformers, with one network each."""

import json
import sys
import types

import pytest
import torch
from torch import nn


class Small(nn.Module):
    """Logits of images."""

    def __init__(self, num_classes: int = 4, in_chans: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_chans, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, num_classes)

    def forward(self, images):
        return self.fc(self.norm(self.conv(images)).relu().mean((2, 3)))


class Answer(dict):
    """As Hugging Face's ModelOutput: a mapping whose entries are attributes."""

    __getattr__ = dict.__getitem__


class OfMapping(Small):
    def forward(self, images):
        return Answer(hidden_states=None, logits=super().forward(images))


MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


@pytest.fixture
def timm(monkeypatch, tmp_path):
    """A package of one network, whose published weights are in a cache of Hugging Face."""
    timm = types.ModuleType("timm")

    def create_model(name, pretrained=False, pretrained_cfg_overlay=None, **kwargs):
        network = Small(**kwargs)
        network.pretrained_cfg = {"input_size": (3, 12, 16), "mean": MEAN, "std": STD, **(pretrained_cfg_overlay or {})}
        if pretrained:
            network.load_state_dict(network.pretrained_cfg["state_dict"])
        return network

    published = types.SimpleNamespace(hf_hub_id="timm/small.own", hf_hub_filename=None, url="", num_classes=4)
    timm.create_model = create_model
    timm.is_model = lambda name: name.split(".")[0] == "small"
    timm.get_pretrained_cfg = lambda name: published
    timm.list_models = lambda: ["small"]
    hub = types.ModuleType("huggingface_hub")
    cache = tmp_path / "hub"
    cache.mkdir()
    hub.try_to_load_from_cache = lambda repository, file: str(cache / file) if (cache / file).exists() else None
    monkeypatch.setitem(sys.modules, "timm", timm)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    return cache


@pytest.fixture
def torchvision(monkeypatch, tmp_path):
    """A package of one network, whose published weights are in the folder of torch.hub."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()

    class Weights:
        url, meta = "https://nowhere.example/small-1234.pth", {"categories": list("abcd")}

        def transforms(self):
            return types.SimpleNamespace(crop_size=[20], mean=MEAN, std=STD)

        def __str__(self):
            return "Small_Weights.V1"

    weights = Weights()

    class Kinds(list):
        DEFAULT = weights

    def get_model(name, weights=None, **kwargs):
        network = Small(**kwargs)
        if weights:
            network.load_state_dict(torch.load(tmp_path / "checkpoints" / "small-1234.pth"))
        return network

    models_of_it = types.ModuleType("torchvision.models")
    models_of_it.get_model = get_model
    models_of_it.list_models = lambda: ["small"]
    models_of_it.get_model_weights = lambda name: Kinds([weights])
    package = types.ModuleType("torchvision")
    package.models = models_of_it
    monkeypatch.setitem(sys.modules, "torchvision", package)
    monkeypatch.setitem(sys.modules, "torchvision.models", models_of_it)
    return tmp_path / "checkpoints" / "small-1234.pth"


@pytest.fixture
def transformers(monkeypatch, tmp_path):
    """A package whose networks are read from folders alone."""
    package = types.ModuleType("transformers")

    class AutoConfig:
        @staticmethod
        def from_pretrained(name, local_files_only=False, trust_remote_code=None, **kwargs):
            assert local_files_only
            assert trust_remote_code is False
            if not (tmp_path / name / "config.json").exists():
                raise OSError(f"{name} is not cached\nand more")
            if "auto_map" in json.loads((tmp_path / name / "config.json").read_text()):
                raise ValueError("It contains custom code. Set the option `trust_remote_code=True`.")
            return types.SimpleNamespace(**json.loads((tmp_path / name / "config.json").read_text()) | kwargs)

    class AutoModelForImageClassification:
        @staticmethod
        def from_config(config, trust_remote_code=None):
            assert trust_remote_code is False
            network = OfMapping(config.num_labels)
            network.config = config
            return network

        @classmethod
        def from_pretrained(
            cls, name, config, local_files_only=False, trust_remote_code=None, output_loading_info=False
        ):
            assert local_files_only
            network = cls.from_config(config, trust_remote_code)
            state = torch.load(tmp_path / name / "pytorch_model.bin")
            missing = network.state_dict().keys() - state.keys()
            network.load_state_dict(state, strict=False)
            return network, {"missing_keys": set(missing), "mismatched_keys": set()}

    package.AutoConfig, package.AutoModelForImageClassification = AutoConfig, AutoModelForImageClassification
    monkeypatch.setitem(sys.modules, "transformers", package)
    folder = tmp_path / "saved"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"num_labels": 4, "image_size": 10, "num_channels": 3}))
    processor = {"image_mean": MEAN, "image_std": STD, "size": {"shortest_edge": 14}}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def filled(kind=Small):
    torch.manual_seed(5)
    return kind().eval()
