"""Where PyTorch keeps what a graph has nothing of."""

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from dfad.engine import internals
from dfad.engine.tracing import NotPlain, trace


def test_private_names_are_those_that_were_checked():
    """Read in a newer version where hooks are kept, and whether there are further kinds; then name it."""
    assert torch.__version__.rpartition(".")[0] in internals.CHECKED_WITH
    assert not internals.missing()
    kept = {name for name in vars(nn.Module()) if name.endswith("_hooks")}
    assert kept == set(internals.HOOKS)
    everywhere = {name for name in vars(internals.module_globals) if name.startswith("_global_") and "_hooks" in name}
    others = ("_always_called", "_with_kwargs", "_registration_hooks")
    assert {name for name in everywhere if not name.endswith(others)} == set(internals.GLOBAL_HOOKS)


def test_each_hook_is_seen():
    register = (
        *("register_forward_pre_hook", "register_forward_hook", "register_full_backward_pre_hook"),
        *("register_full_backward_hook", "register_state_dict_pre_hook", "register_state_dict_post_hook"),
        *("register_load_state_dict_pre_hook", "register_load_state_dict_post_hook"),
    )
    for name in register:
        module = nn.Identity()
        assert not internals.has_hooks(module)
        getattr(module, name)(lambda *_: None)
        assert internals.has_hooks(module), name
    for name in ("register_hook", "register_post_accumulate_grad_hook"):
        parameter = nn.Parameter(torch.ones(1))
        assert not internals.parameter_has_hooks(parameter)
        getattr(parameter, name)(lambda *_: None)
        assert internals.parameter_has_hooks(parameter), name


def test_hooks_for_all_modules_are_seen():
    assert not internals.hooks_for_all_modules()
    for name in ("register_module_forward_hook", "register_module_full_backward_hook"):
        handle = getattr(internals.module_globals, name)(lambda *_: None)
        assert internals.hooks_for_all_modules(), name
        handle.remove()
    assert not internals.hooks_for_all_modules()


def test_writing_and_intercepting_are_seen():
    tensor = torch.zeros(2)
    before = internals.version(tensor)
    tensor.add_(1)
    assert internals.version(tensor) > before
    outside = internals.interceptors()
    with TorchFunctionMode():
        assert internals.interceptors() != outside
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        assert internals.interceptors() != outside
    assert internals.interceptors() == outside


def test_a_version_without_them_leaves_every_network_as_it_is(monkeypatch):
    monkeypatch.setattr(internals, "missing", lambda: ("_forward_hooks",))
    with pytest.raises(NotPlain, match="has no _forward_hooks, which would show hooks"):
        trace(nn.Sequential(nn.ReLU()), training=True)
