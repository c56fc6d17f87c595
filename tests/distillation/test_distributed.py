"""Rounds that several ranks share: what they compute is what one computes alone."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
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
    RandomFieldsConfig,
    RecordingConfig,
    RegularizerConfig,
    SelectionConfig,
)
from dfad.distillation.distiller import Distiller
from dfad.engine.cuda_graph import WARM_UP_ROUNDS
from dfad.engine.distributed import require_reachable
from dfad.errors import ConfigurationError, ModelError, RankError
from dfad.ranks import Ranks, current_ranks
from tests.ranks import run_ranks
from tests.waiting import NoWaiting

ROUNDS = 10
FEW = 2
"""Rounds of all but one method."""

BATCH = 64
"""Of two ranks, of which each has 32 images, or of four."""

IMAGE_SHAPE = (1, 8, 8)

METHOD = MethodConfig(
    rounds=ROUNDS,
    student_steps=2,
    batch_size=BATCH,
    activation=ActivationConfig(weight=0.1, generator_weight=0.05),
    interpolation=InterpolationConfig(weight=0.5),
    regularizers=RegularizerConfig(batchnorm=0.1, one_hot=0.2, diversity=0.3),
)
BANK = {
    "warm_up": 2,
    "image_bank": ImageBankConfig(size=96),  # no multiple of the batch: its ring closes in the midst of one
    "random_fields": RandomFieldsConfig(share=0.3),
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

FRESH, _, SHARED, AGREEING = METHODS

BY_FOUR = (SHARED, AGREEING)

WITHOUT_TAPS = replace(METHOD, activation=ActivationConfig())

LONGER = replace(METHOD, rounds=6)


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


class PlainStudent(nn.Module):
    """Without BatchNorms, and with a part that does not learn.

    Args:
        counts: whether a buffer follows the images.
    """

    def __init__(self, *, counts: bool = False) -> None:
        super().__init__()
        self.fixed = nn.Conv2d(1, 8, 3, padding=1).requires_grad_(False)
        self.head = nn.Linear(8, 4)
        self.counts = counts
        self.register_buffer("brightest", torch.zeros(()))

    def forward(self, images: Tensor) -> Tensor:
        if self.counts and self.training:
            self.brightest.copy_(images.detach().amax())
        return self.head(F.relu(self.fixed(images)).mean(dim=(2, 3)))


def configuration(method: MethodConfig, **engine: Any) -> DistillConfig:
    return DistillConfig(
        device="cpu",
        engine=EngineConfig(precision="float32", **engine),
        generator=GeneratorConfig(noise_dim=8, width=4),
        method=method,
        selection=SelectionConfig(bank_size=128, every=2),
        recording=RecordingConfig(log_every=2, checkpoint_every=2),
    )


def distiller(
    method: MethodConfig, student: nn.Module | None = None, config: DistillConfig | None = None, **engine: Any
) -> Distiller:
    torch.manual_seed(1)
    teacher = models.convnet(channels=(8, 16), num_classes=4, in_channels=1)
    with torch.no_grad():
        for _ in range(20):
            teacher(torch.randn(32, *IMAGE_SHAPE))
    torch.manual_seed(2)
    student = student or models.convnet(channels=(4, 8), num_classes=4, in_channels=1)
    return Distiller(teacher, student, config or configuration(method, **engine), image_shape=IMAGE_SHAPE)


def state_after_rounds(distilling: Distiller, rounds: int = FEW) -> dict[str, Tensor]:
    """Everything that rounds move, after some of them."""
    with distilling.round.student_placed():
        for _ in range(rounds + distilling.config.method.warm_up):
            distilling.run_round()
    return state(distilling)


def state(distilling: Distiller) -> dict[str, Tensor]:
    values = {
        f"{part}.{name}": value
        for part in ("student", "generator", "connectors")
        for name, value in getattr(distilling.round, part).state_dict().items()
    }
    if distilling.round.image_bank is not None:
        values["bank"] = distilling.round.image_bank.images
    return {name: value.clone() for name, value in values.items()}


class Collectives(TorchDispatchMode):
    """Counts the collectives in a block, and what they send."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "c10d":
            self.calls[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


def states_of(names: Iterable[str]) -> dict[str, dict[str, Tensor]]:
    """After rounds of these methods."""
    return {name: state_after_rounds(distiller(METHODS[name]), ROUNDS if name == FRESH else FEW) for name in names}


def students_of_others() -> dict[str, dict[str, Tensor]]:
    """After a single step: a convolution that is normalised twice has gradients of few right digits."""
    states = {}
    for student in (FunctionalStudent, PlainStudent):
        torch.manual_seed(3)
        distilling = distiller(WITHOUT_TAPS, student())
        with distilling.round.student_placed():
            distilling.round.student_step()
        states[student.__name__] = {name: value.clone() for name, value in distilling.student.state_dict().items()}
    return states


def whole_run() -> dict[str, Tensor]:
    """A run in which the generator collapses and starts again, with the figures of its student."""
    distilling = distiller(replace(METHOD, rounds=2 * FEW))
    found = state_and_figures(distilling)
    assert distilling.collapse_guard.recoveries
    return found


def smallest_run() -> dict[str, Tensor]:
    """A run with the smallest batch that four ranks share, and fewer images to measure agreement on than ranks."""
    method = replace(METHOD, rounds=FEW, batch_size=8)
    config = configuration(method)
    return state_and_figures(distiller(method, config=replace(config, selection=SelectionConfig(bank_size=3, every=1))))


def state_and_figures(distilling: Distiller) -> dict[str, Tensor]:
    """After a run."""
    result = distilling.fit()
    figures = torch.tensor([result.agreement, result.best_agreement, result.best_round, result.images])
    return state(distilling) | {"figures": figures}


class Stopped(Exception):
    """In the middle of a run."""


def stop(network: nn.Module) -> float:
    raise Stopped


def interrupted(folder: Path) -> None:
    """A run that ends in its fourth round of six, after a checkpoint of the second one."""
    distilling = distiller(LONGER)
    distilling.evaluate = lambda network: 0.0 if distilling.round_index < 4 else stop(network)
    with pytest.raises(Stopped):
        distilling.fit(folder)


def resumed(folder: Path) -> dict[str, Tensor]:
    """Its end."""
    distilling = distiller(LONGER)
    distilling.fit(folder, resume=True)
    return state(distilling)


def unused_parts_stay(distilling: Distiller) -> None:
    """A turn reduces the gradients of the network that it moves, and leaves those of the other as they are."""
    distilling.round.student_step()
    gradients = [p.grad.clone() for p in distilling.student.parameters()]
    assert all(p.grad is None for p in distilling.generator.parameters())
    distilling.round.generator_step()
    assert all(torch.equal(p.grad, g) for p, g in zip(distilling.student.parameters(), gradients, strict=True))


def ranks_that_drift_apart() -> None:
    """Differences between the ranks' networks are found at the next reading, be they of the last bit of one weight."""
    with pytest.raises(RankError, match="By round 2 rank 1 has another student than rank 0"):
        distiller(WITHOUT_TAPS, PlainStudent(counts=True)).fit()
    distilling = distiller(METHOD)
    if not distilling.ranks.first:
        with torch.no_grad():
            weight = distilling.generator.state_dict()["projection.weight"].view(-1)[:1]
            weight.copy_(torch.nextafter(weight, weight + 1))
    with pytest.raises(RankError, match="By round 2 rank 1 has another generator than rank 0"):
        distilling.fit()


def refusals() -> None:
    """Of what ranks cannot share."""
    with pytest.raises(ConfigurationError, match=r"batch_size is 10, and 2 ranks share it: .* multiple of 4"):
        distiller(replace(METHOD, batch_size=10))
    with pytest.raises(ConfigurationError, match="BatchNorms take their statistics of the images of all ranks"):
        distiller(METHOD, fuse_batchnorm="on")
    with pytest.raises(ModelError, match="The student is a DistributedDataParallel.*its .module"):
        distiller(WITHOUT_TAPS, DistributedDataParallel(PlainStudent()))
    with pytest.raises(ModelError, match=r"its fixed.weight is a DTensor.*before fully_shard"):
        distiller(WITHOUT_TAPS, fully_shard(PlainStudent()))
    rank = current_ranks().rank
    with pytest.raises(ConfigurationError, match="Rank 1 of 2 has another method.rounds than rank 0"):
        distiller(replace(METHOD, rounds=ROUNDS + rank))
    torch.manual_seed(rank)
    with pytest.raises(ConfigurationError, match="Rank 1 of 2 has another student than rank 0"):
        distiller(WITHOUT_TAPS, PlainStudent())


def work(of_one: Path, of_two: Path) -> dict[str, Any]:
    """All that is asked of two ranks, in one start of them."""
    results: dict[str, Any] = states_of(METHODS) | students_of_others()
    results["a whole run"] = whole_run()
    results["local"] = state_after_rounds(distiller(METHODS[SHARED], batchnorm="local"))
    results["bfloat16"] = state_after_rounds(distiller(METHODS[AGREEING], sent_gradients="bfloat16"))
    interrupted(of_two)
    results["begun alone"] = resumed(of_one)
    counted = distiller(METHODS[SHARED])
    unused_parts_stay(counted)
    with Collectives() as collectives, NoWaiting():
        counted.round()
    results["collectives"] = collectives.calls
    ranks_that_drift_apart()
    refusals()
    return results


def work_of_four() -> dict[str, dict[str, Tensor]]:
    """All that is asked of four ranks."""
    return states_of(BY_FOUR) | {"the smallest run": smallest_run()}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Of runs that one and that two ranks have begun."""
    return {name: tmp_path_factory.mktemp("runs") / "run" for name in ("begun alone", "begun by two")}


@pytest.fixture(scope="module")
def two(folders, tmp_path_factory) -> list[dict[str, Any]]:
    interrupted(folders["begun alone"])
    return run_ranks(2, work, tmp_path_factory.mktemp("two"), *folders.values())


@pytest.fixture(scope="module")
def four(tmp_path_factory) -> list[dict[str, Any]]:
    return run_ranks(4, work_of_four, tmp_path_factory.mktemp("four"))


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, Tensor]]:
    """What one process computes."""
    runs = {"a whole run": whole_run(), "the smallest run": smallest_run()}
    return states_of(METHODS) | students_of_others() | runs


def deviation(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest relative difference of a tensor."""
    assert found.keys() == expected.keys()
    differences = [(found[name].double() - value.double()).norm() for name, value in expected.items()]
    lengths = [value.double().norm().clamp_min(0.1) for value in expected.values()]  # biases are zero at first
    return max((d / length).item() for d, length in zip(differences, lengths, strict=True))


ROUNDING = 1e-4
"""Measured are 1e-7 in the mean of the tensors, and up to 3e-5 where rounding flips a sign in one of the losses."""


@pytest.mark.parametrize("name", [*METHODS, "FunctionalStudent", "PlainStudent", "a whole run"])
def test_two_ranks_compute_what_one_computes_alone(name, two, alone):
    assert max(deviation(rank[name], alone[name]) for rank in two) < ROUNDING


@pytest.mark.parametrize("name", [*BY_FOUR, "the smallest run"])
def test_four_ranks_compute_what_one_computes_alone(name, four, alone):
    assert max(deviation(rank[name], alone[name]) for rank in four) < ROUNDING
    assert all(torch.equal(rank[name][key], value) for rank in four for key, value in four[0][name].items())


@pytest.mark.parametrize("name", [*METHODS, "FunctionalStudent", "PlainStudent", "a whole run", "local", "bfloat16"])
def test_ranks_hold_the_same_bits(name, two):
    assert all(torch.equal(two[1][name][key], value) for key, value in two[0][name].items())


def test_a_run_goes_on_with_another_number_of_ranks(two, folders, caplog):
    whole = distiller(LONGER)
    whole.fit()
    found = {"begun alone": two[0]["begun alone"], "begun by two": resumed(folders["begun by two"])}
    assert "with a number of ranks of 2 and goes on with 1" in caplog.text
    for name, values in found.items():
        assert deviation(values, state(whole)) < ROUNDING, name


def test_statistics_of_each_share_are_another_computation(two, alone):
    assert deviation(two[0]["local"], alone[SHARED]) > 1e-3


def test_gradients_sent_in_bfloat16_are_near(two, alone):
    assert 1e-5 < deviation(two[0]["bfloat16"], alone[AGREEING]) < 0.1


def test_a_round_has_the_collectives_that_it_needs_and_waits_for_nothing(two):
    """Student of two BatchNorms and two connectors, two steps; generator of four, one step."""
    for rank in two:
        calls = rank["collectives"]
        forward = 2 * (2 + 2) + (4 + 2 + 2)  # the generator's step asks student and connectors as well
        backward = forward
        buckets = 2 + 1
        regularizers = 2 * 2 + 2  # means and variances of all of the teacher's BatchNorms; diversity
        sizes = 2 * 2  # of the teacher's taps in feature matching
        images = 1
        assert sum(calls.values()) == forward + backward + buckets + regularizers + sizes + images, calls


class Talking(Ranks):
    """One rank that speaks to itself, as if there were others."""

    several = True


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_rank_that_speaks_to_itself_computes_what_one_computes_alone(device, monkeypatch, tmp_path):
    """On a GPU by NCCL, in a captured round: all that one GPU can show of several."""
    method = METHODS[SHARED]

    def after(rounds: int, cuda_graph: Literal["on", "off"]) -> dict[str, Tensor]:
        config = replace(configuration(method, cuda_graph=cuda_graph), device=device)
        distilling = distiller(method, config=config)
        with distilling.engine.running():
            values = state_after_rounds(distilling, rounds)
            assert distilling.engine.captured == (cuda_graph == "on")
        return values

    rounds = WARM_UP_ROUNDS + 3
    expected = after(rounds, "off")
    torch.distributed.init_process_group(
        "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo",
        init_method=f"file://{tmp_path}/rendezvous",
        rank=0,
        world_size=1,
    )
    try:
        monkeypatch.setattr("dfad.engine.engine.current_ranks", Talking)
        found = after(rounds, "on" if device == "cuda" else "off")
    finally:
        torch.distributed.destroy_process_group()
    # a GPU adds in another order from run to run
    assert deviation(found, expected) < (1e-2 if device == "cuda" else ROUNDING)


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
