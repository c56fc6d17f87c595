"""Small networks as users write them, each with one trait. A new trait is one class, or one function, here."""

import random
from collections import namedtuple
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint

CHANNELS, WIDTH, CLASSES, SIZE = 3, 6, 4, 8

ZOO: dict[str, Callable[[], nn.Module]] = {}
"""Factories of networks of images ``(3, 8, 8)``, by trait."""

TEACHERS_ALONE = {"exported", "one class"}
"""A program of torch.export has a single mode, and a network with one class has nothing to learn."""

WITHOUT_STATISTICS = {
    *("GroupNorm", "LayerNorm", "InstanceNorm", "no norm", "BatchNorm without running statistics"),
    *("scripted", "traced by jit", "exported"),
}
"""They have no BatchNorm with statistics, or not as a module of PyTorch."""


def seed_everything(seed: int) -> None:
    """Seed the random numbers that the networks draw."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002


def trait(factory: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """Register a network; its docstring is the name of its trait."""
    ZOO[(factory.__doc__ or "").rstrip(".")] = factory
    return factory


class Small(nn.Module):
    """Convolution, BatchNorm, ReLU, twice; pooled; linear."""

    classes = CLASSES

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(CHANNELS, WIDTH, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(WIDTH)
        self.conv2 = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(WIDTH)
        self.fc = nn.Linear(WIDTH, self.classes)

    def stem(self, x: Tensor) -> Tensor:
        return F.relu(self.bn1(self.conv1(x)))

    def body(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(x)))

    def head(self, x: Tensor) -> Any:
        return self.fc(x.mean((2, 3)))

    def forward(self, x: Tensor) -> Any:
        return self.head(self.body(self.stem(x)))


@trait
class Plain(Small):
    """plain"""


# Hooks


def halve(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output / 2


@trait
def _() -> nn.Module:
    """forward hook"""
    network = Small()
    network.bn1.register_forward_hook(halve)
    return network


@trait
def _() -> nn.Module:
    """forward pre-hook of the root"""
    network = Small()
    network.register_forward_pre_hook(lambda module, inputs: ((inputs[0] - 3) / 2,))
    return network


@trait
def _() -> nn.Module:
    """forward hook with keyword arguments"""
    network = Small()
    network.conv2.register_forward_hook(lambda module, inputs, options, output: output + 1, with_kwargs=True)
    return network


@trait
def _() -> nn.Module:
    """full backward hook"""
    network = Small()
    network.bn2.register_full_backward_hook(lambda module, inputs, outputs: (inputs[0] * 2,))
    return network


@trait
def _() -> nn.Module:
    """full backward pre-hook"""
    network = Small()
    network.conv2.register_full_backward_pre_hook(lambda module, outputs: (outputs[0] * 2,))
    return network


@trait
class HookedTensor(Small):
    """hook of a tensor in the forward pass"""

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        if x.requires_grad:
            x.register_hook(lambda gradient: gradient * 3)
        return self.head(self.body(x))


@trait
def _() -> nn.Module:
    """hook of the state dict"""
    network = Small()
    network._register_state_dict_hook(lambda module, state, prefix, metadata: None)
    return network


# Weights that are computed


@trait
def _() -> nn.Module:
    """weight norm"""
    network = Small()
    parametrizations.weight_norm(network.conv2)
    return network


@trait
def _() -> nn.Module:
    """weight norm by hooks"""
    network = Small()
    nn.utils.weight_norm(network.conv2)
    return network


@trait
def _() -> nn.Module:
    """spectral norm"""
    network = Small()
    parametrizations.spectral_norm(network.conv2)
    return network


@trait
def _() -> nn.Module:
    """spectral norm by hooks"""
    network = Small()
    nn.utils.spectral_norm(network.conv2)
    return network


@trait
def _() -> nn.Module:
    """pruned"""
    network = Small()
    prune.l1_unstructured(network.conv1, "weight", 0.5)
    return network


@trait
def _() -> nn.Module:
    """permanently pruned"""
    network = Small()
    prune.l1_unstructured(network.conv1, "weight", 0.5)
    prune.remove(network.conv1, "weight")
    return network


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


@trait
def _() -> nn.Module:
    """a custom parametrisation"""
    network = Small()
    parametrize.register_parametrization(network.conv2, "weight", Doubled())
    return network


@trait
class Standardized(Small):
    """weight standardisation in a subclass"""

    class Convolution(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
            return F.conv2d(x, weight, self.bias, padding=1)

    def __init__(self) -> None:
        super().__init__()
        self.conv2 = self.Convolution(WIDTH, WIDTH, 3, padding=1, bias=False)


# Modules and weights that are used more than once


@trait
class Shared(Small):
    """shared BatchNorm"""

    def body(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.bn1(self.conv2(x))))


@trait
class Reused(Small):
    """a block that is called three times"""

    def body(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = super().body(x)
        return x


@trait
class TwoNames(Small):
    """a module with two names"""

    def __init__(self) -> None:
        super().__init__()
        self.bn2 = self.bn1


@trait
class Tied(Small):
    """tied weights"""

    def __init__(self) -> None:
        super().__init__()
        self.conv3 = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False)
        self.conv3.weight = self.conv2.weight

    def body(self, x: Tensor) -> Tensor:
        return self.conv3(super().body(x))


@trait
class ReadsWeight(Small):
    """a weight that the forward pass also reads"""

    def body(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(x))) + F.conv2d(x, self.conv2.weight, padding=1)


@trait
class ReadsNorm(Small):
    """a BatchNorm that is read, not called"""

    def body(self, x: Tensor) -> Tensor:
        norm = self.bn2
        y = F.batch_norm(
            self.conv2(x), norm.running_mean, norm.running_var, norm.weight, norm.bias, self.training, 0.1, norm.eps
        )
        return F.relu(y)


# What a forward pass changes


@trait
class Counter(Small):
    """a counter of calls"""

    calls = 0

    def forward(self, x: Tensor) -> Any:
        self.calls += 1
        return super().forward(x) * (1 + self.calls / 10 if self.training else 1)


@trait
class CounterTensor(Small):
    """a counter in a buffer"""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x: Tensor) -> Any:
        if self.training:
            self.steps += 1
        return super().forward(x) / (1 + self.steps)


@trait
class OwnNorm(Small):
    """a custom BatchNorm"""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(1, WIDTH, 1, 1))

    def stem(self, x: Tensor) -> Tensor:
        y = self.conv1(x)
        if self.training:
            self.mean.lerp_(y.detach().mean((0, 2, 3), keepdim=True), 0.1)
        return F.relu(y - self.mean)


@trait
class Average(Small):
    """a moving average that is assigned"""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(()))

    def stem(self, x: Tensor) -> Tensor:
        y = super().stem(x)
        if self.training:
            self.scale = 0.9 * self.scale + 0.1 * y.detach().abs().mean()
        return y / self.scale


@trait
class Remembers(Small):
    """features that are kept as an attribute"""

    features: Any = None

    def stem(self, x: Tensor) -> Tensor:
        self.features = super().stem(x)
        return self.features


# Random numbers


@trait
class Dropout(Small):
    """dropout"""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)

    def body(self, x: Tensor) -> Tensor:
        return self.dropout(super().body(x))


@trait
class FunctionalDropout(Small):
    """dropout by function"""

    def body(self, x: Tensor) -> Tensor:
        return F.dropout(super().body(x), 0.5, self.training)


@trait
class AlwaysDropout(Small):
    """dropout also in eval mode"""

    def body(self, x: Tensor) -> Tensor:
        return F.dropout(super().body(x), 0.1, True)


@trait
class LayerDrop(Small):
    """layers skipped at random by Python's random"""

    def body(self, x: Tensor) -> Tensor:
        return x if self.training and random.random() < 0.5 else super().body(x)


@trait
class StochasticDepth(Small):
    """stochastic depth"""

    def body(self, x: Tensor) -> Tensor:
        if not self.training:
            return x + super().body(x)
        return x + super().body(x) * torch.empty(x.shape[0], 1, 1, 1).bernoulli_(0.5)


@trait
class Noise(Small):
    """noise"""

    def stem(self, x: Tensor) -> Tensor:
        return super().stem(x + 0.1 * torch.randn_like(x) if self.training else x)


@trait
class FixedNoise(Small):
    """noise of a fixed shape"""

    def stem(self, x: Tensor) -> Tensor:
        return super().stem(x) * (1 + 0.1 * torch.rand(1, WIDTH, 1, 1))


@trait
class OwnGenerator(Small):
    """its own random generator"""

    def __init__(self) -> None:
        super().__init__()
        self.stream = torch.Generator().manual_seed(3)

    def stem(self, x: Tensor) -> Tensor:
        y = super().stem(x)
        return y * (1 + 0.3 * torch.rand(1, generator=self.stream)) if self.training else y


# How gradients are computed


@trait
def _() -> nn.Module:
    """frozen layers"""
    network = Small()
    network.conv1.requires_grad_(False)
    network.bn1.requires_grad_(False)
    return network


@trait
class NoGrad(Small):
    """a part without gradients"""

    def stem(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return super().stem(x)


@trait
class Detached(Small):
    """a part that is detached"""

    def stem(self, x: Tensor) -> Tensor:
        return super().stem(x).detach() + 0 * x.mean()


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        return torch.round(x * 4) / 4

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        return gradient


@trait
class Quantized(Small):
    """a straight-through quantiser"""

    def stem(self, x: Tensor) -> Tensor:
        return super().stem(_Round.apply(x))


@trait
class Checkpointed(Small):
    """activation checkpointing"""

    def body(self, x: Tensor) -> Tensor:
        return checkpoint(super().body, x, use_reentrant=False)


@trait
class Reentrant(Small):
    """reentrant activation checkpointing"""

    def body(self, x: Tensor) -> Tensor:
        return checkpoint(super().body, x, use_reentrant=True) if x.requires_grad else super().body(x)


@trait
class Precise(Small):
    """a part that is always float32"""

    def body(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().body(x.float())


@trait
class PreciseByName(Small):
    """a part that is float32 on a named device"""

    def body(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return super().body(x.float())


@trait
class InnerGradient(Small):
    """gradients inside the forward pass"""

    def stem(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            (gradient,) = torch.autograd.grad((leaf**3).sum(), leaf)
        return super().stem(x + 0.1 * gradient)


@trait
class SavedTensors(Small):
    """hooks of saved tensors"""

    def body(self, x: Tensor) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda tensor: tensor):
            return super().body(x)


@trait
class Substituted(Small):
    """other weights for one call"""

    def head(self, x: Tensor) -> Any:
        weights = {name: 1.5 * parameter for name, parameter in self.fc.named_parameters()}
        return torch.func.functional_call(self.fc, weights, (x.mean((2, 3)),))


@trait
class SwapsWeights(Small):
    """a weight that is replaced during a call"""

    def forward(self, x: Tensor) -> Any:
        weight = self.fc.weight.data.clone()
        self.fc.weight.data.mul_(1.5)
        y = super().forward(x)
        self.fc.weight.data.copy_(weight)
        return y


@trait
class ObservedWeights(Small):
    """weights rounded to a learned step, and activations that are observed"""

    def __init__(self) -> None:
        super().__init__()
        self.step = nn.Parameter(torch.tensor(0.1))
        self.register_buffer("largest", torch.tensor(0.0))

    def body(self, x: Tensor) -> Tensor:
        if self.training:
            self.largest.copy_(torch.maximum(self.largest, x.detach().abs().max().float()))
        rounded = _Round.apply(self.conv2.weight / self.step) * self.step
        return F.relu(self.bn2(F.conv2d(x, rounded, padding=1)))


@trait
class Codebook(Small):
    """a codebook that follows the features"""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("codes", torch.randn(5, WIDTH))

    def body(self, x: Tensor) -> Tensor:
        vectors = super().body(x).permute(0, 2, 3, 1).float()
        flat = vectors.detach().reshape(-1, WIDTH)
        nearest = torch.cdist(flat, self.codes).argmin(1)
        quantised = self.codes[nearest].view_as(vectors)
        if self.training:
            with torch.no_grad():
                self.codes.index_add_(0, nearest, 1e-3 * flat)
        return (vectors + (quantised - vectors).detach()).permute(0, 3, 1, 2).to(x.dtype)


# Control flow


@trait
class MomentumSchedule(Small):
    """a schedule of BatchNorm's momentum"""

    def __init__(self) -> None:
        super().__init__()
        self.steps = 0

    def forward(self, x: Tensor) -> Any:
        if self.training:
            self.steps += 1
            self.bn1.momentum = self.bn2.momentum = 1 / (1 + self.steps)
        return super().forward(x)


@trait
class GhostNorm(Small):
    """BatchNorm of each half of a batch"""

    def body(self, x: Tensor) -> Tensor:
        parts = self.conv2(x).chunk(2) if self.training else [self.conv2(x)]
        return F.relu(torch.cat([self.bn2(part) for part in parts]))


@trait
class Experts(Small):
    """experts among which images are routed"""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, 3)
        self.experts = nn.ModuleList(nn.Conv2d(WIDTH, WIDTH, 1) for _ in range(3))

    def body(self, x: Tensor) -> Tensor:
        x = super().body(x)
        shares = self.gate(x.mean((2, 3))).float().softmax(1)
        chosen = shares.argmax(1)
        result = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            if (chosen == number).any():
                share = shares[chosen == number, number].view(-1, 1, 1, 1)
                result[chosen == number] = (expert(x[chosen == number]) * share).to(result.dtype)
        return x + result


@trait
class NumpyNoise(Small):
    """noise of NumPy's global generator"""

    def stem(self, x: Tensor) -> Tensor:
        return super().stem(x * np.random.rand() if self.training else x)  # noqa: NPY002


@trait
class Branches(Small):
    """a branch on the data"""

    def body(self, x: Tensor) -> Tensor:
        return super().body(x) if x.mean() > 0.1 else x


@trait
class AsksType(Small):
    """a branch on the type of a value"""

    def body(self, x: Tensor) -> Tensor:
        return super().body(x) if isinstance(x, Tensor) else x


@trait
class AsksModule(Small):
    """a branch on the type of a module"""

    def body(self, x: Tensor) -> Tensor:
        x = self.conv2(x)
        return F.relu(self.bn2(x) if isinstance(self.bn2, nn.BatchNorm2d) else x)


@trait
class Optional(Small):
    """a block with an optional argument"""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
            self.norm = nn.BatchNorm2d(WIDTH)

        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            y = F.relu(self.norm(self.conv(x)))
            return y if mask is None else y * mask

    def __init__(self) -> None:
        super().__init__()
        self.block = self.Block()

    def body(self, x: Tensor) -> Tensor:
        return self.block(x) if x.sum() > -1e9 else self.block(x, x)


@trait
class Tries(Small):
    """a forward pass that catches an exception"""

    def body(self, x: Tensor) -> Tensor:
        try:
            return super().body(x) if float(x.mean()) > -1e9 else x
        except Exception:
            return x


@trait
class Numpy(Small):
    """NumPy in the forward pass"""

    def stem(self, x: Tensor) -> Tensor:
        brightness = torch.from_numpy(x.detach().float().cpu().numpy().mean((1, 2, 3), keepdims=True))
        return super().stem(x) + brightness.to(x.device)


# Memory formats and operations in place


@trait
class View(Small):
    """features that are flattened by view"""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(WIDTH * SIZE * SIZE, CLASSES)

    def head(self, x: Tensor) -> Any:
        return self.fc(x.view(x.size(0), -1))


@trait
class Shuffle(Small):
    """channels that are shuffled by view"""

    def body(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        x = x.view(batch, 2, channels // 2, height, width).transpose(1, 2).contiguous()
        return super().body(x.view(batch, channels, height, width))


@trait
class InPlace(Small):
    """operations in place"""

    def body(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(x))
        y += x
        return y.relu_()


@trait
class InPlaceModules(Small):
    """activations in place"""

    def __init__(self) -> None:
        super().__init__()
        self.activation = nn.ReLU(inplace=True)

    def body(self, x: Tensor) -> Tensor:
        return self.activation(self.bn2(self.conv2(x)) + x)


@trait
class Strides(Small):
    """a branch on the memory format"""

    def body(self, x: Tensor) -> Tensor:
        return super().body(x) * (2 if x.stride(1) == 1 else 2.0)


# Layers


def with_norm(make: Callable[[], nn.Module]) -> nn.Module:
    network = Small()
    network.bn1, network.bn2 = make(), make()  # type: ignore[assignment]
    return network


@trait
def _() -> nn.Module:
    """GroupNorm"""
    return with_norm(lambda: nn.GroupNorm(2, WIDTH))


@trait
def _() -> nn.Module:
    """LayerNorm"""
    return with_norm(lambda: nn.LayerNorm([WIDTH, SIZE, SIZE]))


@trait
def _() -> nn.Module:
    """InstanceNorm"""
    return with_norm(lambda: nn.InstanceNorm2d(WIDTH, affine=True))


@trait
def _() -> nn.Module:
    """no norm"""
    return with_norm(nn.Identity)


@trait
def _() -> nn.Module:
    """BatchNorm without running statistics"""
    return with_norm(lambda: nn.BatchNorm2d(WIDTH, track_running_stats=False))


@trait
def _() -> nn.Module:
    """BatchNorm with a cumulative average"""
    return with_norm(lambda: nn.BatchNorm2d(WIDTH, momentum=None))


@trait
class Activations(Small):
    """SiLU, GELU and hard swish"""

    def forward(self, x: Tensor) -> Any:
        return self.head(F.hardswish(F.gelu(self.bn2(self.conv2(F.silu(self.bn1(self.conv1(x))))))))


@trait
class Convolutions(Small):
    """depthwise, grouped and dilated convolutions"""

    def __init__(self) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH)
        self.dilated = nn.Conv2d(WIDTH, WIDTH, 3, padding=2, dilation=2, groups=2)

    def body(self, x: Tensor) -> Tensor:
        return super().body(self.dilated(self.depthwise(x)))


@trait
class Deep(Small):
    """a three-dimensional convolution"""

    def __init__(self) -> None:
        super().__init__()
        self.conv3 = nn.Conv3d(WIDTH, WIDTH, 1)

    def body(self, x: Tensor) -> Tensor:
        return self.conv3(super().body(x)[:, :, None]).squeeze(2)


@trait
class Attention(Small):
    """attention"""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def body(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        return x + self.attention(tokens, tokens, tokens, need_weights=False)[0].transpose(1, 2).reshape(x.shape)


@trait
class Masked(Small):
    """a mask of minus infinity"""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.full((SIZE * SIZE, SIZE * SIZE), -torch.inf).triu(1))

    def body(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        weights = (tokens @ tokens.transpose(1, 2) + self.mask).softmax(-1)
        return x + (weights @ tokens).transpose(1, 2).reshape(x.shape)


@trait
def _() -> nn.Module:
    """a lazy layer"""
    network = Small()
    network.fc = nn.LazyLinear(CLASSES)  # type: ignore[assignment]
    network.eval()(torch.zeros(2, CHANNELS, SIZE, SIZE))
    return network.train()


@trait
class Fourier(Small):
    """complex numbers"""

    def __init__(self) -> None:
        super().__init__()
        self.filter = nn.Parameter(1 + 0.3 * torch.randn(WIDTH, SIZE, SIZE // 2 + 1, 2))

    def body(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft2(x.float(), norm="ortho") * torch.view_as_complex(self.filter)
        return super().body(torch.fft.irfft2(spectrum, s=x.shape[-2:], norm="ortho"))


@trait
class Recurrent(Small):
    """a recurrent layer over rows"""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.GRU(WIDTH * SIZE, WIDTH, batch_first=True)

    def body(self, x: Tensor) -> Tensor:
        rows, _ = self.rows(super().body(x).permute(0, 2, 1, 3).flatten(2))
        return rows.transpose(1, 2).unsqueeze(3).repeat(1, 1, 1, SIZE)


# What is returned


@trait
class Auxiliary(Small):
    """an auxiliary head in training mode"""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.auxiliary = nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        y = self.head(self.body(x))
        return y + self.auxiliary(self.norm(x.mean((2, 3)))) if self.training else y


@trait
class Tuple(Small):
    """a tuple"""

    def head(self, x: Tensor) -> Any:
        return super().head(x), x


@trait
class Dictionary(Small):
    """a dictionary"""

    def head(self, x: Tensor) -> Any:
        return {"features": x, "logits": super().head(x)}


Named = namedtuple("Named", ["logits", "aux_logits"])


@trait
class NamedTuple(Small):
    """a named tuple in training mode"""

    def head(self, x: Tensor) -> Any:
        y = super().head(x)
        return Named(y, y) if self.training else y


@trait
class OneClass(Small):
    """one class"""

    classes = 1


@trait
class TwoClasses(Small):
    """two classes"""

    classes = 2


@trait
class ManyClasses(Small):
    """a thousand classes"""

    classes = 1000


# Wrappers


@trait
def _() -> nn.Module:
    """DataParallel"""
    return nn.DataParallel(Small())


@trait
def _() -> nn.Module:
    """scripted"""
    return torch.jit.script(nn.Sequential(nn.Conv2d(CHANNELS, WIDTH, 3), nn.ReLU(), nn.Flatten(), nn.Linear(216, 4)))


@trait
def _() -> nn.Module:
    """traced by jit"""
    return torch.jit.trace(Small().eval(), torch.zeros(2, CHANNELS, SIZE, SIZE))


@trait
def _() -> nn.Module:
    """exported"""
    batch = torch.export.Dim("batch", min=1, max=1024)
    images = torch.zeros(2, CHANNELS, SIZE, SIZE)
    return torch.export.export(Small().eval(), (images,), dynamic_shapes={"x": {0: batch}}).module()


@trait
def _() -> nn.Module:
    """traced by fx"""
    return torch.fx.symbolic_trace(Small())


@trait
def _() -> nn.Module:
    """compiled"""
    return torch.compile(Small(), backend="eager")  # type: ignore[return-value]


@trait
class Wrapper(nn.Module):
    """a plain network within one that cannot be traced"""

    def __init__(self) -> None:
        super().__init__()
        self.network = Small()

    def forward(self, x: Tensor) -> Any:
        if float(x.detach().abs().sum()) >= 0:
            x = x * 2
        return self.network(x)


@trait
class PatchedForward(Small):
    """a forward method on the instance"""

    def __init__(self) -> None:
        super().__init__()
        original = self.bn1.forward
        self.bn1.forward = lambda x: original(x) + 1  # type: ignore[method-assign]


@trait
class HandsOver(Small):
    """a hook that passes features to the forward pass"""

    def __init__(self) -> None:
        super().__init__()
        self.kept: Any = None

        def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
            self.kept = output

        self.bn1.register_forward_hook(keep)

    def forward(self, x: Tensor) -> Any:
        logits = super().forward(x)
        kept, self.kept = self.kept, None
        return logits + kept.mean((1, 2, 3))[:, None]


@trait
def _() -> nn.Module:
    """a forward pass that is a closure"""
    network = Small()
    network.forward = lambda x: network.head(network.body(network.stem(x * 2)))  # type: ignore[method-assign]
    return network


@trait
class WritesImages(Small):
    """images normalised in place"""

    def forward(self, x: Tensor) -> Any:
        return super().forward(x.sub_(0.5).div_(0.5))


@trait
class OneMemory(Small):
    """two weights in one memory"""

    def __init__(self) -> None:
        super().__init__()
        self.again = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False)
        self.again.weight = nn.Parameter(self.conv2.weight.data)

    def body(self, x: Tensor) -> Tensor:
        return super().body(F.relu(self.again(x)))


@trait
class KeepsMode(Small):
    """BatchNorm that stays in eval mode"""

    def train(self, mode: bool = True) -> "KeepsMode":
        super().train(mode)
        self.bn1.eval()
        return self


@trait
def _() -> nn.Module:
    """SyncBatchNorm"""
    return nn.SyncBatchNorm.convert_sync_batchnorm(Small())


@trait
class OwnAttributes(Small):
    """attributes that __getattr__ computes"""

    def __getattr__(self, name: str) -> Any:
        return 2.0 if name == "factor" else super().__getattr__(name)

    def forward(self, x: Tensor) -> Any:
        return super().forward(x) * self.factor


@trait
class ExtraState(Small):
    """extra state"""

    def get_extra_state(self) -> Any:
        return {"version": 2}

    def set_extra_state(self, state: Any) -> None:
        assert state == {"version": 2}
