"""Frozen models on a GPU: the live model's bits, what thaws them, graphs, and memory given back."""

from __future__ import annotations

import copy
import gc
import io

import pytest
import torch
from gpu_checks import DEVICE, captured, make_model, make_small, randn
from oracle import operators

import mnv2_fused

pytestmark = pytest.mark.usefixtures("exact_float32")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("release", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_frozen_gives_the_live_bits(dtype, release):
    model, x = make_small().to(dtype), randn(8, 3, 40, 40).to(dtype)
    live, ran = model(x), operators(lambda: model(x))
    assert mnv2_fused.freeze(model, release=release) is model
    assert torch.equal(model(x), live) and operators(lambda: model(x)) == ran
    assert mnv2_fused.explain(model).frozen == set(mnv2_fused.explain(model))


def _load(model):
    model.load_state_dict({name: t * 1.5 if t.is_floating_point() else t for name, t in model.state_dict().items()})


def _scale(model):
    for parameter in model.parameters():
        parameter.mul_(1.25)


def _there_and_back(model):
    _scale(model)
    model.cpu().to(DEVICE)


def _train(model):
    _scale(model)
    model.train().eval()


def _assign(model):
    conv = model.features[2].conv[2]
    conv.weight = torch.nn.Parameter(conv.weight * 1.5)


def _thaw(model):
    _scale(model)
    mnv2_fused.thaw(model)


THAWS = {"load_state_dict": _load, "moves": _there_and_back, "train": _train, "an assignment": _assign, "thaw": _thaw}


@pytest.mark.parametrize("change", THAWS)
@torch.no_grad()
def test_what_thaws(change):
    model, x = mnv2_fused.freeze(make_small().half()), randn(8, 3, 40, 40).half()
    before = model(x)
    THAWS[change](model)
    after = model(x)
    assert not torch.equal(before, after) and not model._frozen
    assert torch.equal(after, copy.deepcopy(model)(x))


@torch.no_grad()
def test_writes_in_place_are_not_seen():
    model, x = mnv2_fused.freeze(make_small().half()), randn(8, 3, 40, 40).half()
    before = model(x)
    _scale(model)
    assert torch.equal(model(x), before)
    assert not torch.equal(mnv2_fused.freeze(model)(x), before)


@torch.no_grad()
def test_copies_and_files():
    model, x = mnv2_fused.freeze(make_small().half()), randn(8, 3, 40, 40).half()
    y = model(x)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert other._frozen and torch.equal(other(x), y)


@torch.no_grad()
def test_frozen_in_a_graph():
    model, x = mnv2_fused.freeze(make_small().half(), release=True), randn(8, 3, 40, 40).half()
    y = model(x)
    graph, got = captured(model, x)
    for scale in (1.0, 0.5):
        x.mul_(scale)
        graph.replay()
        assert torch.equal(got, model(x))
    assert not torch.equal(got, y)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@torch.no_grad()
def test_compiled(mode, fresh_dynamo):
    model, x = mnv2_fused.freeze(make_small().half(), release=True), randn(8, 3, 40, 40).half()
    function = torch.compile(model, fullgraph=True, mode=mode)
    for scale in (1.0, 0.5, 2.0):
        assert torch.equal(function(x * scale), model(x * scale))
    assert "frozen_network" in operators(lambda: function(x))


@torch.no_grad()
def test_release_gives_memory_back():
    model, x = make_model(1.0, 1000).half(), randn(1, 3, 64, 64).half()
    y = model(x).clone()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())

    def held() -> int:
        gc.collect()
        return torch.cuda.memory_allocated()

    live = held()  # weights, and packed ones
    mnv2_fused.freeze(model, release=True)
    assert live - held() > 0.95 * weights
    assert torch.equal(model(x), y)
    with pytest.raises(RuntimeError, match="gave them back"):
        model.state_dict()
