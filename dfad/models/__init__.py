"""Networks for teachers, students and the generator."""

from dfad.models.convnet import convnet
from dfad.models.lenet import lenet5, lenet5_half
from dfad.models.resnet import resnet8, resnet14, resnet18, resnet20, resnet32, resnet34, resnet44, resnet56
from dfad.models.vgg import vgg11, vgg13, vgg16, vgg19
from dfad.models.wideresnet import wrn_16_1, wrn_16_2, wrn_40_1, wrn_40_2

__all__ = [
    "convnet",
    "lenet5",
    "lenet5_half",
    "resnet8",
    "resnet14",
    "resnet18",
    "resnet20",
    "resnet32",
    "resnet34",
    "resnet44",
    "resnet56",
    "vgg11",
    "vgg13",
    "vgg16",
    "vgg19",
    "wrn_16_1",
    "wrn_16_2",
    "wrn_40_1",
    "wrn_40_2",
]
