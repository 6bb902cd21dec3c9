"""torch.compile of frozen networks: one operator calls the module, and weights are no inputs of the graph."""

from __future__ import annotations

import copy
import gc
import threading

import pytest
import torch
from graphs import compiled, operators_in
from test_freezing import FAMILIES, X, assert_same, make, randomize_statistics, scale, tensors
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import mnv2_fused

FROZEN = torch.ops.mnv2_fused.frozen_network.default
CHANGED = r"frozen_network: the network must be what it was .* changed or is gone"


pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def traced(model: nn.Module) -> tuple[nn.Module, list[torch.fx.Graph]]:
    """The compiled model, and the list of its graphs."""
    graphs: list[torch.fx.Graph] = []
    return compiled(model, graphs), graphs


def operators(graphs: list[torch.fx.Graph]) -> list[str]:
    return [name for graph in graphs for name in operators_in(graph)]


def inputs(graphs: list[torch.fx.Graph]) -> list[int]:
    return [sum(node.op == "placeholder" for node in graph.nodes) for graph in graphs]


def randomized(name: str) -> nn.Module:
    model = FAMILIES[name]().eval()
    randomize_statistics(model)
    return model


@pytest.mark.parametrize("release", [False, True])
@pytest.mark.parametrize("enabled", [False, True])
@pytest.mark.parametrize("backend", ["inductor", "aot_eager"])
def test_bits(backend, enabled, release):
    model = mnv2_fused.freeze(make(), release=release)
    with torch.set_grad_enabled(enabled):
        function = torch.compile(model, fullgraph=True, backend=backend)
        for shape in ((2, 3, 64, 64), (1, 3, 64, 64), (3, 3, 96, 65)):
            x = torch.randn(shape)
            for given in (x, x.contiguous(memory_format=torch.channels_last)):
                assert_same(function(given), model(given))
                assert not function(given).requires_grad


@pytest.mark.parametrize("release", [False, True])
@pytest.mark.parametrize(
    "name",
    ["own", "torchvision", "torchvision features", "timm", "timm features", "transformers Model"],
)
@torch.no_grad()
def test_families(name, release):
    model, x = randomized(name), X[:, :, :, :48]
    y = model(x)
    assert tensors(y)[0].std() > 0
    function, graphs = traced(mnv2_fused.freeze(model, release=release))
    assert_same(function(x), y)
    assert operators(graphs) == ["frozen_network"] and inputs(graphs) == [1]


@torch.no_grad()
def test_other_maps_than_those_that_are_packed():
    model = mnv2_fused.freeze(randomized("transformers Model"))
    function, graphs = traced(model)
    for hidden, operator in ((True, "cached_network"), (None, "frozen_network")):
        got = function(X, output_hidden_states=hidden)
        expected = mnv2_fused.thaw(copy.deepcopy(model))(X, output_hidden_states=hidden)
        torch.testing.assert_close(tensors(got), tensors(expected), rtol=1e-3, atol=1e-3)
        assert operators(graphs)[-1] == operator


@torch.no_grad()
def test_units_outside_a_network_take_their_weights():
    model = mnv2_fused.freeze(randomized("own DeepLabV3"))
    function, graphs = traced(model)
    torch.testing.assert_close(function(X), model(X))
    assert operators(graphs) == ["frozen_network", *["cached_dense"] * (len(operators(graphs)) - 1)]
    released = torch.compile(mnv2_fused.freeze(model, release=True), fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match=r"freeze\(release=True\) gave"):
        released(X)


@torch.no_grad()
def test_a_network_in_a_larger_model():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), make(), nn.Linear(7, 2)).eval()
    mnv2_fused.freeze(model)
    y = model(X)
    function, graphs = traced(model)
    torch.testing.assert_close(function(X), y)
    assert operators(graphs) == ["frozen_network"] and inputs(graphs) == [5]


def _scaled(change):
    """`change` after a change of all weights, which a graph must not miss then."""
    return lambda model: (scale(model), change(model))


def _weight_inside(model):
    conv = model.features[2].conv[0][0]
    conv.weight = nn.Parameter(conv.weight * 1.5)


def _module_inside(model):
    block = model.features[4]
    block.conv[1] = copy.deepcopy(block.conv[1])
    block.conv[1][0].weight.mul_(1.5)


THAWS = {
    "thaw": _scaled(mnv2_fused.thaw),
    "load_state_dict": lambda model: model.load_state_dict(make().state_dict()),
    "a weight inside": _weight_inside,
    "a classifier": lambda model: setattr(model, "classifier", nn.Sequential(nn.Dropout(), nn.Linear(1280, 5)).eval()),
    "eps inside": lambda model: setattr(model.features[3].conv[0][1], "eps", 0.5),
    "a module inside": _module_inside,
    "fused": _scaled(lambda model: setattr(model, "fused", False)),
    "double": _scaled(lambda model: model.double().float()),
}


@pytest.mark.parametrize("name", THAWS)
@torch.no_grad()
def test_what_thaws_is_seen(name):
    model = mnv2_fused.freeze(make())
    function = torch.compile(model, backend="eager")
    before = function(X)
    assert_same(before, model(X))
    THAWS[name](model)
    got, expected = function(X), mnv2_fused.thaw(copy.deepcopy(model))(X)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
    assert got.shape != before.shape or not torch.allclose(got, before, rtol=0.02, atol=0.02)
    torch.testing.assert_close(function(X), model(X), rtol=1e-3, atol=1e-3)


def _hook_inside(model):
    model.features[5].register_forward_hook(lambda module, given, y: y * 1.5)


def _classes_inside(model):
    model.classifier[1] = nn.Linear(1280, 5)


def _compile_inside(model):
    scale(model)
    model.features[3].compile(backend="eager")


@pytest.mark.parametrize("change", [_hook_inside, _classes_inside, _compile_inside])
@pytest.mark.parametrize("backend", ["eager", "inductor"])
@torch.no_grad()
def test_what_the_graph_cannot_do_is_an_error_once(backend, change):
    model = mnv2_fused.freeze(make())
    function = torch.compile(lambda x: 2 * model(x), backend=backend)
    y = function(X)
    change(model)
    with pytest.raises(RuntimeError, match=CHANGED):
        function(X)
    got = function(X)
    torch.testing.assert_close(got, 2 * model(X), rtol=1e-3, atol=1e-3)
    assert got.shape != y.shape or not torch.allclose(got, y)


@torch.no_grad()
def test_modes_of_a_call():
    model = mnv2_fused.freeze(make())
    function, graphs = traced(model)
    y = function(X)
    hook = nn.modules.module.register_module_forward_hook(lambda module, given, output: None)
    try:
        assert torch.equal(function(X), y)
    finally:
        hook.remove()
    with FlopCounterMode(display=False) as counted:
        FROZEN(X, model._cache.name, model._cache.readings[None].arguments[0])
    with FlopCounterMode(display=False) as expected:
        mnv2_fused.thaw(model)(X)
    assert counted.get_total_flops() == expected.get_total_flops() > 0
    assert "frozen_network" in operators(graphs)


@torch.no_grad()
def test_threads_that_ask_for_other_maps():
    model = mnv2_fused.freeze(randomized("transformers Model"))
    y, cache = model(X).last_hidden_state, model._cache.parts["maps"]
    units = cache.readings[None].arguments[0]
    done, wrong = threading.Event(), []

    def others():
        while not done.is_set():
            model(X, output_hidden_states=True)
            mnv2_fused.freeze(model)

    thread = threading.Thread(target=others)
    thread.start()
    try:
        for _ in range(20):
            wrong.append(not torch.equal(FROZEN(X, cache.name, units)[0], y))
    finally:
        done.set()
        thread.join()
    assert not any(wrong)


@torch.no_grad()
def test_a_write_in_place_is_seen_by_the_next_freeze():
    model = mnv2_fused.freeze(make())
    function, graphs = traced(model)
    y = function(X)
    scale(model)
    assert torch.equal(function(X), y)
    mnv2_fused.freeze(model)
    changed = function(X)
    assert torch.equal(changed, model(X)) and not torch.equal(changed, y) and len(graphs) == 1
    mnv2_fused.thaw(model)
    scale(model)
    assert torch.equal(function(X), model(X)) and operators(graphs) == ["frozen_network", "cached_network"]


@pytest.mark.parametrize("compile_module", [lambda m: m.compile(backend="eager"), lambda m: torch.compile(m)])
def test_compiling_the_network_thaws_nothing(compile_module):
    model = mnv2_fused.freeze(make())
    frozen = mnv2_fused.explain(model).frozen
    compile_module(model)
    assert mnv2_fused.explain(model).frozen == frozen and model._frozen


@torch.no_grad()
def test_networks_of_one_class_have_graphs_of_their_own():
    models = [mnv2_fused.freeze(make()) for _ in range(2)]
    scale(models[1])
    mnv2_fused.freeze(models[1])
    functions = [torch.compile(model, fullgraph=True, backend="eager") for model in models]
    for _ in range(2):
        for model, function in zip(models, functions, strict=True):
            assert torch.equal(function(X), model(X))
    assert not torch.equal(functions[0](X), functions[1](X))


def test_other_taps_are_seen():
    backbone = mnv2_fused.freeze(mnv2_fused.models.backbone.Backbone({"low": 3, "high": 13}, width_mult=0.35).eval())
    with torch.no_grad():
        function, graphs = traced(backbone)
        assert_same(function(X), backbone(X))
        backbone.taps = {"low": 6}
        assert_same(function(X), backbone(X))
        mnv2_fused.freeze(backbone)
        backbone(X)
        assert_same(function(X), backbone(X))
    assert set(operators(graphs)) == {"frozen_network", "cached_network"}


def test_gradients_and_autocast_go_the_live_way():
    model = mnv2_fused.freeze(make())
    function, graphs = traced(model)
    x = X.clone().requires_grad_()
    function(x).sum().backward()
    expected = X.clone().requires_grad_()
    model(expected).sum().backward()
    torch.testing.assert_close(x.grad, expected.grad, rtol=1e-3, atol=1e-3)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(function(X), model(X), rtol=1e-2, atol=1e-2)
    assert "frozen_network" not in operators(graphs)


@torch.no_grad()
def test_a_copy_that_is_not_packed_yet():
    model = copy.deepcopy(mnv2_fused.freeze(make()))
    function, _ = traced(model)
    y = function(X)
    assert torch.equal(y, model(X)) and torch.equal(function(X), y)


@torch.no_grad()
def test_operator():
    model = mnv2_fused.freeze(make())
    y, units = model(X), model._cache.readings[None].arguments[0]
    assert torch.equal(FROZEN(X, model._cache.name, units)[0], y)
    torch.library.opcheck(FROZEN, (X, model._cache.name, units))
    assert torch.equal(torch.vmap(lambda x: FROZEN(x, model._cache.name, units)[0])(X[None])[0], y)
    assert torch.Tag.cudagraph_unsafe in FROZEN.tags


@torch.no_grad()
def test_errors():
    model = mnv2_fused.freeze(make())
    name, units = model._cache.name, model._cache.readings[None].arguments[0]
    for cache, text in ((name, units + " "), ("nobody's", units)):
        with pytest.raises(RuntimeError, match=CHANGED):
            FROZEN(X, cache, text)
    model.fused = False
    with pytest.raises(RuntimeError, match=CHANGED):
        FROZEN(X, name, units)
    del model
    gc.collect()
    with pytest.raises(RuntimeError, match=CHANGED):
        FROZEN(X, name, units)


def test_an_exported_program_takes_weights():
    model = mnv2_fused.freeze(make())
    with torch.no_grad():
        program = torch.export.export(model, (X,))
        assert any("cached_network" in str(node.target) for node in program.graph.nodes)
        scale(model)
        y: Tensor = program.module()(X)
        assert torch.equal(y, mnv2_fused.thaw(model)(X))
