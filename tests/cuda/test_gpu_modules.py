"""Modules on a GPU: changed weights, gradients, autocast, and what does not fit."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from gpu_checks import (
    CHANGES,
    DEVICE,
    NETWORK,
    block_weights,
    captured,
    cast,
    format_of,
    make_small,
    randn,
)
from oracle import assert_close, check, operators, plain, randomize
from torch import Tensor, nn

import mnv2_fused
from mnv2_fused import InvertedResidual, reference
from mnv2_fused import functional as ops
from mnv2_fused._core import call
from mnv2_fused._core import library as _library

pytestmark = pytest.mark.usefixtures("exact_float32")


# --------------------------------------------------------------------------------------------- weights, gradients


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_changed_weights_are_seen(change):
    model, x = make_small().half(), randn(8, 3, 40, 40).half()
    y = check(model, x, NETWORK)
    CHANGES[change](model)
    assert not torch.equal(check(model, x, NETWORK), y)


@torch.no_grad()
def test_a_write_through_data_is_seen_with_the_next_change_that_leaves_a_trace():
    model, x = make_small().half(), randn(8, 3, 40, 40).half()
    check(model, x, NETWORK)
    weight = model.features[2].conv[0][0].weight
    weight.data.mul_(1.5)  # no promise: neither a version nor an address has changed
    weight.mul_(1.0)
    check(model, x, NETWORK)


def test_weights_of_inference_mode_are_compared_in_full():
    with torch.inference_mode():
        model, x = make_small().half(), randn(8, 3, 40, 40).half()
        weight = model.features[2].conv[0][0].weight
        assert weight.is_inference()
        y = model(x)
        packed = model._cache.readings[None].packed
        assert torch.equal(model(x), y) and model._cache.readings[None].packed is packed
        graph, of_graph = captured(model, x)
        for write in (weight.mul_, weight.data.mul_):
            write(1.5)
            changed = check(model, x, NETWORK)
            assert not torch.equal(changed, y)
            graph.replay()
            assert torch.equal(of_graph, changed)
            y = changed


@torch.no_grad()
def test_to_the_gpu_and_back():
    model, x = make_small(), randn(8, 3, 40, 40)
    y = check(model, x, NETWORK)
    check(model.cpu(), x.cpu(), NETWORK)
    assert torch.equal(check(model.to(DEVICE), x, NETWORK), y)
    assert torch.equal(check(copy.deepcopy(model), x, NETWORK), y)


def test_gradients_take_the_plain_path():
    model = make_small(dropout=0.0)
    expected, x = plain(model), randn(4, 3, 40, 40)
    for mode in (True, False):
        results = []
        for network in (model.train(mode), expected.train(mode)):
            given = x.clone().requires_grad_()
            network.zero_grad()
            network(given).square().sum().backward()
            results.append((given.grad, *(p.grad for p in network.parameters())))
        for ours, theirs in zip(*results, strict=True):  # the same operations, but some add in no fixed order
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * theirs.abs().max().item())
        # A copy, because one more update of the running statistics would make the two differ.
        assert operators(lambda: copy.deepcopy(model)(x)) == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_autocast(dtype):
    model, x = make_small(), randn(32, 3, 40, 40)
    check_autocast(model, x, NETWORK, dtype)
    model.features[2].register_forward_hook(lambda *_: None)
    check_autocast(model, x, ["dense", *["inverted_residual"] * 4, "head"], dtype)


def check_autocast(module: nn.Module, x: Tensor, fused: list[str], dtype: torch.dtype) -> None:
    reference = plain(module)
    with torch.no_grad():
        with torch.autocast("cuda", dtype):
            got, expected = module(x), reference(x)
            assert operators(lambda: module(x)) == fused
        assert_close(got, expected, reference.double()(x.double()))
    if got.dim() == 4:
        assert got.is_contiguous(memory_format=format_of(x))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("given", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_of_a_block(dtype, given, memory_format):
    x = randn(8, 16, 20, 20).to(given).contiguous(memory_format=memory_format)
    for channels, stride in ((16, 1), (24, 1), (16, 2)):
        block = randomize(InvertedResidual(16, channels, stride, 6), torch.randn(4, 16, 20, 20)).to(DEVICE)
        check_autocast(block, x, ["inverted_residual"], dtype)


@torch.no_grad()
def test_weights_are_packed_once_for_each_dtype_of_autocast():
    model, x = make_small(), randn(8, 3, 40, 40)
    packed = []
    for _ in range(2):
        model(x)
        for dtype in (torch.float16, torch.bfloat16):
            with torch.autocast("cuda", dtype):
                model(x)
        packed.append([model._cache.readings[dtype].packed for dtype in (None, torch.float16, torch.bfloat16)])
    assert all(first is second for first, second in zip(*packed, strict=True))


@pytest.mark.usefixtures("fresh_dynamo")
@torch.no_grad()
def test_compile_under_autocast():
    model = make_small()
    function = torch.compile(model, fullgraph=True)
    for _ in range(2):
        x = randn(8, 3, 40, 40)
        with torch.autocast("cuda", torch.float16):
            assert torch.equal(function(x), model(x))
            assert "cached_network" in operators(lambda x=x: function(x))


def test_autocast_with_gradients_takes_the_plain_path():
    model, x = make_small(dropout=0.0), randn(4, 3, 40, 40)
    for mode in (False, True):
        model.train(mode).zero_grad()
        with torch.autocast("cuda", torch.float16):
            y = model(x)
            assert operators(lambda: model(x)) == []
            why = set(mnv2_fused.explain(model, x).values())
        y.float().square().sum().backward()
        assert all(p.grad is not None for p in model.parameters())
        if not mode:
            assert why == {"gradients are needed, and training has kernels for the CPU alone"}
    with torch.no_grad(), torch.autocast("cuda", torch.float16):
        assert set(mnv2_fused.explain(model.eval(), x).values()) == {None}
        # The function does not support autocast, so the plain one computes it.
        y = mnv2_fused.inverted_residual(x, *block_weights(3, 12, 8))
        assert y.dtype == torch.float16


def test_explain():
    model, x = make_small(), randn(2, 3, 40, 40)
    names = [*(f"features.{i}" for i in range(6)), "head"]
    with torch.no_grad():
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            assert mnv2_fused.explain(model.to(dtype), x.to(dtype)) == dict.fromkeys(names)
            assert mnv2_fused.explain(model) == dict.fromkeys(names)
        assert "float64" in mnv2_fused.explain(model.double(), x.double())["features.1"]
    for given in (None, x):
        for why in mnv2_fused.explain(model.float(), given).values():
            assert why == "gradients are needed, and training has kernels for the CPU alone"


# ------------------------------------------------------------------------------------------------ what does not fit


def test_a_block_that_fits_no_gpu():
    x, weights = randn(1, 8, 70, 70).half(), cast(block_weights(8, 16, 8, 63), torch.float16)
    assert operators(lambda: mnv2_fused.inverted_residual(x, *weights)) == []
    expected = reference.inverted_residual(x, *weights, stride=1, padding=(31,) * 4, residual=True)
    assert torch.equal(mnv2_fused.inverted_residual(x, *weights), expected)
    message = (
        r"mnv2_fused::inverted_residual: 8 to 16 to 8 channels with kernel 63 .*: it needs \d+ bytes of shared memory"
    )
    with pytest.raises((ValueError, RuntimeError), match=message):
        ops.run_block(x, ops.pack_block(*weights), residual=True)


@torch.no_grad()
def test_modules_that_do_not_fit_run_plain(monkeypatch):
    """The GPU is made to look as if it had less shared memory."""
    model, x = make_small().half(), randn(8, 3, 40, 40).half()
    monkeypatch.setattr(call, "shared_memory", lambda index: 1 << 10)
    check(model, x, ["dense", "head"])
    found = mnv2_fused.explain(model, x)
    assert found["features.0"] is None and found["head"] is None
    assert re.match(r"it does not fit cuda:0: it needs \d+ bytes of shared memory, and .* 1024", found["features.2"])


@pytest.mark.usefixtures("fresh_dynamo")
@torch.no_grad()
def test_graphs_of_modules_that_do_not_fit(monkeypatch):
    model, x = make_small().half(), randn(8, 3, 40, 40).half()
    monkeypatch.setattr(call, "shared_memory", lambda index: 1 << 10)
    function = torch.compile(model, fullgraph=True, backend="eager")
    assert_close(function(x), plain(model)(x), plain(model).double()(x.double()))
    assert [name for name in operators(lambda: function(x)) if name.startswith("cached_")] == [
        "cached_dense",
        "cached_head",
    ]


@torch.no_grad()
def test_a_gpu_that_no_built_kernel_runs_on(monkeypatch):
    model, x = make_small().half(), randn(8, 3, 40, 40).half()
    assert torch.ops.mnv2_fused.cuda_kernels_refused(0) == ""
    monkeypatch.setattr(_library, "gpu_reason", lambda index: "none of the kernels runs")
    check(model, x, [])
    assert set(mnv2_fused.explain(model, x).values()) == {"the input is on cuda:0: none of the kernels runs"}
