"""A student that starts from its teacher's weights."""

import logging
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

from dfad import models
from dfad.config import StudentConfig
from dfad.distillation.distiller import Distiller
from dfad.errors import ModelError
from dfad.models.inheritance import inherit, suits
from dfad.models.taps import with_taps
from tests.conftest import IMAGE_SHAPE


class Net(nn.Module):
    """Kernels of some size, a frozen parameter, a buffer of indices, and position embeddings."""

    def __init__(self, width: int, *, kernel: int = 3, positions: int = 6) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, kernel)
        self.norm = nn.BatchNorm2d(width)
        self.attention = nn.Conv1d(1, 1, kernel)
        self.positions = nn.Parameter(torch.randn(1, positions, width))
        self.scale = nn.Parameter(torch.randn(width), requires_grad=False)
        self.register_buffer("index", torch.arange(10 * width))
        self.head = nn.Linear(width, 5)


class Stack(nn.Module):
    """Convolutions in a list, in stages of different widths, whose names shift with the depths; a large classifier."""

    def __init__(self, *depths: int) -> None:
        super().__init__()
        widths = [3, *(8 * 2**stage for stage, depth in enumerate(depths) for _ in range(depth))]
        layers = [nn.Conv2d(inputs, outputs, 3) for inputs, outputs in pairwise(widths)]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(widths[-1] * 49, 1000)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def state_of(network: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


def with_statistics(network: nn.Module) -> nn.Module:
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
    return network


def test_blocks_that_a_shallower_student_has_are_its_teachers(caplog) -> None:
    caplog.set_level(logging.INFO)
    teacher, student = with_statistics(models.resnet20()), models.resnet14()
    before = state_of(teacher)
    assert inherit(student, teacher) == []
    for name, value in student.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(value, before[name]), name
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert "student: 67 tensors of its teacher's whole, 0 selected from larger ones." in caplog.text


def test_further_blocks_of_a_deeper_student_keep_their_own_weights() -> None:
    student = models.resnet20()
    before = state_of(student)
    left = inherit(student, models.resnet14())
    assert left[0] == "layer1.2.conv1.weight"
    assert all(".2." in name for name in left)
    assert all(torch.equal(student.state_dict()[name], before[name]) for name in left)


def test_a_narrower_student_takes_the_same_channels_in_every_layer() -> None:
    teacher, student = with_statistics(Net(8)), Net(4)
    inherit(student, teacher)
    assert torch.equal(student.stem.weight, teacher.stem.weight[::2])
    assert torch.equal(student.norm.running_var, teacher.norm.running_var[::2])
    assert torch.equal(student.positions, teacher.positions[..., ::2])
    assert torch.equal(student.head.weight, teacher.head.weight[:, ::2])
    assert torch.equal(student.head.bias, teacher.head.bias)


def test_channels_are_evenly_spaced_where_the_widths_have_no_whole_ratio() -> None:
    teacher, student = nn.Linear(8, 8), nn.Linear(3, 3)
    inherit(student, teacher)
    assert torch.equal(student.bias, teacher.bias[[0, 2, 5]])
    assert torch.equal(student.weight, teacher.weight[[0, 2, 5]][:, [0, 2, 5]])


def test_a_student_with_every_second_channel_of_a_teacher_that_has_each_twice_computes_the_same() -> None:
    narrow = with_statistics(models.convnet(channels=[4, 8], num_classes=5, in_channels=3)).eval()
    wide = models.convnet(channels=[8, 16], num_classes=5, in_channels=3)
    for (_, target), (_, source) in zip(wide.state_dict().items(), narrow.state_dict().items(), strict=True):
        for dimension in range(min(source.dim(), 2)):
            ratio = target.shape[dimension] // source.shape[dimension]
            source = source.repeat_interleave(ratio, dimension)
            if dimension == 1:
                source = source / ratio  # the sum over the channels stays the same
        target.copy_(source)
    student = models.convnet(channels=[4, 8], num_classes=5, in_channels=3).eval()
    inherit(student, wide)
    images = torch.randn(4, 3, 8, 8)
    for module in student.modules():  # half of the channels are half of each sum
        if isinstance(module, nn.Conv2d | nn.Linear) and module.weight.shape[1] != 3:
            module.weight.data *= 2
    torch.testing.assert_close(student(images).logits, narrow(images).logits)


def test_what_is_no_learned_part_or_has_another_form_stays() -> None:
    teacher, student = Net(8), Net(4, kernel=1, positions=4)
    before = state_of(student)
    stay = ["positions", "stem.weight", "attention.weight"]
    assert inherit(student, teacher) == stay
    for name in (*stay, "scale", "index"):
        assert torch.equal(student.state_dict()[name], before[name]), name


def test_layers_of_another_class_are_no_partners() -> None:
    teacher = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))
    student = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Linear(4, 2))
    assert inherit(student, teacher) == ["1.weight", "1.bias"]


class Scaled(nn.Module):
    """Blocks with a parameter of their own, and the root with one."""

    class Block(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3))
            self.scale = nn.Parameter(torch.rand(3, 1, 1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.scale * super().forward(x)

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(1))
        self.blocks = nn.Sequential(*(self.Block() for _ in range(depth)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * self.blocks(x).mean((2, 3))


def exported(network: nn.Module) -> nn.Module:
    return torch.export.export(network.eval(), (torch.zeros(2, 3, 8, 8),)).module()


@pytest.mark.parametrize(
    ("of_student", "of_teacher"),
    [
        (nn.Identity(), lambda network: with_taps(network, ["blocks.0.1"])),
        (lambda network: with_taps(network, ["blocks.0.1"]), nn.Identity()),
        (nn.Identity(), exported),
    ],
)
def test_a_graph_that_keeps_no_classes_gives_and_takes_all(of_student, of_teacher) -> None:
    teacher, student = Scaled(3), Scaled(2)
    assert inherit(of_student(student), of_teacher(teacher)) == []
    for name, parameter in student.named_parameters():
        assert torch.equal(parameter, teacher.get_parameter(name)), name


def test_a_module_with_two_names_in_the_teacher_is_the_partner_of_both() -> None:
    teacher, student = (nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)) for _ in range(2))
    teacher[1] = teacher[0]
    assert inherit(student, teacher) == []
    assert torch.equal(student[1].weight, teacher[0].weight)


def test_a_student_of_another_family_is_refused_and_unchanged() -> None:
    student = models.lenet5_half()
    before = state_of(student)
    with pytest.raises(ModelError, match=r"LeNet cannot start from the weights of its teacher ResNet: no layer"):
        inherit(student, models.resnet20())
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


def test_a_run_starts_from_the_teachers_weights_where_its_settings_say_so(teacher, config) -> None:
    settings = replace(config, student=StudentConfig(initial_weights="teacher"))
    student = type(teacher)(channels=[8, 16], num_classes=4, in_channels=IMAGE_SHAPE[0])
    distiller = Distiller(teacher, student, settings, image_shape=IMAGE_SHAPE)
    weight = next(distiller.student.parameters())
    wider = next(teacher.parameters())
    assert torch.equal(weight.cpu(), wider[:: len(wider) // len(weight)])


def test_a_resumed_run_goes_on_from_its_own_weights(teacher, config, tmp_path) -> None:
    settings = replace(config, student=StudentConfig(initial_weights="teacher"))
    students = [type(teacher)(channels=[8, 16], num_classes=4, in_channels=IMAGE_SHAPE[0]) for _ in range(2)]
    for resume, student in enumerate(students):
        distiller = Distiller(teacher, student, settings, image_shape=IMAGE_SHAPE)
        distiller.fit(tmp_path / "run", resume=bool(resume))
    uninterrupted, resumed = map(state_of, students)
    assert all(torch.equal(value, uninterrupted[name]) for name, value in resumed.items())
    assert not torch.equal(students[0].linear.weight, teacher.linear.weight)


def test_compiled_networks_have_the_names_of_those_inside(teacher, config) -> None:
    settings = replace(config, student=StudentConfig(initial_weights="teacher"))
    student = type(teacher)(channels=[8, 16], num_classes=4, in_channels=IMAGE_SHAPE[0])
    Distiller(torch.compile(teacher), student, settings, image_shape=IMAGE_SHAPE)
    assert torch.equal(student.linear.weight, teacher.linear.weight)


def test_weights_of_the_teacher_and_of_a_file_are_one_too_many() -> None:
    with pytest.raises(ValueError, match=r"initial_weights is teacher; it must be random beside checkpoint w\.pt"):
        StudentConfig(initial_weights="teacher", checkpoint=Path("w.pt"))


@pytest.mark.parametrize(
    ("student", "teacher", "proposed"),
    [
        (models.resnet14, models.resnet20, True),
        (models.vgg11, models.vgg13, True),
        (models.resnet20, models.resnet14, False),  # larger
        (models.resnet20, models.resnet20, False),  # no smaller
        (lambda: Net(4), lambda: Net(8), False),  # narrower
        (lambda: Stack(1, 2), lambda: Stack(2, 2), False),  # an equal classifier that outweighs other convolutions
        (models.lenet5_half, models.resnet20, False),
    ],
)
def test_weights_are_proposed_for_smaller_students_of_the_same_layers(student, teacher, proposed) -> None:
    assert suits(student(), teacher()) is proposed


def test_a_run_that_is_refused_leaves_the_student_as_it_was(teacher, config) -> None:
    settings = replace(config, student=StudentConfig(initial_weights="teacher"))
    student = type(teacher)(channels=[8, 16], num_classes=5, in_channels=IMAGE_SHAPE[0])
    before = state_of(student)
    with pytest.raises(ModelError, match="5 classes"):
        Distiller(teacher, student, settings, image_shape=IMAGE_SHAPE)
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
