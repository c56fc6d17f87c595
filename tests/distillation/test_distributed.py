"""Rounds that several ranks share: what they compute is what one computes alone."""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dfad import models
from dfad.config import (
    ActivationConfig,
    AugmentationConfig,
    DistillConfig,
    EngineConfig,
    FeatureMatchingConfig,
    GeneratorConfig,
    ImageBankConfig,
    InterpolationConfig,
    MethodConfig,
    RegularizerConfig,
)
from dfad.distillation.distiller import Distiller
from dfad.engine.distributed import require_reachable
from dfad.errors import ConfigurationError, ModelError
from tests.ranks import run_ranks
from tests.waiting import NoWaiting

ROUNDS = 10
FEW = 4
"""Rounds of all but one method: each collective takes its time on two cores."""

IMAGE_SHAPE = (1, 8, 8)

METHOD = MethodConfig(
    rounds=ROUNDS,
    student_steps=2,
    batch_size=16,
    activation=ActivationConfig(weight=0.1, generator_weight=0.05),
    interpolation=InterpolationConfig(weight=0.5),
    regularizers=RegularizerConfig(batchnorm=0.1, one_hot=0.2, diversity=0.3),
)
BANK = {
    "warm_up": 2,
    "image_bank": ImageBankConfig(size=24),  # no multiple of the batch: its ring closes in the midst of one
    "augmentation": AugmentationConfig(flip=True, crop=0.125, cutout=0.3, colour=0.1),
}
METHODS = {
    "fresh images, mixed images in the same step": METHOD,
    "a bank of images, a step of its own for mixed ones": replace(
        METHOD, **BANK, interpolation=InterpolationConfig(weight=0.5, step="own", labels="teacher")
    ),
    "a bank of images, a share of them mixed": replace(
        METHOD,
        **BANK,
        discrepancy="kl",
        feature_matching=FeatureMatchingConfig(weight=1.0),
        interpolation=InterpolationConfig(weight=0.5, step="within", labels="teacher"),
    ),
    "a coefficient per batch, the adversary where both agree, a student in eval mode": replace(
        METHOD,
        interpolation=InterpolationConfig(weight=0.5, coefficient="batch"),
        adversary="agreeing",
        student_batchnorm="eval",
        generator_steps=2,
    ),
}


class FunctionalStudent(nn.Module):
    """Normalises by a function, with a parameter that is never used and others that are used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(1, 8, 3, padding=1)
        self.again = nn.Conv2d(8, 8, 3, padding=1)
        self.unused = nn.Parameter(torch.ones(3))
        self.scale = nn.Parameter(torch.ones(8))
        self.head = nn.Linear(8, 4)

    def forward(self, images: Tensor) -> Tensor:
        features = self.convolution(images)
        for _ in range(2):
            features = F.relu(F.batch_norm(self.again(features), None, None, self.scale, None, training=True))
        return self.head(features.mean(dim=(2, 3)))


def configuration(method: MethodConfig, **engine: Any) -> DistillConfig:
    return DistillConfig(
        device="cpu",
        engine=EngineConfig(precision="float32", **engine),
        generator=GeneratorConfig(noise_dim=8, width=4),
        method=method,
    )


def distiller(method: MethodConfig, student: nn.Module | None = None, **engine: Any) -> Distiller:
    torch.manual_seed(1)
    teacher = models.convnet(channels=(8, 16), num_classes=4, in_channels=1)
    with torch.no_grad():
        for _ in range(20):
            teacher(torch.randn(32, *IMAGE_SHAPE))
    torch.manual_seed(2)
    student = student or models.convnet(channels=(4, 8), num_classes=4, in_channels=1)
    return Distiller(teacher, student, configuration(method, **engine), image_shape=IMAGE_SHAPE)


def state_after_rounds(distilling: Distiller, rounds: int = FEW) -> dict[str, Tensor]:
    """Everything that rounds move."""
    with distilling.round.student_placed():
        for _ in range(rounds + distilling.config.method.warm_up):
            distilling.run_round()
    parts = {name: getattr(distilling.round, name) for name in ("student", "generator", "connectors")}
    state = {f"{part}.{name}": value for part, network in parts.items() for name, value in network.state_dict().items()}
    if distilling.round.image_bank is not None:
        state["bank"] = distilling.round.image_bank.images
    return {name: value.clone() for name, value in state.items()}


class Collectives(TorchDispatchMode):
    """Counts the collectives in a block, and what they send."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "c10d":
            self.calls[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


def states_of_all_methods() -> dict[str, dict[str, Tensor]]:
    first = next(iter(METHODS))
    return {
        name: state_after_rounds(distiller(method), ROUNDS if name == first else FEW)
        for name, method in METHODS.items()
    }


def functional() -> dict[str, Tensor]:
    """After a single step: a convolution that is normalised twice has gradients of few right digits."""
    torch.manual_seed(3)
    distilling = distiller(replace(METHOD, activation=ActivationConfig()), FunctionalStudent())
    with distilling.round.student_placed():
        distilling.round.student_step()
    return {name: value.clone() for name, value in distilling.student.state_dict().items()}


def unused_parts_stay(distilling: Distiller) -> None:
    """A turn reduces the gradients of the network that it moves, and leaves those of the other as they are."""
    distilling.round.student_step()
    gradients = [p.grad.clone() for p in distilling.student.parameters()]
    assert all(p.grad is None for p in distilling.generator.parameters())
    distilling.round.generator_step()
    assert all(torch.equal(p.grad, g) for p, g in zip(distilling.student.parameters(), gradients, strict=True))


def work() -> dict[str, Any]:
    """All that is asked of ranks, in one start of them."""
    results: dict[str, Any] = states_of_all_methods()
    results["functional"] = functional()
    bank = METHODS["a bank of images, a share of them mixed"]
    results["local"] = state_after_rounds(distiller(bank, batchnorm="local"))
    results["bfloat16"] = state_after_rounds(distiller(METHOD, sent_gradients="bfloat16"), ROUNDS)
    counted = distiller(bank)
    unused_parts_stay(counted)
    with Collectives() as collectives, NoWaiting():
        counted.round()
    results["collectives"] = collectives.calls
    with pytest.raises(ConfigurationError, match=r"batch_size is 10, and \d ranks share it: .* multiple of [48]"):
        distiller(replace(METHOD, batch_size=10))
    with pytest.raises(ConfigurationError, match="BatchNorms take their statistics of the images of all ranks"):
        distiller(METHOD, fuse_batchnorm="on")
    return results


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request, tmp_path_factory) -> list[dict[str, Any]]:
    return run_ranks(request.param, work, tmp_path_factory.mktemp(f"ranks-{request.param}"))


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, Tensor]]:
    """What one process computes."""
    return states_of_all_methods() | {"functional": functional()}


def deviation(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest relative difference of a tensor."""
    assert found.keys() == expected.keys()
    differences = [(found[name].double() - value.double()).norm() for name, value in expected.items()]
    lengths = [value.double().norm().clamp_min(0.1) for value in expected.values()]  # biases are zero at first
    return max((d / length).item() for d, length in zip(differences, lengths, strict=True))


@pytest.mark.parametrize("name", [*METHODS, "functional"])
def test_ranks_compute_what_one_computes_alone(name, ranks, alone):
    # measured: up to 2e-6, of numbers that have seven digits
    assert max(deviation(rank[name], alone[name]) for rank in ranks) < 3e-5


@pytest.mark.parametrize("name", [*METHODS, "functional", "local", "bfloat16"])
def test_ranks_hold_the_same_bits(name, ranks):
    for rank in ranks[1:]:
        assert all(torch.equal(rank[name][key], value) for key, value in ranks[0][name].items())


def test_statistics_of_each_share_are_another_computation(ranks, alone):
    assert deviation(ranks[0]["local"], alone["a bank of images, a share of them mixed"]) > 1e-3


def test_gradients_sent_in_bfloat16_are_near(ranks, alone):
    found = deviation(ranks[0]["bfloat16"], alone["fresh images, mixed images in the same step"])
    assert 1e-5 < found < 0.1


def test_a_round_has_the_collectives_that_it_needs_and_waits_for_nothing(ranks):
    """Student of two BatchNorms and two connectors, two steps; generator of four, one step."""
    for rank in ranks:
        calls = rank["collectives"]
        forward = 2 * (2 + 2) + (4 + 2 + 2)  # the generator's step asks student and connectors as well
        backward = forward
        buckets = 2 + 1
        regularizers = 2 * 2 + 2  # means and variances of all of the teacher's BatchNorms; diversity
        sizes = 2 * 2  # of the teacher's taps in feature matching
        images = 1
        assert sum(calls.values()) == forward + backward + buckets + regularizers + sizes + images, calls


def test_one_process_is_alone():
    assert not distiller(METHOD).round.ranks.several


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (torch.jit.script, "its root is TorchScript"),
        (torch.compile, "its root is compiled"),
        (
            lambda network: torch.export.export(network.eval(), (torch.zeros(2, 3, 8, 8),)).module(),
            "graph of operators",
        ),
        (nn.SyncBatchNorm.convert_sync_batchnorm, "its 1 is a SyncBatchNorm"),
    ],
    ids=["torchscript", "compiled", "exported", "synchronised"],
)
def test_networks_whose_statistics_would_stay_each_ranks_own_are_refused(make, words):
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    require_reachable(network, "the student")
    with pytest.raises(ModelError, match=f"share the student, but .*{words}.*--engine.batchnorm local"):
        require_reachable(make(network), "the student")
