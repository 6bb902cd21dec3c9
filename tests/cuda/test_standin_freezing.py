"""Frozen modules, with the CPU in the place of a GPU."""

from __future__ import annotations

import copy

import pytest
import torch
from standin import autocast, make_block, make_model
from torch import Tensor

import mnv2_fused
from mnv2_fused._core import fit, freshness
from mnv2_fused.models.fused import FusedUnit


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Calls take the branches of a GPU."""
    monkeypatch.setattr(torch.Tensor, "is_cpu", property(lambda _: False), raising=False)
    monkeypatch.setattr(fit, "gpu_reason", lambda *_: None)


def make_frozen(whole: bool, release: bool) -> tuple[FusedUnit, Tensor, Tensor]:
    """A frozen block, or a whole frozen model; an input; and what the live one computed."""
    module, x = (make_model(), torch.randn(2, 3, 33, 33)) if whole else (make_block(), torch.randn(2, 8, 9, 9))
    y = module(x)
    return mnv2_fused.freeze(module, release=release), x, y


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("release", [False, True])
@pytest.mark.parametrize("whole", [False, True])
@torch.no_grad()
def test_a_captured_graph_of_a_frozen_module(whole, release, capture):
    module, x, y = make_frozen(whole, release)
    assert torch.equal(module(x), y)
    packed = module._cache.readings[None].packed
    graph = capture(module, x)
    assert graph is packed.data and module._cache.captured == [packed]
    assert capture(module, x) is graph and torch.equal(module(x), y)


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("whole", [False, True])
@torch.no_grad()
def test_a_captured_graph_gets_weights_that_are_frozen_again(whole, capture):
    module, x, y = make_frozen(whole, False)
    graph = capture(module, x)
    before = graph.clone()
    for parameter in module.parameters():
        parameter.mul_(1.5)
    assert torch.equal(module(x), y) and torch.equal(graph, before)  # writes in place are not seen
    changed = mnv2_fused.freeze(module)(x)
    assert not torch.equal(changed, y) and torch.equal(changed, mnv2_fused.thaw(copy.deepcopy(module))(x))
    assert torch.equal(graph, module._cache.readings[None].packed.data) and not torch.equal(graph, before)


@pytest.mark.usefixtures("as_on_a_gpu")
@torch.no_grad()
def test_nothing_is_checked_in_a_frozen_call(monkeypatch):
    module, x, y = make_frozen(True, False)
    monkeypatch.setattr(freshness.Packed, "holds", lambda _: pytest.fail("it looks at the weights"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: pytest.fail("it waits for the GPU"))
    assert torch.equal(module(x), y)


@pytest.mark.usefixtures("autocast_infers")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("whole", [False, True])
@torch.no_grad()
def test_a_frozen_module_under_autocast(whole, dtype):
    module, x, y = make_frozen(whole, False)
    live = mnv2_fused.thaw(copy.deepcopy(module))
    for _ in range(2):
        with autocast(dtype):
            assert torch.equal(module(x), live(x))
        assert torch.equal(module(x), y) and module._frozen


@pytest.mark.usefixtures("fresh_dynamo", "as_on_a_gpu")
@pytest.mark.parametrize("release", [False, True])
@torch.no_grad()
def test_a_captured_graph_of_a_compiled_frozen_network(release, capture):
    model, x, y = make_frozen(True, release)
    function = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(function(x), y)
    packed = model._cache.readings[None].packed
    assert capture(function, x) is packed.data and model._cache.captured == [packed]
