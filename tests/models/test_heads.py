"""Own classifiers and embeddings: stem to last convolution stay one operator, and a failed reading is remembered."""

from __future__ import annotations

import pytest
import torch
from oracle import assert_close, check, check_training, operators, plain
from test_model import NETWORK, TRAINED, make_small
from torch import nn

import mnv2_fused
from mnv2_fused._core.specs import HeadSpec
from mnv2_fused.models import fused, network

X = (8, 3, 40, 40)


def own_classifier() -> nn.Module:
    return nn.Sequential(nn.Linear(1280, 3), nn.Softmax(1)).eval()


def readings(monkeypatch) -> list[nn.Module]:
    """A list that every reading of a block is noted in from now on."""
    found, read = [], fused.read_block
    monkeypatch.setattr(fused, "read_block", lambda parts, train: found.append(parts) or read(parts, train))
    return found


@pytest.mark.parametrize("how", ["own classifier", "a plain block"])
@torch.no_grad()
def test_a_failed_reading_is_remembered(monkeypatch, how):
    model, x = make_small(), torch.randn(X)
    if how == "own classifier":
        model.classifier = own_classifier()
    else:
        model.features[2].conv[0][2] = nn.SiLU()
    model(x)
    found = readings(monkeypatch)
    for _ in range(2):
        model(x)
    assert not found


CHANGES = {
    "another classifier": lambda m: setattr(m, "classifier", nn.Sequential(nn.Dropout(), nn.Linear(1280, 3)).eval()),
    "a hook goes": lambda m: m.classifier[1]._forward_hooks.clear(),
    "data of another dtype": lambda m: setattr(m.classifier[1].weight, "data", m.classifier[1].weight.data.float()),
}
BEFORE = {
    "another classifier": lambda m: setattr(m, "classifier", own_classifier()),
    "a hook goes": lambda m: m.classifier[1].register_forward_hook(lambda *_: None),
    "data of another dtype": lambda m: setattr(m.classifier[1].weight, "data", m.classifier[1].weight.data.double()),
}


@pytest.mark.parametrize("change", BEFORE)
@torch.no_grad()
def test_a_change_makes_the_model_be_read_again(change):
    model, x = make_small(), torch.randn(X)
    BEFORE[change](model)
    assert isinstance(network.HEAD.read(model, False), str)
    for _ in range(2):
        if change != "data of another dtype":
            check(model, x, NETWORK)
        else:
            with pytest.raises(RuntimeError, match="dtype"):
                model(x)
    CHANGES[change](model)
    assert isinstance(network.HEAD.read(model, False), HeadSpec)
    y = check(model, x, NETWORK)
    units, packed = model._cache.readings[None].arguments[0], model._cache.readings
    assert packed and units.split()[-1] == str(y.shape[1])  # the classifier is in the operator


@torch.no_grad()
def test_requires_grad_is_not_remembered():
    model, x = make_small(), torch.randn(X)
    with torch.enable_grad():
        model(x)
        model.requires_grad_(False)
        assert operators(lambda: model(x)) == NETWORK


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_embeddings(dtype):
    model, x = make_small().to(dtype), torch.randn(X).to(dtype)
    reference = plain(model)
    exact = plain(model).double()
    maps = [m.forward_features(given) for m, given in ((model, x), (reference, x), (exact, x.double()))]
    assert operators(lambda: model.forward_features(x)) == NETWORK
    assert maps[0].stride() == maps[1].stride()
    assert_close(*maps)
    pooled = [m.forward_head(y, pre_logits=True) for m, y in zip((model, reference, exact), maps, strict=True)]
    assert pooled[0].shape == (8, 1280)
    assert_close(*pooled)
    right = exact(x.double())
    assert torch.equal(exact.forward_head(maps[2]), right)
    assert_close(model.forward_head(maps[0]), reference(x), right)


@torch.no_grad()
def test_embeddings_of_a_converted_network(torchvision_mobilenetv2):
    model = mnv2_fused.convert(torchvision_mobilenetv2.MobileNetV2(width_mult=0.35).eval())
    x = torch.randn(1, 3, 64, 64)
    y = model.forward_features(x)
    assert y.shape == (1, 1280, 2, 2) and y.is_contiguous() and operators(lambda: model.forward_features(x)) == NETWORK
    torch.testing.assert_close(model.forward_head(y), model(x))


def test_embeddings_in_training_and_under_hooks():
    model, x = make_small(dropout=0.0).train(), torch.randn(2, 3, 40, 40)
    assert operators(lambda: model.forward_features(x)) == TRAINED[:6]
    seen = []
    model.eval().features.register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad():
        model.forward_features(x)
    assert seen == [1]


def test_training_with_an_own_classifier():
    model = make_small()
    model.classifier = nn.Sequential(nn.Linear(1280, 8), nn.Tanh(), nn.Linear(8, 3))
    with torch.no_grad():
        assert set(mnv2_fused.explain(model).values()) == {None}
    check_training(model.train(), torch.randn(2, 3, 16, 16), TRAINED, margin=1e-6)
    assert set(mnv2_fused.explain(model).values()) == {None}


def test_a_frozen_trunk_under_a_classifier_that_trains():
    model, x = make_small(), torch.randn(X)
    model.classifier = own_classifier()
    model.features.requires_grad_(False)
    assert operators(lambda: model(x)) == NETWORK
    model(x).sum().backward()
    assert model.classifier[0].weight.grad is not None
