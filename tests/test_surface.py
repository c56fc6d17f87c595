"""Public names that must not move."""

import importlib
import inspect
import os

import pytest

import dfad
from dfad.config import DistillConfig
from tests.processes import COMMANDS, run

NAMES = {
    "dfad": ["Distiller", "distill", "DistillConfig", "Result", "load_network"],
    "dfad.config": [
        "DistillConfig",
        "MethodConfig",
        "TeacherConfig",
        "StudentConfig",
        "OptimizerConfig",
        "EngineConfig",
    ],
    "dfad.losses": [
        "ActivationBoundaryLoss",
        "InterpolatedKLDivLoss",
        "Discrepancy",
        "BatchNormStatisticsLoss",
        "FeatureMatchingLoss",
    ],
    "dfad.functional": [
        "mix",
        "normalized_squared_error",
        "one_hot_loss",
        "diversity_loss",
        "class_entropy",
        "pairwise_diversity",
    ],
    "dfad.models": ["convnet", "lenet5", "resnet20", "resnet18", "resnet34", "vgg11", "wrn_40_2"],
    "dfad.models.taps": ["Outputs"],
    "dfad.models.generator": ["Generator"],
    "dfad_kernels": ["activation_boundary_loss", "interpolated_kl_div", "normalized_squared_error"],
}


@pytest.mark.parametrize("module", NAMES)
def test_public_names_are_where_they_were(module):
    found = importlib.import_module(module)
    assert [name for name in NAMES[module] if not hasattr(found, name)] == []


def test_the_public_face_lists_what_it_offers():
    assert set(NAMES["dfad"]) == set(dfad.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        dfad.nothing  # noqa: B018


def test_public_signatures_take_what_they_took():
    distiller = inspect.signature(dfad.Distiller).parameters
    assert list(distiller)[:3] == ["teacher", "student", "config"]
    assert {"image_shape", "normalisation", "evaluate"} <= set(distiller)
    assert {"run_dir", "resume", "overwrite"} <= set(inspect.signature(dfad.Distiller.fit).parameters)
    assert {"run_dir", "evaluate"} <= set(inspect.signature(dfad.distill).parameters)
    assert DistillConfig() == dfad.DistillConfig()


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_modules_to_run(command, tmp_path):
    done = run(["-m", command, "--help"], tmp_path, os.environ)
    assert done.returncode == 0, done.stderr
    assert command in done.stdout


@pytest.mark.parametrize("package", ["dfad", "dfad_kernels"])
def test_types_are_there_for_those_who_check_theirs(package):
    assert (importlib.resources.files(package) / "py.typed").is_file()
