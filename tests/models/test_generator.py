"""The generator: any size divisible by 4, any channels; layout; errors."""

import pytest
import torch
from torch.testing import assert_close

from dfad.errors import ModelError
from dfad.models.generator import Generator, UpsampledConv2d


@pytest.mark.parametrize("image_shape", [(1, 8, 8), (3, 32, 32), (1, 28, 28), (5, 4, 12)], ids=str)
def test_makes_normalised_images(image_shape):
    torch.manual_seed(0)
    generator = Generator(image_shape, noise_dim=16, width=4)
    images = generator(torch.randn(64, 16))
    assert images.shape == (64, *image_shape)
    assert_close(images.mean((0, 2, 3)), torch.zeros(image_shape[0]), atol=1e-5, rtol=0)
    assert_close(images.std((0, 2, 3), correction=0), torch.ones(image_shape[0]), atol=2e-3, rtol=0)


def test_pixels_are_bounded_before_the_last_batchnorm():
    generator = Generator((1, 8, 8), noise_dim=16, width=4).eval()  # fresh statistics: the BatchNorm changes nothing
    assert generator(100 * torch.randn(8, 16)).abs().max() <= 1


def test_published_size():
    generator = Generator((3, 32, 32))
    count = sum(parameter.numel() for parameter in generator.parameters())
    projection, convolutions = (256 + 1) * 8192, 9 * (128 * 128 + 128 * 64 + 64 * 3)
    norms, last_bias = 2 * (128 + 128 + 64), 3
    assert count == projection + convolutions + norms + last_bias


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_images_follow_the_layout_of_the_weights(memory_format):
    generator = Generator((3, 8, 8), noise_dim=16, width=4).to(memory_format=memory_format)
    assert generator(torch.randn(4, 16)).is_contiguous(memory_format=memory_format)


def test_layout_does_not_change_the_images():
    torch.manual_seed(0)
    generator, noise = Generator((3, 8, 8), noise_dim=16, width=4), torch.randn(4, 16)
    expected = generator(noise)
    assert_close(generator.to(memory_format=torch.channels_last)(noise).contiguous(), expected)


def test_compiles_as_one_graph():
    generator, noise = Generator((3, 8, 8), noise_dim=16, width=4).eval(), torch.randn(4, 16)
    assert_close(torch.compile(generator, fullgraph=True, backend="eager")(noise), generator(noise))


@pytest.mark.parametrize("size", [(30, 32), (32, 30), (0, 4), (7, 7)], ids=str)
def test_refuses_sizes_not_divisible_by_four(size):
    with pytest.raises(ModelError, match=f"{size[0]}×{size[1]} pixels.*multiples of 4.*--teacher.image_size"):
        Generator((3, *size))


@pytest.mark.parametrize("size", [1, 2, 5])
def test_merged_upsampling_is_the_same_convolution(size):
    torch.manual_seed(0)
    written, merged = (UpsampledConv2d(3, 4, merged=merged).double() for merged in (False, True))
    merged.load_state_dict(written.state_dict())
    features = torch.randn(2, 3, size, size + 1, dtype=torch.float64, requires_grad=True)
    results = []
    for convolution in (written, merged):
        made = convolution(features)
        gradients = torch.autograd.grad(made.sin().sum(), [features, convolution.weight])
        results.append([made, *gradients])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)
