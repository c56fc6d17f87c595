"""Compiled networks."""

import inspect

import pytest
import torch
from torch import fx, nn

from dfad.engine.compile import CHECKED_WITH, compile_call, uncompiled


def test_what_was_compiled_is_found():
    """In a newer version, look up where ``torch.compile`` keeps the network; then name that version."""
    assert torch.__version__.rpartition(".")[0] in CHECKED_WITH
    network = nn.Identity()
    assert uncompiled(torch.compile(network, backend="eager")) is network
    assert uncompiled(network) is network


@pytest.mark.skipif("isolate_recompiles" not in inspect.signature(torch.compile).parameters, reason="PyTorch has none")
def test_every_network_of_a_long_lived_process_is_compiled():
    compiled = []

    def backend(graph: fx.GraphModule, _: object) -> object:
        compiled.append(graph)
        return graph.forward

    class Net(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.layer = nn.Linear(2, width)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x).relu()

    count = 2 * torch._dynamo.config.recompile_limit
    for width in range(1, count + 1):
        network = Net(width)
        compile_call(network, dynamic=False, fullgraph=True, backend=backend)
        network(torch.ones(3, 2))
    assert len(compiled) == count
