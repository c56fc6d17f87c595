"""The generator: any size, any channels; layout; errors."""

import copy
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from dfad.engine.tracing import trace
from dfad.errors import ModelError
from dfad.models.generator import Generator, UpsampledConv2d, merge_upsampling, upsampled
from dfad.models.model_file import load_model
from dfad.models.probing import parameter_count

FIXTURES = Path(__file__).parents[1] / "fixtures"


@pytest.mark.parametrize(
    "image_shape",
    [(1, 8, 8), (3, 32, 32), (1, 28, 28), (5, 4, 12), (2, 30, 30), (3, 48, 64), (4, 97, 65), (1, 1, 7)],
    ids=str,
)
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
    count = parameter_count(generator)
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
    generator, noise = Generator((3, 7, 8), noise_dim=16, width=4).eval(), torch.randn(4, 16)
    assert_close(torch.compile(generator, fullgraph=True, backend="eager")(noise), generator(noise))


@pytest.mark.parametrize("image_shape", [(1, 8, 8), (3, 30, 30), (3, 97, 65)], ids=str)
def test_may_be_rewritten_by_the_engine(image_shape):
    generator = Generator(image_shape, noise_dim=16, width=4)
    calls = [node.target for node in trace(generator, training=True).graph.nodes if node.op == "call_module"]
    assert set(calls) >= {name for name, _ in generator.named_children() if name.startswith("bn")}


@pytest.mark.parametrize("image_shape", [(3, 0, 4), (0, 8, 8), (1, 8, -1)], ids=str)
def test_refuses_images_of_nothing(image_shape):
    _, height, width = image_shape
    with pytest.raises(ModelError, match=f"{height}×{width} pixels.*1 or more.*--teacher.image_size"):
        Generator(image_shape)


@pytest.mark.parametrize(
    ("size", "stages"), [((8, 8), 2), ((28, 28), 2), ((64, 64), 2), ((48, 65), 3), ((128, 4), 3), ((224, 224), 4)]
)
def test_stages_by_size(size, stages):
    names = [name for name, _ in Generator((3, *size), width=2).named_children()]
    numbers = range(1, stages + 2)
    assert names == ["projection", "bn0", *(f"{kind}{number}" for number in numbers for kind in ("conv", "bn"))]


def test_large_images_do_not_make_a_large_projection():
    counts = {side: parameter_count(Generator((3, side, side))) for side in (64, 96, 128, 224)}
    assert max(counts.values()) < 10e6


def test_what_is_too_large_is_cropped_in_the_middle():
    torch.manual_seed(0)
    whole, cropped = (Generator((3, side, 8), noise_dim=16, width=4).eval() for side in (8, 6))
    cropped.load_state_dict(whole.state_dict())
    noise = torch.randn(4, 16)
    assert_close(cropped(noise), whole(noise)[:, :, 1:7])


def test_a_generator_of_before_makes_the_images_of_before():
    generator, _ = load_model(FIXTURES / "generator-of-0.1.0.safetensors")
    noise = torch.randn(4, generator.noise_dim, generator=torch.Generator().manual_seed(0))
    features = generator.projection(noise).unflatten(1, generator.projected_shape).permute(0, 3, 1, 2)
    features = generator.bn0(features)
    for conv, bn in ((generator.conv1, generator.bn1), (generator.conv2, generator.bn2)):
        features = torch.nn.functional.leaky_relu(bn(conv(features)), 0.2)
    assert_close(generator(noise), generator.bn3(torch.tanh(generator.conv3(features))))


@pytest.mark.parametrize("size", [1, 2, 5])
def test_merged_upsampling_is_the_same_convolution(size):
    torch.manual_seed(0)
    written = UpsampledConv2d(3, 4).double()
    merged = copy.deepcopy(written)
    merge_upsampling(merged)
    assert merged.merged
    features = torch.randn(2, 3, size, size + 1, dtype=torch.float64, requires_grad=True)
    results = []
    for convolution in (written, merged):
        made = convolution(features)
        gradients = torch.autograd.grad(made.sin().sum(), [features, convolution.weight])
        results.append([made, *gradients])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


def test_autocast_upsamples_in_the_dtype_of_the_features():
    torch.manual_seed(0)
    features = torch.randn(2, 4, 6, 5, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    upstream = torch.randn(2, 4, 12, 10).bfloat16()
    results = []
    for wide in (False, True):
        given = features.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            made = upsampled(given.float() if wide else given)
        made.backward(upstream.to(made.dtype))
        assert made.dtype == (torch.float32 if wide else torch.bfloat16)
        results.append([made.bfloat16(), given.grad])
    for found, expected in zip(*results, strict=True):
        assert torch.equal(found, expected)
