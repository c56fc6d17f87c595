"""What a step through a network computes, for comparisons of one way to run it with another."""

import torch
from torch import Tensor, nn

from dfad.models.outputs import as_outputs


def results_of_a_step(network: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """What the network returns, the gradients of its parameters and of ``x``, and its buffers; the gradients that come
    back to its outputs are random, and the same in each call."""
    outputs = as_outputs(network(x))
    values = [outputs.logits, *outputs.taps]
    generator = torch.Generator().manual_seed(2)
    with torch.autocast(x.device.type, enabled=False):
        torch.autograd.backward(values, [torch.randn(v.shape, generator=generator).to(v.dtype) for v in values])
    found = {f"output {i}": value.detach() for i, value in enumerate(values)}
    found |= {f"gradient {name}": p.grad for name, p in network.named_parameters() if p.grad is not None}
    return {**found, "gradient x": x.grad, **{name: buffer.clone() for name, buffer in network.named_buffers()}}
