"""The round as one CUDA graph."""

import copy
import gc
import logging
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dfad import models
from dfad.config import (
    AugmentationConfig,
    EngineConfig,
    ImageBankConfig,
    InterpolationConfig,
    MethodConfig,
    OptimizerConfig,
    OptimizersConfig,
    RandomFieldsConfig,
)
from dfad.distillation.distiller import Distiller
from dfad.engine.cuda_graph import CHECKED_WITH, WARM_UP_ROUNDS, RoundGraphs
from dfad.errors import ConfigurationError
from dfad.presets import PRESETS
from tests.conftest import IMAGE_SHAPE, with_method
from tests.engine.fake_cuda import Generator, World

ROUNDS = WARM_UP_ROUNDS + 5
GPU = torch.device("cuda")


class TestWithoutAGpu:
    """The capture against a stand-in for PyTorch's."""

    @pytest.fixture
    def world(self, monkeypatch) -> World:
        world = World()
        world.install(monkeypatch)
        return world

    @pytest.fixture
    def graphs(self, world) -> RoundGraphs:
        return RoundGraphs(GPU, required=False)

    def test_is_captured_after_a_few_rounds_and_replayed(self, world, graphs):
        generator = Generator(world)
        drawn = []

        def round_():
            drawn.append((generator.draw(), world.default.draw()))
            return {"value": drawn[-1]}

        for _ in range(ROUNDS):
            results = graphs.run(round_, [generator])
        (graph,) = world.graphs
        assert len(drawn) == WARM_UP_ROUNDS + 1  # and the capture
        assert graph.replays == ROUNDS - WARM_UP_ROUNDS
        assert results == {"value": drawn[-1]}
        assert graphs.replaying
        assert graphs.captures == 1
        assert world.stream == "default stream"

    @pytest.mark.parametrize("breaks", [True, False], ids=["the device", "an optimizer"])
    def test_a_refusal_leaves_everything_as_it_was(self, breaks, world, graphs, caplog):
        generator = Generator(world)
        drawn = []

        def round_():
            drawn.append((generator.draw(), world.default.draw()))
            if breaks:
                world.wait()
            elif world.capturing:
                raise RuntimeError("capturable is False.")
            return {}

        with caplog.at_level(logging.WARNING, logger="dfad"):
            for _ in range(ROUNDS):
                graphs.run(round_, [generator])
        assert world.stream == "default stream"
        assert not world.pools
        assert not world.allocating
        assert not graphs.replaying
        assert graphs.captures == 0
        del drawn[WARM_UP_ROUNDS]  # the attempt
        assert drawn == [(i, i) for i in range(1, ROUNDS + 1)]
        (message,) = caplog.messages  # and no second attempt
        reason = "operation not permitted when stream is capturing" if breaks else "capturable is False"
        assert reason in message
        assert "`raise RuntimeError(" in message  # the line of Python
        assert ("in wait, fake_cuda.py" if breaks else "in round_, test_cuda_graph.py") in message

    def test_a_refusal_is_an_error_where_a_graph_is_asked_for(self, world):
        graphs = RoundGraphs(GPU, required=True)
        for _ in range(WARM_UP_ROUNDS):
            graphs.run(world.wait)
        with pytest.raises(ConfigurationError, match=r"engine\.cuda_graph is on, but .* not permitted when stream"):
            graphs.run(world.wait)

    def test_an_interruption_in_a_capture_is_one(self, world, graphs):
        def round_():
            if world.capturing:
                world.broken = True
                raise KeyboardInterrupt
            return {}

        for _ in range(WARM_UP_ROUNDS):
            graphs.run(round_)
        with pytest.raises(KeyboardInterrupt):
            graphs.run(round_)
        assert world.stream == "default stream"
        assert not world.pools

    def test_the_collector_runs_before_a_capture_and_not_in_it(self, world, graphs):
        class Owner:
            """A reference cycle, which only the garbage collector frees."""

            def __init__(self):
                self.itself = self

        seen = []

        def round_():
            if world.capturing:
                seen.append((gc.isenabled(), garbage()))
            return {}

        garbage = weakref.ref(Owner())
        for _ in range(ROUNDS):
            graphs.run(round_)
        assert seen == [(False, None)]
        assert gc.isenabled()

    def test_what_owns_a_round_is_freed_without_the_collector(self, world):
        class Owner:
            def __init__(self):
                self.graphs = RoundGraphs(GPU, required=False)

            def round(self):
                return {}

        owner = Owner()
        for _ in range(ROUNDS):
            owner.graphs.run(owner.round)
        assert owner.graphs.replaying
        alive = weakref.ref(owner)
        gc.disable()
        try:
            del owner
            assert alive() is None
        finally:
            gc.enable()

    def test_each_round_has_its_own_graph(self, world, graphs):
        ran = []

        class Owner:
            def first(self):
                ran.append("first")
                return {"value": 1}

            def second(self):
                ran.append("second")
                return {"value": 2}

        owner = Owner()
        for _ in range(ROUNDS):
            assert graphs.run(owner.first) == {"value": 1}
            assert graphs.run(owner.second) == {"value": 2}
        assert [graph.replays for graph in world.graphs] == [ROUNDS - WARM_UP_ROUNDS] * 2
        assert len(ran) == 2 * (WARM_UP_ROUNDS + 1)

    def test_a_refusal_takes_other_graphs_with_the_same_generators_along(self, world, graphs):
        """Old graphs would still advance generator states that are no longer used."""
        generator = Generator(world)

        def good():
            generator.draw()
            return {}

        def bad():
            generator.draw()
            world.wait()
            return {}

        for _ in range(ROUNDS):
            graphs.run(good, [generator])
        for _ in range(ROUNDS):
            graphs.run(bad, [generator])
        for _ in range(ROUNDS):
            graphs.run(good, [generator])
        assert generator.state.offset == 3 * ROUNDS

    def test_forgetting_captures_anew(self, world, graphs):
        def round_():
            return {}

        for _ in range(ROUNDS):
            graphs.run(round_)
        graphs.forget()
        assert not graphs.replaying
        for _ in range(ROUNDS):
            graphs.run(round_)
        assert [graph.replays for graph in world.graphs] == [ROUNDS - WARM_UP_ROUNDS] * 2
        assert graphs.captures == 2

    def test_loading_a_state_and_the_end_of_a_run_drop_the_graph(self, world, teacher, config):
        """Loading replaces the optimizers' tensors, but a graph would still use the old ones."""
        distiller = make(teacher, with_method(config, rounds=2 * ROUNDS))
        distiller.engine.graphs = graphs = RoundGraphs(GPU, required=True)
        replaying = []
        for _ in range(WARM_UP_ROUNDS + 1):
            distiller.run_round()
        replaying.append(graphs.replaying)
        distiller.load_state_dict(distiller.state_dict())
        replaying.append(graphs.replaying)
        assert distiller.fit().captured
        replaying.append(graphs.replaying)
        assert replaying == [True, False, False]
        assert graphs.captures == 2
        assert distiller.engine.captured

    def test_every_stream_that_a_preset_draws_from_is_registered(self, world, teacher, config):
        """Without that each replay would draw the numbers of the capture again."""
        method = PRESETS["mnist"].method
        method = replace(method, batch_size=16, student_steps=1, warm_up=1, image_bank=ImageBankConfig(size=64))
        distiller = make(teacher, replace(config, method=method))
        distiller.engine.graphs = RoundGraphs(GPU, required=True)
        streams = distiller.round.rng
        drawn = set()
        for _ in range(method.warm_up + WARM_UP_ROUNDS + 1):
            before = {name: stream.get_state() for name, stream in streams.items()}
            distiller.run_round()
            drawn |= {name for name, state in before.items() if not torch.equal(state, streams[name].get_state())}
        (graph,) = world.graphs
        assert drawn == {"noise", "mixing", "augmentation", "image_bank", "random_fields"}
        assert {name for name, stream in streams.items() if any(stream is known for known in graph.streams)} >= drawn

    def test_a_distiller_takes_its_graph_along_without_the_collector(self, world, teacher, config):
        distiller = make(teacher, with_method(config, rounds=ROUNDS))
        distiller.engine.graphs = RoundGraphs(GPU, required=True)
        for _ in range(WARM_UP_ROUNDS + 1):
            distiller.run_round()
        graph = weakref.ref(world.graphs.pop())
        gc.disable()
        try:
            del distiller
            assert graph() is None
        finally:
            gc.enable()

    def test_private_interfaces_are_those_that_were_checked(self):
        """The names that a failed capture is cleaned up by; read their source in a newer version, then name it."""
        assert torch.__version__.rpartition(".")[0] in CHECKED_WITH
        stub = (Path(torch.__file__).parent / "_C" / "__init__.pyi").read_text()
        for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
            assert f"def {name}(device: _int, mempool_id: tuple[_int, _int]) -> None" in stub


@pytest.mark.gpu
class TestOnAGpu:
    @pytest.fixture(autouse=True)
    def deterministic_convolutions(self, monkeypatch):
        """Deterministic algorithms in general fill fresh memory, which is no part of the work to be captured."""
        torch.use_deterministic_algorithms(False)
        monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)

    @staticmethod
    def fused_norms(precision, graph):
        """Without a graph they would be PyTorch's."""
        return EngineConfig(precision=precision, cuda_graph=graph, fuse_batchnorm="on")

    @pytest.fixture
    def on_gpu(self, config):
        config = replace(config, device="cuda", engine=replace(config.engine, cuda_graph="on"))
        return with_method(config, rounds=2 * ROUNDS)

    # of what accumulates in another order: a unit in the last place of bfloat16 is 0.8 %
    @pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-5), ("bfloat16", 3e-2), ("float16", 3e-2)])
    def test_the_same_seeds_give_the_same_losses_captured_and_not(self, precision, tolerance, teacher, on_gpu):
        runs = {}
        for graph in ("on", "off"):
            distiller = make(teacher, replace(on_gpu, engine=self.fused_norms(precision, graph)))
            runs[graph] = losses(distiller, ROUNDS)
            assert distiller.engine.captured == (graph == "on")
        assert torch.tensor(runs["on"]).isfinite().all()
        torch.testing.assert_close(torch.tensor(runs["on"]), torch.tensor(runs["off"]), rtol=tolerance, atol=tolerance)

    def test_two_streams_compute_what_one_computes(self, teacher, on_gpu):
        runs = {}
        for streams in ("on", "off"):
            engine = EngineConfig(precision="float32", cuda_graph="on", two_streams=streams)
            runs[streams] = losses(make(teacher, replace(on_gpu, engine=engine)), 2 * ROUNDS)
        torch.testing.assert_close(torch.tensor(runs["on"]), torch.tensor(runs["off"]), rtol=1e-5, atol=1e-5)

    def test_bank_views_and_mixing_go_on_in_a_graph(self, teacher, on_gpu):
        recipe = with_method(
            on_gpu,
            warm_up=2,
            generator_steps=2,
            adversary="agreeing",
            interpolation=InterpolationConfig(weight=0.5, labels="teacher", step="within"),
            image_bank=ImageBankConfig(size=64),
            random_fields=RandomFieldsConfig(share=0.25),
            augmentation=AugmentationConfig(flip=True, crop=0.25, cutout=0.25, colour=0.1),
        )
        runs, written = {}, {}
        for graph in ("on", "off"):
            distiller = make(teacher, replace(recipe, engine=self.fused_norms("float32", graph)))
            for _ in range(recipe.method.warm_up):
                distiller.run_round()
            runs[graph] = losses(distiller, ROUNDS)
            written[graph] = distiller.round.image_bank.written.item()
        torch.testing.assert_close(torch.tensor(runs["on"]), torch.tensor(runs["off"]), rtol=1e-3, atol=1e-3)
        assert len(set(runs["on"])) == ROUNDS
        assert written["on"] == written["off"] == (2 + 2 * ROUNDS) * recipe.method.batch_size

    def test_a_replay_draws_new_noise_and_follows_the_schedule(self, teacher, on_gpu):
        distiller = make(teacher, on_gpu)
        found = losses(distiller, ROUNDS)
        assert distiller.engine.captured
        assert len(set(found)) == ROUNDS
        progress = (ROUNDS - 1) / (2 * ROUNDS)
        optimizer = distiller.config.optimizer.student
        rate = distiller.round.student_optimizer.param_groups[0]["lr"]
        assert rate.item() == pytest.approx(optimizer.lr * optimizer.factor(progress))

    def test_a_resumed_run_equals_an_uninterrupted_one(self, teacher, on_gpu):
        whole = losses(make(teacher, on_gpu), 2 * ROUNDS)
        first = make(teacher, on_gpu)
        losses(first, ROUNDS)
        second = make(teacher, on_gpu)
        second.load_state_dict(first.state_dict())
        resumed = losses(second, ROUNDS)
        assert first.engine.captured
        assert second.engine.captured
        torch.testing.assert_close(torch.tensor(resumed), torch.tensor(whole[ROUNDS:]), rtol=1e-5, atol=1e-5)

    def test_loading_a_state_after_a_capture_goes_on_from_it(self, teacher, on_gpu):
        distiller = make(teacher, on_gpu)
        losses(distiller, ROUNDS)
        state = copy.deepcopy(distiller.state_dict())
        expected = losses(distiller, ROUNDS)
        distiller.load_state_dict(state)
        found = losses(distiller, ROUNDS)
        assert distiller.engine.graphs.captures == 2
        torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-5, atol=1e-5)

    def test_a_round_that_waits_for_the_device_is_named_and_runs_uncaptured(self, caplog):
        generator = torch.Generator("cuda").manual_seed(0)
        torch.manual_seed(1)
        values = []

        def round_():
            drawn = torch.randn((), generator=generator, device="cuda")
            values.append(drawn.item() + torch.rand((), device="cuda").item())
            return {"value": drawn}

        graphs = RoundGraphs(GPU, required=False)
        stream = torch.cuda.current_stream()
        with caplog.at_level(logging.WARNING, logger="dfad"):
            for _ in range(ROUNDS):
                graphs.run(round_, [generator])
        assert not graphs.replaying
        assert torch.cuda.current_stream() == stream
        assert any("drawn.item()" in message and "cannot be captured" in message for message in caplog.messages)
        expected = torch.Generator("cuda").manual_seed(0)
        torch.manual_seed(1)
        assert values == [
            torch.randn((), generator=expected, device="cuda").item() + torch.rand((), device="cuda").item()
            for _ in range(ROUNDS)
        ]

    def test_a_capture_after_one_that_failed(self, teacher, on_gpu):
        graphs = RoundGraphs(GPU, required=False)
        ones = torch.ones(3, device="cuda")

        def waiting():
            return {"value": ones * ones.sum().item()}

        for _ in range(ROUNDS):
            graphs.run(waiting)
        assert not graphs.replaying
        distiller = make(teacher, on_gpu)
        losses(distiller, ROUNDS)
        assert distiller.engine.captured

    def test_the_fused_kernels_run_in_the_graph(self, teacher, on_gpu):
        distiller = make(teacher, on_gpu)
        losses(distiller, ROUNDS)
        assert distiller.engine.captured
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            distiller.run_round()
            torch.cuda.synchronize()
        names = " ".join(event.key for event in profile.key_averages())
        for kernel in ("activation_boundary", "interpolated_kl"):
            assert kernel in names, kernel

    def test_no_part_is_left_out_for_networks_of_this_project(self, on_gpu, caplog):
        settings = replace(on_gpu, engine=EngineConfig(), method=replace(MethodConfig(), batch_size=32))
        with caplog.at_level(logging.INFO, logger="dfad.engine.placement"):
            Distiller(models.resnet20(), models.resnet20(), settings, image_shape=(3, 32, 32))
            Distiller(models.lenet5(), models.lenet5_half(), settings, image_shape=(1, 28, 28))
        left_out = [record.getMessage() for record in caplog.records if record.name == "dfad.engine.placement"]
        assert left_out == []

    @pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
    def test_whole_rounds_with_other_networks_and_optimizers(self, name, on_gpu):
        settings = replace(on_gpu, method=replace(MethodConfig(), rounds=ROUNDS, batch_size=32, student_steps=2))
        optimizer = OptimizerConfig(name=name, lr=1e-3)
        settings = replace(settings, optimizer=OptimizersConfig(optimizer, optimizer))
        distiller = Distiller(models.resnet20(), models.resnet20(), settings, image_shape=(3, 32, 32))
        assert torch.tensor(losses(distiller, ROUNDS)).isfinite().all()
        assert distiller.engine.captured


def losses(distiller: Distiller, rounds: int) -> list[tuple[float, float]]:
    found = []
    for _ in range(rounds):
        terms = distiller.run_round()
        found.append((terms["student_loss"].item(), terms["generator_loss"].item()))
    return found


def make(teacher, config) -> Distiller:
    torch.manual_seed(2)
    student = models.convnet(channels=(4, 8), num_classes=4, in_channels=1)
    return Distiller(teacher, student, config, image_shape=IMAGE_SHAPE)
