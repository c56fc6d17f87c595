"""The channels-last memory format of a network's weights."""

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy


def to_channels_last(network: nn.Module) -> None:
    """Store the kernels of a network's convolutions channels-last, in place."""
    for tensor in _of_their_own(network):
        if tensor.ndim == 4:
            # contiguous() would not change tensors of one channel, whose strides fit both formats
            tensor.data = torch.empty_like(tensor, memory_format=torch.channels_last).copy_(tensor.data)


def _of_their_own(network: nn.Module) -> list[Tensor]:
    """The tensors of a network that share their memory with no other tensor of it, which would move apart."""
    tensors = [
        tensor
        for tensor in (*network.parameters(), *network.buffers())
        if tensor.layout == torch.strided and not is_lazy(tensor)
    ]
    shared = set()
    furthest, owner = -1, -1
    for start, end, number in sorted((*_span(tensor), number) for number, tensor in enumerate(tensors)):
        if start < furthest:
            shared |= {owner, number}
        if end > furthest:
            furthest, owner = end, number
    return [tensor for number, tensor in enumerate(tensors) if number not in shared]


def _span(tensor: Tensor) -> tuple[int, int]:
    """Addresses of a tensor's first byte and of that after its last."""
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (reach + 1) * tensor.element_size() * bool(tensor.numel())
