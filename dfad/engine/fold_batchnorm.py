"""BatchNorm in eval mode folded into the convolution before it."""

import copy
from collections import Counter

from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from dfad.models.taps import trace


def fold_batchnorm(network: nn.Module) -> nn.Module:
    """A copy of a network in eval mode whose BatchNorms that directly follow a convolution are folded into it.

    What it returns is the same to rounding, taps included: a tap lies behind a BatchNorm, never between it and its
    convolution.

    Args:
        network: in eval mode; it is left as it is.

    Raises:
        ModelError: if it cannot be traced.
    """
    network = copy.deepcopy(network)
    graph = trace(network)
    modules = dict(network.named_modules())
    calls = Counter(str(node.target) for node in graph.nodes if node.op == "call_module")
    for node in list(graph.nodes):
        if node.op != "call_module" or not isinstance(modules[str(node.target)], nn.BatchNorm2d):
            continue
        before = node.args[0]
        names = str(before.target), str(node.target)
        folds = (
            isinstance(before, fx.Node)
            and before.op == "call_module"
            and isinstance(modules[names[0]], nn.Conv2d)
            and len(before.users) == 1  # whoever else reads the convolution needs it as it was
            and calls[names[0]] == calls[names[1]] == 1  # shared modules would be folded twice
            and modules[names[1]].running_mean is not None
        )
        if folds:
            _replace(network, names[0], fuse_conv_bn_eval(modules[names[0]], modules[names[1]]))
            node.replace_all_uses_with(before)
            graph.erase_node(node)
    graph.lint()
    return fx.GraphModule(network, graph, type(network).__name__)


def _replace(network: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(network.get_submodule(parent), attribute, module)
