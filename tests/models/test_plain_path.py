"""Modules and calls that no fused kernel covers run plain, with the values and the errors of plain PyTorch."""

from __future__ import annotations

import pytest
import torch
from oracle import check, check_training, operators, plain
from test_modules import BLOCK, make_block
from torch import nn
from torch.nn.utils import parametrizations, weight_norm

import mnv2_fused
from mnv2_fused import InvertedResidual


class OtherTensor(torch.Tensor):
    pass


class CountingMode(torch.utils._python_dispatch.TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class FunctionMode(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def _hook(register):
    return lambda block: getattr(block.conv[0][1], register)(lambda *arguments: None)


def _replace(path, make):
    def change(block):
        parent = block.get_submodule(path.rpartition(".")[0])
        parent._modules[path.rpartition(".")[2]] = make()

    return change


def _set(path, attribute, value):
    return lambda block: setattr(block.get_submodule(path), attribute, value)


def _forward_of_an_instance(block):
    conv = block.conv[2]
    conv.forward = lambda x: nn.Conv2d.forward(conv, x) * 2


def _train_one_norm(block):
    block.conv[1][1].train()


def _forget_statistics(block):
    block.conv[3] = nn.BatchNorm2d(16, track_running_stats=False).eval()


CHANGES = {
    "forward hook": (_hook("register_forward_hook"), "has hooks"),
    "forward pre-hook": (_hook("register_forward_pre_hook"), "has hooks"),
    "backward hook": (_hook("register_full_backward_hook"), "has hooks"),
    "backward pre-hook": (_hook("register_full_backward_pre_hook"), "has hooks"),
    "hook on the sequence": (lambda b: b.conv.register_forward_hook(lambda m, a, y: y * 2), "has hooks"),
    "parametrization": (lambda b: parametrizations.weight_norm(b.conv[2]), "Parametrized"),
    "old weight norm": (lambda b: weight_norm(b.conv[2]), "has hooks"),
    "own forward": (_forward_of_an_instance, "overrides forward"),
    "a class swapped in place": (
        lambda b: setattr(
            b.conv[2], "__class__", type("Half", (nn.Conv2d,), {"forward": lambda self, x: x[:, :16] / 2})
        ),
        "is a Half",
    ),
    "another activation": (_replace("conv.0.2", nn.SiLU), "SiLU"),
    "another norm": (_replace("conv.1.1", lambda: nn.GroupNorm(4, 48)), "GroupNorm"),
    "no norm": (_replace("conv.3", nn.Identity), "Identity"),
    "different activations": (_replace("conv.1.2", nn.ReLU), "activations differ"),
    "one more child": (lambda b: b.conv.append(nn.Identity()), "children"),
    "another padding mode": (_set("conv.1.0", "padding_mode", "circular"), "circular"),
    "padded expansion": (_set("conv.0.0", "padding", (1, 1)), "padded"),
    "unequal strides": (_set("conv.1.0", "stride", (1, 2)), "axes"),
    "fused off": (lambda b: setattr(b, "fused", False), "fused is False"),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("after_a_fused_call", [False, True])
def test_unusual_child_runs_plain(name, after_a_fused_call):
    change, why = CHANGES[name]
    block, x = make_block(8, 16), torch.randn(2, 8, 10, 10)
    with torch.no_grad():
        if after_a_fused_call:
            assert operators(lambda: block(x)) == BLOCK
        change(block)
        if name == "another padding mode":
            block.conv[1][0]._reversed_padding_repeated_twice = [1, 1, 1, 1]
        assert why in mnv2_fused.explain(block)["InvertedResidual"]
        assert operators(lambda: block(x)) == []
        assert torch.equal(block(x), block._forward_plain(x))


@pytest.mark.parametrize("change", [_train_one_norm, _forget_statistics])
@pytest.mark.parametrize("after_a_fused_call", [False, True])
@torch.no_grad()
def test_batch_statistics_run_the_training_operator(change, after_a_fused_call):
    block, x = make_block(8, 16), torch.randn(4, 8, 10, 10)
    if after_a_fused_call:
        assert operators(lambda: block(x)) == BLOCK
    change(block)
    assert mnv2_fused.explain(block)["InvertedResidual"] is None
    check(block, x, ["train_block"])


def test_hook_on_the_block_itself_runs_and_so_does_the_fused_operator():
    block, x, seen = make_block(), torch.randn(1, 8, 9, 9), []
    block.register_forward_hook(lambda module, arguments, y: seen.append(y.shape))
    check(block, x, BLOCK)
    assert seen[0] == x.shape


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("double", lambda b, x: b.double()(x.double())),
        ("jit.trace", lambda b, x: torch.jit.trace(b, x, check_trace=False)(x)),
        ("vmap", lambda b, x: torch.vmap(b)(x[None])[0]),
        ("jvp", lambda b, x: torch.func.jvp(b, (x,), (torch.ones_like(x),))[0]),
        ("tensor subclass", lambda b, x: b(x.as_subclass(OtherTensor))),
        ("meta", lambda b, x: torch.zeros_like(b.to("meta")(x.to("meta")), device="cpu")),
    ],
)
def test_unusual_call_runs_plain(name, call):
    block, x = make_block(), torch.randn(2, 8, 9, 9)
    results = []
    reference = plain(block)
    with torch.no_grad():
        assert operators(lambda: results.append(call(block, x.clone()))) == []
        expected = call(reference, x.clone())
    assert torch.equal(results[0], expected)


@pytest.mark.parametrize("mode", [CountingMode, FunctionMode])
def test_modes_see_the_plain_network(mode):
    block, x = make_block(), torch.randn(1, 8, 9, 9)
    with torch.no_grad(), mode():
        assert operators(lambda: block(x)) == []


def test_default_device_does_not_stop_fusion():
    block, x = make_block(), torch.randn(1, 8, 9, 9)
    with torch.device("cpu"):
        check(block, x, BLOCK)
    with torch.device("meta"), torch.no_grad():
        assert block(x).device.type == "cpu"


def test_global_hooks_see_every_child():
    block, x, seen = make_block(), torch.randn(1, 8, 9, 9), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, arguments, y: seen.append(module))
    try:
        with torch.no_grad():
            block(x)
    finally:
        handle.remove()
    assert block.conv[0][0] in seen and block.conv[3] in seen


def test_forward_mode_tangents_arrive():
    block, x = make_block(), torch.randn(1, 8, 9, 9)
    with torch.no_grad(), torch.autograd.forward_ad.dual_level():
        y = block(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))
        assert torch.autograd.forward_ad.unpack_dual(y).tangent is not None


@pytest.mark.parametrize("training", [True, False])
def test_gradients_are_those_of_plain(training):
    check_training(make_block().train(training), torch.randn(2, 8, 9, 9))


def test_frozen_block_runs_fused_with_gradients_on():
    block, x = make_block().requires_grad_(False), torch.randn(1, 8, 9, 9)
    assert operators(lambda: block(x)) == BLOCK
    block.requires_grad_(True)
    assert operators(lambda: block(x)) == ["train_block"]
    assert block(x).requires_grad
    with torch.no_grad():
        assert operators(lambda: block(x)) == BLOCK


def test_train_and_eval():
    block, x = make_block(), torch.randn(2, 8, 9, 9)
    check(block, x, BLOCK)
    check_training(block.train(), x)
    # Inference uses the statistics that the step has updated.
    check(block.eval(), x, BLOCK)


@pytest.mark.parametrize("shape", [(2, 7, 9, 9), (8, 9), (2, 8, 9), (2, 8, 0, 9)])
def test_wrong_shape_raises_the_error_of_plain(shape):
    block, x = make_block(), torch.randn(shape)

    def error(module):
        try:
            with torch.no_grad():
                return tuple(module(x).shape)
        except Exception as exception:
            return type(exception), str(exception)

    assert error(block) == error(plain(block))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64])
def test_wrong_dtype_raises_the_error_of_plain(dtype):
    block = make_block()
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"Input type|expected .*type|dtype|not implemented"):
        block(torch.ones(1, 8, 9, 9, dtype=dtype))


def test_wrong_stride_is_rejected():
    with pytest.raises(ValueError, match="stride should be 1 or 2 instead of 3"):
        InvertedResidual(8, 8, 3, 6)
