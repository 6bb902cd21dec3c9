"""Autocast and compilers on a GPU, with the CPU in its place."""

from __future__ import annotations

import pytest
import torch
from graphs import compiled
from oracle import assert_close, operators, plain, randomize
from standin import SMALL, autocast, image, make_block, make_model, on_gpu
from torch import Tensor, nn

import mnv2_fused
from mnv2_fused import InvertedResidual, MobileNetV2
from mnv2_fused._core import call
from mnv2_fused._core import library as _library
from mnv2_fused.models.fused import FusedUnit
from mnv2_fused.models.units import FusedConv2dNormActivation


def check_autocast(module: FusedUnit, x: Tensor, fused: list[str], dtype: torch.dtype = torch.bfloat16) -> Tensor:
    reference = plain(module)
    with torch.no_grad():
        with autocast(dtype):
            got, expected = module(x), reference(x)
            assert operators(lambda: module(x)) == fused
        assert_close(got, expected, reference.double()(x.double()))
    assert got.stride() == expected.stride()
    return got


@pytest.mark.usefixtures("autocast_infers")
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype, given, memory_format):
    def randn(*shape: int) -> Tensor:
        return torch.randn(shape).to(given).contiguous(memory_format=memory_format)

    block = ["inverted_residual"]
    y = check_autocast(make_block(), randn(2, 8, 9, 9), block, dtype)
    assert y.dtype == (dtype if given == dtype else torch.float32)  # the dtype of the sum
    assert check_autocast(make_block(8, 16), randn(2, 8, 9, 9), block, dtype).dtype == dtype
    assert check_autocast(make_block(8, 8, stride=2), randn(2, 8, 9, 9), block, dtype).dtype == dtype
    stem = randomize(FusedConv2dNormActivation(3, 16, stride=2, activation_layer=nn.ReLU6), torch.randn(2, 3, 9, 9))
    assert check_autocast(stem, randn(2, 3, 9, 9), ["dense"], dtype).dtype == dtype


@pytest.mark.usefixtures("autocast_infers")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_of_a_network(dtype):
    model, x = make_model(), torch.randn(16, 3, 33, 33)
    assert check_autocast(model, x, ["network"], dtype).dtype == dtype
    model.features[2].register_forward_hook(lambda *_: None)
    fused = ["dense", *["inverted_residual"] * 3, "head"]
    assert check_autocast(model, x, fused, dtype).dtype == dtype
    with torch.no_grad(), autocast(dtype):
        assert mnv2_fused.explain(model, x) == dict.fromkeys([*(f"features.{i}" for i in range(5)), "head"])


@pytest.mark.usefixtures("autocast_infers")
@torch.no_grad()
def test_weights_are_packed_once_for_each_dtype():
    block, x = make_block(), torch.randn(2, 8, 9, 9)

    def call(dtype: torch.dtype | None) -> Tensor:
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            return block(x)

    dtypes = [None, torch.bfloat16, torch.float16]
    outputs = [call(dtype) for dtype in dtypes]
    packed = {dtype: block._cache.readings[dtype].packed for dtype in dtypes}
    assert all(torch.equal(call(dtype), y) for dtype, y in zip(dtypes, outputs, strict=True))
    assert {dtype: reading.packed for dtype, reading in block._cache.readings.items()} == packed
    block.conv[0][0].weight.mul_(1.5)
    for dtype, y in zip(dtypes, outputs, strict=True):
        changed = call(dtype)
        assert not torch.equal(changed, y) and block._cache.readings[dtype].packed is not packed[dtype]
    block.conv[0][0].weight.mul_(1.5)
    call(None)
    assert list(block._cache.readings) == [None]  # the other dtypes' packed weights are dropped


@pytest.mark.usefixtures("autocast_infers")
@pytest.mark.parametrize("where", ["inside", "outside"])
@torch.no_grad()
def test_compiled_under_autocast(where):
    torch._dynamo.reset()
    for module, x in ((make_model(), torch.randn(4, 3, 33, 33)), (make_block(), torch.randn(2, 8, 9, 9))):
        if where == "inside":
            function = torch.compile(autocast()(module), fullgraph=True, backend="aot_eager")
        else:
            function = autocast()(torch.compile(module, fullgraph=True, backend="aot_eager"))
        with autocast():
            expected = module(x)
        y = function(x)
        assert y.dtype == expected.dtype and torch.equal(y, expected)
        assert any(name.startswith("cached_") for name in operators(lambda f=function, x=x: f(x)))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("enabled", [False, True])
def test_exported_under_autocast_of_a_gpu(monkeypatch, enabled, strict):
    monkeypatch.setattr(_library, "cuda_missing", None)
    monkeypatch.setattr(_library, "gpu_reason", lambda index: None)
    monkeypatch.setattr(call, "shared_memory", lambda index: 227 << 10)
    dtype = torch.float16 if enabled else torch.float32
    torch.set_autocast_enabled("cuda", enabled)
    try:
        for module, x, operator, output in (
            (MobileNetV2(7, 0.5, SMALL), image(2, 3, 33, 33), "cached_network", dtype),
            (InvertedResidual(8, 8, 1, 6), image(2, 8, 9, 9), "cached_inverted_residual", torch.float32),
            (InvertedResidual(8, 16, 2, 6), image(2, 8, 9, 9), "cached_inverted_residual", dtype),
        ):
            with torch.no_grad():
                graph = torch.export.export(on_gpu(module.eval()), (x,), strict=strict).graph
            (node,) = [n for n in graph.nodes if str(n.target).startswith("mnv2_fused.")]
            assert str(node.target) == f"mnv2_fused.{operator}.default"
            (computed,) = node.meta["val"] if operator == "cached_network" else [node.meta["val"]]
            assert node.args[0].meta["val"].dtype == computed.dtype == dtype
            assert next(iter(graph.output_node().args[0])).meta["val"].dtype == output
    finally:
        torch.set_autocast_enabled("cuda", False)


def test_compilers_leave_what_looks_at_weights_out_of_cuda_graphs():
    names = [name for name in dir(torch.ops.mnv2_fused) if name.startswith("cached_")]
    for name in (*names, "cached_inverted_residual", "cached_dense", "cached_head", "cached_network"):
        assert torch.Tag.cudagraph_unsafe in getattr(torch.ops.mnv2_fused, name).default.tags


def test_what_a_device_can_is_no_part_of_a_graph(monkeypatch):
    monkeypatch.setattr(_library, "cuda_missing", None)
    monkeypatch.setattr(_library, "gpu_reason", lambda index: torch.zeros(index).sum().item() or None)
    graphs = []

    def function(x: Tensor) -> Tensor:
        return x + 1 if call.device_reason(torch.device("cuda", 0)) is None else x

    torch._dynamo.reset()
    assert compiled(function, graphs)(torch.zeros(1)) == 1
    assert [node.op for node in graphs[0].nodes] == ["placeholder", "call_function", "output"]
