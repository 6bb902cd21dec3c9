"""torchvision's ways to feature maps: IntermediateLayerGetter, and graphs of torch.fx."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from oracle import assert_close, check_training, operators, plain, randomize
from torch import nn

import mnv2_fused

SMALL = [[1, 8, 1, 1], [6, 16, 2, 2], [6, 24, 1, 2]]
UNITS = ["dense", *["inverted_residual"] * 4, "dense"]


@pytest.fixture
def theirs(torchvision_mobilenetv2):
    model = torchvision_mobilenetv2.MobileNetV2(7, 0.5, SMALL)
    return randomize(model, torch.randn(4, 3, 40, 40))


@pytest.fixture
def getter(theirs):
    utils = pytest.importorskip("torchvision.models._utils")
    # Built from units that are in eval mode, and itself never told of it, as in torchvision's own functions.
    return mnv2_fused.convert(utils.IntermediateLayerGetter(theirs.features, {"1": "low", "3": "middle", "5": "high"}))


def copies(call) -> int:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    return sum(event.name == "aten::copy_" for event in profile.events())


def assert_same_maps(got, model, x):
    reference = plain(model)
    theirs, exact = reference(x), copy.deepcopy(reference).double()(x.double())
    assert list(got) == list(theirs) and type(got) is type(theirs)
    for name, y in got.items():
        assert y.stride() == theirs[name].stride(), name
        assert_close(y, theirs[name], exact[name])


# ------------------------------------------------------------------------------------------- IntermediateLayerGetter


@pytest.mark.parametrize("weights", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("given", [torch.contiguous_format, torch.channels_last])
@torch.no_grad()
def test_a_layer_getter_is_one_operator(getter, given, weights):
    getter.to(memory_format=weights)
    x = torch.randn(2, 3, 40, 40).contiguous(memory_format=given)
    assert_same_maps(getter(x), getter, x)
    assert operators(lambda: getter(x)) == ["network"]
    contiguous = torch.contiguous_format
    assert copies(lambda: getter(x)) == (3 if given is weights is contiguous else 0)
    assert list(mnv2_fused.explain(getter, x)) == [str(i) for i in range(6)]
    assert set(mnv2_fused.explain(getter, x).values()) == {None}


@torch.no_grad()
def test_a_layer_getter_unit_by_unit(getter):
    x = torch.randn(2, 3, 40, 40)
    seen = []
    getter["2"].register_forward_hook(lambda module, arguments, y: seen.append(y.is_contiguous()))
    getter(x)
    assert operators(lambda: getter(x)) == UNITS and seen == [True, True]
    assert_same_maps(getter(x), getter, x)
    getter["2"]._forward_hooks.clear()
    with mnv2_fused.unit_by_unit(getter):
        assert operators(lambda: getter(x)) == UNITS and copies(lambda: getter(x)) == 3
    assert operators(lambda: getter(x)) == ["network"]


def test_training_a_layer_getter(getter):
    class Sum(nn.Module):
        def __init__(self, getter):
            super().__init__()
            self.getter = getter

        def forward(self, x):
            return torch.cat([y.mean((2, 3)) for y in self.getter(x).values()], 1)

    trained = ["train_dense", *["train_block"] * 4, "train_dense"]
    trained += [f"{name}_backward" for name in trained]
    check_training(Sum(getter).train(), torch.randn(2, 3, 16, 16), trained, margin=1e-6)


@pytest.mark.parametrize("training", [False, True])
def test_gradients_reach_the_maps_on_the_way(getter, training):
    """The maps of a getter are what its later units read, also if their memory format was changed for the caller."""
    low, middle, high = getter.train(training)(torch.randn(4, 3, 40, 40)).values()
    assert low.is_contiguous()
    for grad in torch.autograd.grad(high.square().sum(), (low, middle)):
        assert grad.abs().sum() > 0


@torch.no_grad()
def test_changes_of_a_layer_getter_are_seen(getter):
    x = torch.randn(2, 3, 40, 40)
    getter(x)
    getter.return_layers = {"5": "out", "2": "in"}
    found = getter(x)
    assert list(found) == ["in", "out"]
    assert_same_maps(found, getter, x)
    getter.pop("5"), getter.pop("4")
    getter.return_layers = {"3": "out"}
    assert_same_maps(getter(x), getter, x)
    getter.fused = False
    assert operators(lambda: getter(x)) == []


@torch.no_grad()
def test_a_layer_getter_keeps_its_class(getter, torchvision_mobilenetv2):
    from torchvision.models._utils import IntermediateLayerGetter

    x = torch.randn(1, 3, 40, 40)
    assert isinstance(getter, IntermediateLayerGetter)
    for other in (copy.deepcopy(getter), pickle.loads(pickle.dumps(getter))):
        assert all(map(torch.equal, other(x).values(), getter(x).values()))
    scripted = torch.jit.script(getter)(x)
    for name, y in plain(getter)(x).items():
        assert torch.equal(scripted[name], y)
    assert type(mnv2_fused.revert(getter)) is IntermediateLayerGetter
    assert operators(lambda: getter(x)) == []


# ----------------------------------------------------------------------------------------------------------- torch.fx


@pytest.mark.parametrize("own", [False, True])
@torch.no_grad()
def test_a_feature_extractor_keeps_units(theirs, own):
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    model = mnv2_fused.MobileNetV2(7, 0.5, SMALL).eval() if own else mnv2_fused.convert(theirs)
    nodes = {"features.2": "a", "features.4": "b"}
    found = extraction.create_feature_extractor(model, nodes)
    assert list(mnv2_fused.explain(found)) == [f"features.{i}" for i in range(5)]
    assert set(mnv2_fused.explain(found).values()) == {None}
    x = torch.randn(2, 3, 40, 40)
    assert operators(lambda: found(x)) == UNITS[:5]
    expected, exact = (extraction.create_feature_extractor(m, nodes) for m in (plain(model), plain(model).double()))
    for name, y in found(x).items():
        assert_close(y, expected(x)[name], exact(x.double())[name])
    nodes, _ = extraction.get_graph_node_names(model)
    assert nodes[1:7] == [f"features.{i}" for i in range(6)]
    model.fused = False
    inner, _ = extraction.get_graph_node_names(model)
    assert any(name.startswith("features.2.conv.") for name in inner)


def test_a_traced_network_trains(theirs):
    traced = torch.fx.symbolic_trace(mnv2_fused.convert(theirs).train())
    targets = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert targets == [*(f"features.{i}" for i in range(6)), "classifier.0", "classifier.1"]
    x = torch.randn(2, 3, 40, 40)
    assert operators(lambda: traced(x)) == ["train_dense", *["train_block"] * 4, "train_dense"]


@torch.no_grad()
def test_a_block_that_is_traced_itself_is_opened(theirs):
    block = mnv2_fused.convert(theirs).features[2]
    traced = torch.fx.symbolic_trace(block)
    assert any(node.target == "conv.0.0" for node in traced.graph.nodes)
    x = torch.randn(1, 8, 9, 9)
    assert torch.equal(traced(x), plain(block)(x))
