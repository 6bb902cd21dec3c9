"""Captured CUDA graphs, with the CPU in the place of a GPU."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from standin import autocast, make_block, make_model
from torch import Tensor, nn

from mnv2_fused import _C
from mnv2_fused._core import freshness
from mnv2_fused._core.packing import pack_block
from mnv2_fused.models.fused import BLOCK


@torch.no_grad()
def test_a_captured_graph_gets_changed_weights_from_the_next_call(capture):
    block, x = make_block(), torch.randn(1, 8, 9, 9)
    block(x)
    graph = capture(block, x)
    for change in (
        lambda: block.conv[0][0].weight.mul_(1.5),
        lambda: setattr(block.conv[2].weight, "data", block.conv[2].weight * 0.5),
        lambda: block.load_state_dict(make_block().state_dict()),
    ):
        before = graph.clone()
        change()
        y = block(x)
        fresh = copy.deepcopy(block)
        assert torch.equal(y, fresh(x)) and not torch.equal(graph, before)
        assert torch.equal(graph, fresh._cache.readings[None].packed.data)
        assert capture(block, x) is graph and len(block._cache.captured) == 1


@torch.no_grad()
def test_a_captured_graph_keeps_what_it_cannot_get_anew(capture):
    block, x = make_block(), torch.randn(1, 8, 9, 9)
    block(x)
    graph = capture(block, x)
    before, alive = graph.clone(), weakref.ref(graph)
    block.conv[0][0].weight = nn.Parameter(block.conv[0][0].weight * 1.5)  # a plain graph, too, reads the old weight
    block(x)
    block.to(torch.bfloat16)(x.to(torch.bfloat16))
    assert torch.equal(graph, before)
    del graph
    assert alive() is not None
    del block
    assert alive() is None


@torch.no_grad()
def test_what_is_not_packed_yet_is_packed_in_the_graph(capture):
    block, x = make_block(), torch.randn(1, 8, 9, 9)
    graph = capture(block, x)
    assert block._cache.readings == {} and block._cache.captured == []
    before = graph.clone()
    block.conv[0][0].weight.mul_(1.5)
    block(x)
    assert torch.equal(graph, before)  # no graph has run
    block.conv[0][0].weight.mul_(1.5)
    assert capture(block, x) is not block._cache.readings[None].packed.data


def test_nothing_is_compared_in_full_while_a_graph_is_captured(capture, monkeypatch):
    monkeypatch.setattr(freshness, "_watch", lambda t: _C.Watch.PLACE)
    with torch.inference_mode():
        block, x = make_block(), torch.randn(1, 8, 9, 9)
        y = block(x)
        packed = block._cache.readings[None].packed
        assert torch.equal(block(x), y) and block._cache.readings[None].packed is packed
        with monkeypatch.context() as patch:
            patch.setattr(torch, "equal", lambda *_: pytest.fail("a comparison waits for the GPU"))
            graph = capture(block, x)
        assert graph is not packed.data and block._cache.readings[None].packed is packed


@torch.no_grad()
def test_memory_that_another_has_written_is_packed_again(capture):
    block, x = make_block(), torch.randn(1, 8, 9, 9)
    weight, cache = block.conv[0][0].weight, block._cache
    first, second = weight.data, weight.data * 1.5
    spec = BLOCK.read(block, False)

    def traced() -> Tensor:
        return cache.packed(spec.flat().tensors, spec.flat().eps, torch.float32, pack_block)

    y = block(x)
    graph = capture(block, x)
    weight.data = second
    assert traced() is graph
    weight.data = first  # the module has seen this one, but its packed weights are gone
    assert torch.equal(block(x), y)
    weight.data = second
    assert torch.equal(block(x), copy.deepcopy(block)(x))


@pytest.fixture
def replay(monkeypatch):
    """`replay(module)` changes all tensors of `module` as a replayed CUDA graph does: without a trace on the host."""
    monkeypatch.setattr(freshness, "_watch", lambda t: _C.Watch.VERSION)
    monkeypatch.setattr(freshness, "_writes_unseen", lambda device: True)

    def write(module: nn.Module) -> None:
        for t in module.state_dict(keep_vars=True).values():
            if t.is_floating_point():
                t.data.mul_(1.1)

    return write


@pytest.mark.parametrize("what", ["block", "model", "compiled"])
@torch.no_grad()
def test_weights_trained_by_replays_are_seen_when_the_mode_changes(what, capture, replay):
    torch._dynamo.reset()
    module, x = (
        (make_block(), torch.randn(1, 8, 9, 9)) if what == "block" else (make_model(), torch.randn(2, 3, 33, 33))
    )
    captured = module if what == "block" else torch.compile(module, fullgraph=True, backend="aot_eager")
    call = captured if what == "compiled" else module
    before = captured(x)
    graph = capture(captured, x)
    call(x)
    replay(module)
    assert torch.equal(call(x), before)
    for _ in range(2):
        call.train()
        replay(module)
        call.eval()
        y, expected = call(x), copy.deepcopy(module)
        assert torch.equal(y, expected(x)) and not torch.equal(y, before)
        assert torch.equal(graph, expected._cache.readings[None].packed.data)
        before = y
    assert capture(captured, x) is graph
    packed = dict(module._cache.readings), dict(module._cache.traced)
    call.eval()
    call(x)
    assert (module._cache.readings, module._cache.traced) == packed


@torch.no_grad()
def test_only_what_a_gpu_has_is_forgotten_when_the_mode_changes():
    block, x = make_block(), torch.randn(1, 8, 9, 9)
    block(x)
    packed = block._cache.readings[None].packed
    block.train().eval()(x)
    assert block._cache.readings[None].packed is packed


@torch.no_grad()
def test_a_captured_graph_of_an_exported_program_outlives_the_model(capture):
    model, x = make_model(), torch.randn(2, 3, 33, 33)
    program = torch.export.export(model, (x,)).module()
    program(x)
    graph = capture(program, x)
    name, before, alive = model._cache.name, graph.clone(), weakref.ref(graph)
    del model, graph
    gc.collect()
    assert name not in freshness._owned
    for _ in range(2):
        for i in range(freshness._MAX_FOREIGN):
            freshness.by_name(f"another {i}")
        assert name not in freshness._foreign and torch.equal(alive(), before)
        program(x)
        assert torch.equal(alive(), before) and capture(program, x) is alive()
        next(program.parameters()).mul_(1.5)
        program(x)
        assert not torch.equal(alive(), before) and capture(program, x) is alive()
        before = alive().clone()


@pytest.mark.usefixtures("autocast_infers")
@torch.no_grad()
def test_those_who_share_the_memory_of_a_graph_pack_once(capture, monkeypatch):
    block, x = make_block().bfloat16(), torch.randn(1, 8, 9, 9).bfloat16()
    spec, waits = BLOCK.read(block, False), []

    def calls() -> None:
        for _ in range(3):
            block(x)
            block._cache.packed(spec.flat().tensors, spec.flat().eps, x.dtype, pack_block)
            with autocast():
                block(x)

    calls()
    graph = capture(block, x)
    with autocast():
        other = capture(block, x)
    monkeypatch.setattr(freshness, "_synchronize", waits.append)
    for _ in range(2):
        block.conv[0][0].weight.mul_(1.5)
        waits.clear()
        calls()
        assert len(waits) == 2  # before and after the copy
        expected = copy.deepcopy(block)
        assert torch.equal(block(x), expected(x))
        packed = expected._cache.readings[None].packed.data
        assert torch.equal(graph, packed) and torch.equal(other, packed)


@torch.no_grad()
def test_readings_are_replaced_and_never_written():
    block, x = make_block(), torch.randn(1, 8, 9, 9)
    block(x)
    readings = block._cache.readings
    block.conv[2].register_forward_hook(lambda *_: None)
    block(x)
    assert list(readings) == [None] and block._cache.readings == {}
