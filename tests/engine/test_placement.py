"""Networks that are placed: which parts of the engine they get, and how they come back."""

import copy
import io
import logging
import pickle
import random
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, prune, vector_to_parameters

import dfad
from dfad.config import ActivationConfig, DistillConfig, EngineConfig, TeacherConfig
from dfad.distillation.distiller import Distiller
from dfad.engine import Engine
from dfad.engine import placement as placement_module
from dfad.engine.calls import present_call, replace_call, replaced_call
from dfad.engine.comparison import Comparison
from dfad.engine.placement import Placement
from dfad.engine.tracing import NotPlain, Traces, plain_parts, trace
from dfad.errors import ConfigurationError, ModelError, RunFolderError
from dfad.losses import ActivationBoundaryLoss, BatchNormStatisticsLoss, Discrepancy, InterpolatedKLDivLoss
from dfad.models.generator import Generator
from dfad.models.outputs import as_outputs
from dfad.models.taps import Outputs, with_taps
from tests.conftest import IMAGE_SHAPE, with_method

CPU = torch.device("cpu")


def engine(**switches) -> Engine:
    return Engine(EngineConfig(**{"precision": "float32", **switches}), fused=True, device=CPU)


def without_taps(config: DistillConfig, **method) -> DistillConfig:
    return with_method(config, activation=ActivationConfig(), **method)


class Small(nn.Module):
    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        return self.fc(F.relu(self.bn2(self.conv2(x))).mean((2, 3)))


class Flattening(Small):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6 * 64, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        return self.fc(x.view(x.shape[0], -1))


class ReadsFormat(Small):
    """Computes something else where its images are channels-last, which no tracing would find."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * (3 if self.conv2.weight.is_contiguous(memory_format=torch.channels_last) else 1))


class OnTensorCores(Small):
    """Like a GPU whose products of float32 are TF32, in another order where its weights are channels-last."""

    def forward(self, x: Tensor) -> Tensor:
        rounds = torch.backends.cudnn.conv.fp32_precision != "ieee"  # type: ignore[attr-defined]
        reordered = self.conv2.weight.is_contiguous(memory_format=torch.channels_last)
        return super().forward(x) * (1 + 2e-3 * (rounds and reordered))


class TestComparison:
    def place(self, network: nn.Module, **switches) -> Placement:
        return Placement(
            engine(**switches), network, role="student", input_shape=IMAGE_SHAPE, batch_size=16, read=as_outputs
        )

    def test_a_plain_network_gets_every_part(self):
        assert self.place(Small()).parts == ["channels_last", "fuse_batchnorm"]

    def test_view_does_without_channels_last(self, caplog):
        with caplog.at_level(logging.INFO, logger="dfad"):
            placement = self.place(Flattening())
        assert placement.parts == ["fuse_batchnorm"]
        lines = [m for m in caplog.messages if "Without engine.channels_last for the student Flattening" in m]
        assert len(lines) == 1
        assert "view size is not compatible" in lines[0]
        images = torch.randn(4, *IMAGE_SHAPE).contiguous(memory_format=torch.channels_last)
        assert placement.take()(images).shape == (4, 4)

    @pytest.mark.parametrize("network", [Flattening(), ReadsFormat()], ids=lambda network: type(network).__name__)
    def test_what_is_demanded_is_an_error(self, network):
        with pytest.raises(ConfigurationError, match="engine.channels_last is on, but not for the student"):
            self.place(network, channels_last="on")

    def test_a_part_that_changes_values_is_left_out(self, caplog):
        with caplog.at_level(logging.INFO, logger="dfad"):
            assert "channels_last" not in self.place(ReadsFormat()).parts
        assert any("Without engine.channels_last for the student ReadsFormat: it changes" in m for m in caplog.messages)

    def test_products_are_compared_in_the_precision_of_float32(self):
        assert torch.backends.cudnn.allow_tf32  # PyTorch's default
        assert "channels_last" in self.place(OnTensorCores()).parts
        assert torch.backends.cudnn.allow_tf32

    def test_a_gradient_that_is_nothing_but_rounding_is_no_change(self):
        """That of the bias before the generator's last BatchNorm, whose exact value is zero."""
        demanded = engine(precision="bfloat16", channels_last="on", fuse_batchnorm="off")
        generator = Generator((3, 32, 32), noise_dim=32, width=64)
        placement = Placement(demanded, generator, role="generator", input_shape=(32,), batch_size=20)
        assert "channels_last" in placement.parts

    @pytest.mark.parametrize("fault", ["value", "gradient", "state", "draw"])
    def test_the_guilty_part_is_found(self, fault, monkeypatch, caplog):
        original = placement_module.fuse_batchnorm

        def faulty(network: nn.Module, **options: object) -> None:
            original(network, **options)
            call = present_call(network)

            def wrong(x: Tensor) -> Tensor:
                y = call(x)
                if fault == "value":
                    return y * 1.01
                if fault == "gradient":
                    return y.detach() + 0.9 * (y - y.detach())
                if fault == "state":
                    network.bn1.running_mean.data.add_(0.1)
                return y + (0.1 * torch.rand(()) if fault == "draw" else 0)

            replace_call(network, wrong)

        monkeypatch.setattr(placement_module, "fuse_batchnorm", faulty)
        with caplog.at_level(logging.INFO, logger="dfad"):
            assert self.place(Small()).parts == ["channels_last"]
        assert any(
            m.startswith("Without engine.fuse_batchnorm for the student Small: it changes") for m in caplog.messages
        )

    def test_a_network_that_fails_is_named(self):
        class Failing(Small):
            def forward(self, x: Tensor) -> Tensor:
                return (-super().forward(x.detach()).abs()).log() if self.training else super().forward(x)

        class Raising(Small):
            def forward(self, x: Tensor) -> Tensor:
                assert not x.requires_grad, "no gradients here"
                return super().forward(x)

        with pytest.raises(ModelError, match="the student Failing returns NaN or infinity"):
            self.place(Failing())
        with pytest.raises(ModelError, match="the student Raising fails .* no gradients here"):
            self.place(Raising())

    def test_a_network_that_cannot_be_repeated_keeps_its_call(self, caplog):
        class Restless(Small):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x) + random.SystemRandom().random()

        with caplog.at_level(logging.INFO, logger="dfad"):
            placement = self.place(Restless())
        assert "fuse_batchnorm" not in placement.parts
        assert any("results differ from call to call" in m for m in caplog.messages)

    def test_it_leaves_the_network_and_the_random_streams_as_they_were(self):
        network = Small()
        before = copy.deepcopy(network.state_dict())
        streams = torch.get_rng_state(), random.getstate()
        self.place(network)
        torch.testing.assert_close(network.state_dict(), before, rtol=0, atol=0)
        assert torch.equal(torch.get_rng_state(), streams[0])
        assert random.getstate() == streams[1]
        assert all(parameter.grad is None for parameter in network.parameters())

    def test_it_takes_no_more_images_than_two_rounds(self, teacher, config):
        seen = []

        class Counting(Small):
            def forward(self, x: Tensor) -> Tensor:
                assert isinstance(x, Tensor)  # which no trace answers, so that each call comes here
                seen.append(len(x))
                return super().forward(x)

        config = without_taps(config, batch_size=40, student_steps=5)
        distiller = Distiller(Small(), Counting(), config, image_shape=IMAGE_SHAPE)
        compared = sum(seen)
        seen.clear()
        for _ in range(2):
            distiller.round()
        assert 0 < compared <= sum(seen)

    @pytest.mark.parametrize("precision", ["float32", "bfloat16"])
    @pytest.mark.parametrize("learns", [True, False])
    def test_it_traces_a_plain_network_once(self, learns, precision):
        """Twice in its mode and once in the other, for however many copies."""
        traced = []

        class Counting(Small):
            def forward(self, x: Tensor) -> Tensor:
                if type(x) is not Tensor:
                    traced.append(x)
                return super().forward(x)

        own = {} if learns else {"own": ["fold_batchnorm", "weights"]}
        network = Counting().train(learns).requires_grad_(learns)
        placement = Placement(engine(precision=precision), network, input_shape=IMAGE_SHAPE, batch_size=16, **own)
        assert {"channels_last", "fuse_batchnorm"} <= set(placement.parts)
        placement.take()
        assert len(traced) == 3

    def test_a_plain_network_is_run_again_as_it_was_given(self, monkeypatch):
        """Not with the statistics of the passes before."""
        given = []
        measure = Comparison._run

        def run(self, network, **options):
            if options.get("perturbed") or options.get("watched"):
                given.append({name: buffer.clone() for name, buffer in network.named_buffers()})
            return measure(self, network, **options)

        monkeypatch.setattr(Comparison, "_run", run)
        network = Small()
        network(torch.randn(8, *IMAGE_SHAPE))
        self.place(network)
        first, second = given
        assert all(torch.equal(value, second[name]) for name, value in first.items())
        assert all(torch.equal(buffer, first[name]) for name, buffer in network.named_buffers())

    def test_second_passes_of_a_plain_network_are_measured_where_the_first_do_not_explain_them(self, monkeypatch):
        measured = []
        measure = Comparison._measure

        def note(self, *, again):
            measured.append(again)
            measure(self, again=again)

        def explains(self, values, **options):
            return None if measured[-1] else "it changes a value"

        monkeypatch.setattr(Comparison, "_measure", note)
        monkeypatch.setattr(Comparison, "_unexplained", explains)
        assert self.place(Small()).parts == ["channels_last", "fuse_batchnorm"]
        assert measured == [False, True]


class TestTraces:
    """Traces of a network serve its copies."""

    class Shared(nn.Module):
        """Not plain itself; one of its parts is there under two names."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.other = Small(), Small(4)
            self.again = nn.ModuleList([self.first])
            self.register_forward_hook(lambda *_: None)

        def forward(self, x: Tensor) -> Tensor:
            return self.first(x) + self.other(x)

    def test_the_parts_of_copies_are_those_of_the_copy(self):
        traces, network = Traces(), self.Shared()
        for copied in (network, copy.deepcopy(network), copy.deepcopy(network)):
            parts = list(traces.parts(copied, training=True))
            assert [part.network for part in parts] == [copied.first, copied.other]
            for part, known in zip(parts, plain_parts(copied, training=True), strict=False):
                assert str(part.graph) == str(known.graph)
                assert (part.replaceable, part.modes) == (known.replaceable, known.modes)
                part.graph.erase_node(next(reversed(part.graph.nodes)))  # which no other sees

    def test_modes_are_those_of_the_copy(self):
        class Differs(Small):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x if self.training else 2 * x)

        traces, network = Traces(), Differs()
        copied = copy.deepcopy(network)
        traces.whole(network, training=True)
        part = traces.whole(copied, training=True)
        assert part.holds()
        copied.eval()
        assert not part.holds()

    def test_a_reason_is_given_to_each(self):
        traces, network = Traces(), self.Shared()
        for copied in (network, copy.deepcopy(network)):
            with pytest.raises(NotPlain, match="Shared is not rewritten: it has hooks"):
                traces.whole(copied, training=False)

    def test_a_network_that_was_changed_in_between_is_traced_again(self):
        network = Small()
        placement = Placement(engine(), network, role="student", input_shape=IMAGE_SHAPE, read=as_outputs)
        placement.take()
        placement.give_back()
        network.bn2, network.fc = nn.Identity(), nn.Linear(6, 7)
        placed = placement.take()
        images = torch.randn(4, *IMAGE_SHAPE)
        expected = copy.deepcopy(network)
        replace_call(expected, None)
        torch.testing.assert_close(placed(images), expected(images))
        placement.give_back()


class TestAdmission:
    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (lambda n: n.bn1.register_forward_hook(lambda *_: None), "has hooks"),
            (lambda n: n.conv1.weight.register_hook(lambda g: g), "a parameter with hooks"),
            (lambda n: nn.utils.parametrizations.weight_norm(n.conv1), "has a parametrisation"),
            (lambda n: prune.random_unstructured(n.conv1, "weight", 0.5), "has hooks"),
            (lambda n: setattr(n, "bn1", nn.SyncBatchNorm(6)), "not known to be plain"),
            (lambda n: setattr(n.conv1, "forward", lambda x: x), "a forward that is set on the instance"),
            (lambda n: n.conv1.compile(backend="eager"), "is compiled"),
        ],
    )
    def test_what_is_not_plain(self, change, words):
        network = Small()
        change(network)
        with pytest.raises(NotPlain, match=f"Small is not rewritten: its .*{words}"):
            trace(network, training=True)

    def test_hooks_for_all_modules(self):
        handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
        try:
            with pytest.raises(NotPlain, match="hooks are registered for all modules"):
                trace(Small(), training=True)
        finally:
            handle.remove()

    def test_tracing_leaves_nothing_behind(self):
        class Remembering(Small):
            last = None

            def forward(self, x: Tensor) -> Tensor:
                self.last = x
                return super().forward(x)

        network = Remembering()
        with pytest.raises(NotPlain, match="its forward pass changes last"):
            trace(network, training=True)
        assert network.last is None

    def test_the_network_is_named_once_with_its_reason(self, caplog):
        network = Small()
        network.bn1.register_forward_hook(lambda *_: None)
        with caplog.at_level(logging.INFO, logger="dfad"):
            Placement(engine(), network, role="student")
        assert sum("its bn1 (BatchNorm2d) has hooks" in m for m in caplog.messages) == 1


class TestGivenBack:
    @pytest.fixture
    def student(self, config):
        student = Small()
        student.bn1.eval()
        student.conv1.weight.requires_grad_(False)
        self.before = self.look(student)
        config = replace(without_taps(config), teacher=TeacherConfig(image_size=8))
        dfad.distill(Small().eval(), student, config)
        return student

    def look(self, network: nn.Module) -> dict[str, object]:
        tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
        found = {name: (t.stride(), t.dtype, t.device, t.requires_grad, t.grad) for name, t in tensors.items()}
        return {**found, **{name: (m.training, replaced_call(m)) for name, m in network.named_modules()}}

    def test_it_is_plain_again(self, student):
        assert self.look(student) == self.before

    def test_its_head_can_be_replaced_and_tuned(self, student):
        student.fc = nn.Linear(6, 3)
        loss = student.train()(torch.randn(8, *IMAGE_SHAPE)).sum()
        loss.backward()
        assert student.fc.weight.grad is not None

    def test_hooks_are_called(self, student):
        seen = []
        student.bn2.register_forward_hook(lambda *_: seen.append(1))
        student.train()(torch.randn(8, *IMAGE_SHAPE))
        assert seen == [1]

    def test_what_is_done_with_networks(self, student):
        images = torch.randn(8, *IMAGE_SHAPE)
        expected = student.eval()(images)
        file = io.BytesIO()
        torch.save(student, file)
        file.seek(0)
        networks = [copy.deepcopy(student), pickle.loads(pickle.dumps(student)), torch.load(file, weights_only=False)]
        networks.append(torch.export.export(student, (images,)).module())
        networks.append(torch.compile(student, backend="eager", fullgraph=True))
        for network in networks:
            torch.testing.assert_close(network(images), expected)
        vector = parameters_to_vector(student.parameters())
        assert vector.numel() == sum(p.numel() for p in student.parameters())
        prune.l1_unstructured(student.conv2, "weight", 0.5)
        assert not torch.allclose(student(images), expected)

    def test_its_memory_is_that_which_it_came_with(self, config):
        student = Small()
        flat = parameters_to_vector(student.parameters()).detach()
        vector_to_parameters(flat, student.parameters())
        before = {name: tensor.data_ptr() for name, tensor in student.state_dict().items()}
        dfad.distill(Small().eval(), student, replace(without_taps(config), teacher=TeacherConfig(image_size=8)))
        assert {name: tensor.data_ptr() for name, tensor in student.state_dict().items()} == before
        assert torch.equal(parameters_to_vector(student.parameters()), flat)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    def test_its_dtype_is_that_which_it_came_with(self, dtype, config):
        student = Small().to(dtype)
        tensors = [*student.parameters(), *student.buffers()]
        weights = [tensor.clone() for tensor in tensors]
        dfad.distill(Small().eval(), student, replace(without_taps(config), teacher=TeacherConfig(image_size=8)))
        assert [*map(id, (*student.parameters(), *student.buffers()))] == [*map(id, tensors)]
        assert all(tensor.dtype in (dtype, torch.int64) for tensor in tensors)
        assert any(not torch.equal(tensor, before) for tensor, before in zip(tensors, weights, strict=True))

    def test_gradients_switched_off_around_it_are_its_caller_s_matter(self, config, caplog):
        teacher, student = Small().eval(), Small()
        config = replace(without_taps(config), teacher=TeacherConfig(image_size=8))
        before = student.fc.weight.clone()
        for context in (torch.no_grad(), torch.inference_mode()):
            with context:
                dfad.distill(teacher, student, config)
            assert not torch.equal(student.fc.weight, before)
            before = student.fc.weight.clone()
        assert "No gradient flows" not in caplog.text

    def test_after_an_exception(self, config, tmp_path):
        student = Small()
        before = self.look(student)
        (tmp_path / "config.yaml").write_text("")
        distiller = Distiller(Small(), student, without_taps(config), image_shape=IMAGE_SHAPE)
        assert self.look(student) != before
        with pytest.raises(RunFolderError):
            distiller.fit(tmp_path)
        assert self.look(student) == before

    @pytest.mark.parametrize("fused", [True, False])
    def test_losses_can_be_pickled(self, fused):
        a, b = torch.randn(3, 4), torch.randn(3, 4)
        for loss in (ActivationBoundaryLoss(fused=fused), Discrepancy("kl", fused=fused)):
            assert torch.equal(pickle.loads(pickle.dumps(loss))(a, b), loss(a, b))
        loss = InterpolatedKLDivLoss(fused=fused)
        assert torch.equal(copy.deepcopy(loss)(a, b, 0.3), loss(a, b, 0.3))
        norm = nn.BatchNorm2d(3)
        features = [torch.randn(2, 3, 4, 4)]
        statistics = BatchNormStatisticsLoss([norm])
        assert torch.equal(pickle.loads(pickle.dumps(statistics))(features), statistics(features))


class TestTaps:
    def test_of_a_network_that_may_not_be_traced_they_come_by_hooks(self):
        network = Small()
        network.bn1.register_forward_hook(lambda module, inputs, output: output + 1)
        tapped = with_taps(network, ["bn1", "bn2"])
        images = torch.randn(4, *IMAGE_SHAPE)
        outputs = tapped.eval()(images)
        assert isinstance(outputs, Outputs)
        assert torch.equal(outputs.logits, network(images))
        assert torch.equal(outputs.taps[0], network.bn1(network.conv1(images)))
        assert tapped.state_dict().keys() == network.state_dict().keys()
        assert dict(tapped.named_parameters()).keys() == dict(network.named_parameters()).keys()
        assert len(network.bn1._forward_hooks) == 1
        assert torch.equal(copy.deepcopy(tapped)(images).taps[1], outputs.taps[1])

    def test_each_mode_has_its_own_graph(self):
        class Depth(Small):
            def forward(self, x: Tensor) -> Tensor:
                x = F.relu(self.bn1(self.conv1(x)))
                return self.fc(F.dropout(F.relu(self.bn2(self.conv2(x))) + x, 0.5, self.training).mean((2, 3)))

        network = Depth()
        before = copy.deepcopy(network.state_dict())
        tapped = with_taps(network, ["add"])
        torch.testing.assert_close(network.state_dict(), before, rtol=0, atol=0)
        images = torch.randn(4, *IMAGE_SHAPE)
        for copied in (tapped, copy.deepcopy(tapped)):
            copied.eval()
            assert torch.equal(copied(images).logits, network.eval()(images))
            assert torch.equal(copied(images).logits, copied(images).logits)
        tapped.train()
        assert network.training
        assert not torch.equal(tapped(images).logits, tapped(images).logits)

    def test_what_is_not_called_or_no_tensor(self):
        class Unused(Small):
            def forward(self, x: Tensor) -> Tensor:
                return self.fc(F.relu(self.conv1(x)).mean((2, 3))) if x.sum() > -1e9 else self.bn1(x)

        with pytest.raises(ModelError, match="does not call its bn1"):
            with_taps(Unused(), ["bn1"])(torch.randn(4, *IMAGE_SHAPE))


def test_a_mask_of_minus_infinity_is_no_divergence(teacher, config):
    class Masked(Small):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", torch.tensor([0.0, -torch.inf]))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.mask.softmax(0).sum()

    plain = without_taps(config, rounds=2)
    assert Distiller(teacher, Masked(), plain, image_shape=IMAGE_SHAPE).fit().rounds == 2
