"""Corners of autograd: batched gradients, reentrant checkpoints, functional calls, half-frozen trunks, `update_bn`."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from oracle import assert_close, check_training, operators, plain, randomize
from test_training import BLOCK, make_block, make_stem
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from mnv2_fused import MobileNetV2

SMALL = [[1, 8, 1, 1], [6, 8, 1, 2], [6, 16, 1, 2]]
SHAPE = (4, 3, 33, 33)


def make_model(**options) -> MobileNetV2:
    return randomize(MobileNetV2(7, 0.5, SMALL, dropout=0.0, **options), torch.randn(SHAPE))


# -------------------------------------------------------------------------------------------------- batched gradients


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["block", "no expansion", "stem"])
def test_batched_gradients_are_those_of_single_calls(kind, training):
    module, shape = {
        "block": lambda: (make_block(), (2, 8, 5, 5)),
        "no expansion": lambda: (make_block(8, 8, 8), (2, 8, 5, 5)),
        "stem": lambda: (make_stem(), (2, 3, 5, 5)),
    }[kind]()
    x = torch.randn(shape, requires_grad=True)
    y = module.train(training)(x)
    leaves = [x, *module.parameters()]
    dys = torch.randn(3, *y.shape)
    singles = [torch.autograd.grad(y, leaves, dy, retain_graph=True) for dy in dys]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batched = torch.autograd.grad(y, leaves, dys, is_grads_batched=True)
    for got, *expected in zip(batched, *singles, strict=True):
        assert torch.equal(got, torch.stack(expected))


def test_jacobian_of_a_network():
    model, x = make_model().eval(), torch.randn(1, 3, 32, 32)
    jacobian = torch.autograd.functional.jacobian
    assert "train_block_backward" in operators(lambda: jacobian(model, x, vectorize=True))
    exact = jacobian(plain(model).double(), x.double())
    assert_close(jacobian(model, x, vectorize=True), jacobian(plain(model), x, vectorize=True), exact, factor=3)


# ------------------------------------------------------------------------------------------------- ways of calling it


def _loss(y):
    return (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum()


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_change_no_bit(reentrant):
    model = make_model().train()
    x, apart = torch.randn(SHAPE, requires_grad=True), copy.deepcopy(model)
    expected = torch.autograd.grad(_loss(apart(x)), [x, *apart.parameters()])
    features = model.features

    def run():
        y = checkpoint_sequential(features, 2, x, use_reentrant=reentrant)
        loss = _loss(model.classifier(y.mean((2, 3))))
        loss.backward()

    assert operators(run).count("train_block") > 3  # the first part runs again
    for (name, p), want in zip([("x", x), *model.named_parameters()], expected, strict=True):
        assert torch.equal(p.grad, want) or (p.grad - want).norm() < 1e-5 * want.norm(), name


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_block_in_eval(reentrant):
    block = make_block().eval()
    x = torch.randn(2, 8, 5, 5, requires_grad=True)
    expected = torch.autograd.grad(_loss(block(x)), [x, *block.parameters()])
    ran = operators(lambda: _loss(checkpoint(block, x, use_reentrant=reentrant)).backward())
    first = "inverted_residual" if reentrant else "train_block"  # without gradients, or with them
    assert ran == [first, *BLOCK]
    for got, want in zip([x.grad, *(p.grad for p in block.parameters())], expected, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("training", [True, False])
def test_functional_call_of_a_network(training):
    """With other parameters, then with its own again: nothing of the call stays behind."""
    model, other = make_model().train(training), make_model().train(training)
    x = torch.randn(SHAPE)
    state = {**dict(other.named_parameters()), **{name: b.clone() for name, b in other.named_buffers()}}
    own = copy.deepcopy(model.state_dict())
    y = torch.func.functional_call(model, state, (x,))
    _loss(y).backward()
    got = {name: p.grad for name, p in other.named_parameters()}
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(a, own[name]) for name, a in model.state_dict().items())
    twin = copy.deepcopy(other).requires_grad_()
    twin.zero_grad()
    if training:  # the call has updated the copies of the statistics alone
        assert all(torch.equal(b, other.get_buffer(n)) for n, b in twin.named_buffers())
    z = twin(x)
    _loss(z).backward()
    assert torch.equal(y, z)
    for name, p in twin.named_parameters():
        assert torch.equal(p.grad, got[name]), name
    if not training:
        with torch.no_grad():
            fresh = copy.deepcopy(model)
            assert torch.equal(torch.func.functional_call(model, state, (x,)), other(x))
            assert torch.equal(model(x), fresh(x))


def _freeze(model: nn.Module) -> nn.Module:
    """Half of the trunk as it is in fine-tuning: no gradients, fixed statistics."""
    model.train()
    for unit in model.features[:3]:
        unit.requires_grad_(False).eval()
    return model


def test_half_frozen_trunk():
    model = _freeze(make_model())
    x = torch.randn(SHAPE)
    before = copy.deepcopy(model.state_dict())
    ran = operators(lambda: _loss(model(x)).backward())
    # The frozen part infers, and no gradient is computed for it.
    assert ran.count("train_block_backward") == 1 and ran.count("train_block") == 1 and ran.count("dense") == 1
    for name, p in model.named_parameters():
        assert (p.grad is not None) == p.requires_grad, name
    for name, buffer in model.named_buffers():
        frozen = name.split(".")[1] in "012"
        assert torch.equal(buffer, before[name]) == frozen, name


def test_half_frozen_trunk_is_right():
    trained = ["train_block", "train_dense", "train_dense_backward", "train_block_backward"]
    fused = ["dense", "inverted_residual", "inverted_residual", *trained]
    check_training(_freeze(make_model()), torch.randn(SHAPE), fused, wants_input=False)


def test_update_bn():
    batches = [torch.randn(SHAPE) * (1 + i) for i in range(3)]
    model = make_model().train()
    reference, exact = plain(model), plain(model).double()
    ran = operators(lambda: torch.optim.swa_utils.update_bn(batches, model))
    assert ran.count("train_block") == 9 and "train_block_backward" not in ran
    torch.optim.swa_utils.update_bn(batches, reference)
    torch.optim.swa_utils.update_bn([x.double() for x in batches], exact)
    for (name, got), want, right in zip(model.named_buffers(), reference.buffers(), exact.buffers(), strict=True):
        if got.is_floating_point():
            assert_close(got, want, right, factor=3)
        else:
            assert torch.equal(got, want), name
