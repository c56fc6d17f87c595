"""BatchNorm in eval mode folded into the convolution before it."""

from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from dfad.copies import copy_network
from dfad.engine.tracing import Trace, trace


def fold_batchnorm(network: nn.Module, traced: Trace | None = None) -> fx.GraphModule:
    """A copy of a network in eval mode whose BatchNorms that directly follow a convolution are folded into it.

    Its outputs are the same up to rounding, including taps: a tap is after a BatchNorm, never between it and its
    convolution.

    Args:
        network: in eval mode; not changed.
        traced: its trace in eval mode, if it is there already.

    Raises:
        NotPlain: if the network must not be rewritten.
    """
    traced = traced or trace(network, training=False)
    network, graph = copy_network(network), traced.graph
    modules = dict(network.named_modules())
    for node in list(graph.nodes):
        if node.op != "call_module" or type(modules[str(node.target)]) is not nn.BatchNorm2d:
            continue
        before = node.args[0] if node.args else None
        if not isinstance(before, fx.Node) or before.op != "call_module":
            continue
        names = str(before.target), str(node.target)
        convolution, norm = (modules[name] for name in names)
        folds = (
            type(convolution) is nn.Conv2d
            and isinstance(norm, nn.BatchNorm2d)
            and len(before.users) == 1  # other readers of the convolution need its unfolded result
            and traced.replaceable.issuperset(names)
            and norm.running_mean is not None
            and not norm.training
        )
        if folds:
            _replace(network, names[0], fuse_conv_bn_eval(convolution, norm))
            node.replace_all_uses_with(before)
            graph.erase_node(node)
    graph.lint()
    return fx.GraphModule(network, graph, type(network).__name__)


def _replace(network: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(network.get_submodule(parent), attribute, module)
