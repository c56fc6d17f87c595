"""Networks that are not what a configured factory builds."""

import logging

import pytest
import torch
from torch import nn

from dfad import models
from dfad.errors import ModelError
from dfad.models.likeness import require_origin, require_same
from dfad.models.model_file import save_model

SHAPE = (1, 8, 8)
KWARGS = {"channels": [4, 8], "num_classes": 4, "in_channels": 1}


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(3)
    return models.convnet(**KWARGS)


class Doubled(nn.Module):
    """The same tensors, and other logits."""

    def __init__(self, **kwargs) -> None:
        super().__init__()
        self.__dict__["network"] = models.convnet(**kwargs)
        self._modules = self.network._modules

    def forward(self, images):
        return 2 * self.network(images).logits


class NotANumber(Doubled):
    def forward(self, images):
        return self.network(images).logits * torch.nan


class Restless(Doubled):
    def forward(self, images):
        return self.network(images).logits * torch.rand(())


class TestGivenInPython:
    def test_the_factory_s_own_network_passes_whatever_its_weights(self, network):
        for candidate in (network, nn.DataParallel(network), network.half().float()):
            require_same(candidate, models.convnet(**KWARGS), "convnet", SHAPE, "student")
        assert network.training

    def test_other_tensors_are_refused_by_name(self, network):
        with pytest.raises(
            ModelError, match=r"2 mis-shaped, first \S+ \(\(4, 8\) in the file, \(5, 8\) in the network"
        ):
            require_same(network, models.convnet(**{**KWARGS, "num_classes": 5}), "convnet", SHAPE, "student")

    def test_the_same_tensors_in_another_network_are_refused(self):
        with pytest.raises(ModelError, match=r"logits of random images differ by 50.0%"):
            require_same(Doubled(**KWARGS), models.convnet(**KWARGS), "convnet", SHAPE, "student")
        with pytest.raises(ModelError, match=r"logits of random images differ by nan%"):
            require_same(Doubled(**KWARGS), NotANumber(**KWARGS), "NotANumber", SHAPE, "student")

    def test_draws_are_the_same_for_both_and_move_no_stream(self):
        restless, built = Restless(**KWARGS), Restless(**KWARGS)
        before = torch.get_rng_state()
        require_same(restless, built, "Restless", SHAPE, "student")
        assert torch.equal(before, torch.get_rng_state())


class TestWeightsFile:
    @pytest.fixture
    def path(self, network, tmp_path):
        path = tmp_path / "network.safetensors"
        architecture = {"factory": "convnet", "kwargs": KWARGS}
        save_model(path, network.state_dict(), {"architecture": architecture, "image_shape": SHAPE})
        return path

    def test_another_network_of_the_same_tensors_is_refused(self, network, path):
        doubled = Doubled(**KWARGS)
        doubled.load_state_dict(network.state_dict())
        with pytest.raises(ModelError, match="belong to the network that convnet with .* builds, and"):
            require_origin(doubled, path, f"{__name__}:Doubled", KWARGS)

    def test_another_name_of_the_same_network_passes(self, network, path):
        require_origin(network, path, "dfad.models:convnet", KWARGS)

    def test_a_file_that_names_what_is_not_there_is_announced(self, network, tmp_path, caplog):
        path = tmp_path / "network.safetensors"
        save_model(path, network.state_dict(), {"architecture": {"factory": "gone:net", "kwargs": {}}})
        with caplog.at_level(logging.WARNING, logger="dfad"):
            require_origin(network, path, "convnet", KWARGS)
        assert "which cannot be compared" in caplog.text
