"""The network in one operator on a GPU: values, streams and graphs."""

from __future__ import annotations

import concurrent.futures
import copy
import dataclasses

import pytest
import torch
from gpu_checks import (
    ARITHMETICS,
    CHANGES,
    DEVICE,
    NETWORK,
    WIDTHS,
    block_weights,
    captured,
    cast,
    channels_last,
    every_arithmetic,
    format_of,
    make_model,
    make_small,
    randn,
    rounding,
    tf32,
)
from oracle import assert_close, check, operators, plain, randomize
from test_networks import block, dense, one_by_one, random_network, run_network
from torch import nn

from mnv2_fused import InvertedResidual
from mnv2_fused import functional as ops
from mnv2_fused._core.specs import IMAGES, NetworkSpec, Step

pytestmark = pytest.mark.usefixtures("exact_float32")


# ---------------------------------------------------------------------------------------------------------- network


@every_arithmetic
@pytest.mark.parametrize("width", WIDTHS)
@torch.no_grad()
def test_network(width, arithmetic):
    dtype = ARITHMETICS[arithmetic]
    model, x = make_model(width).to(dtype), randn(16, 3, 96, 96).to(dtype)
    with tf32(arithmetic == "tf32"):
        got = model(x)
        assert operators(lambda: model(x[:2])) == NETWORK
    with rounding(arithmetic):
        expected = plain(model)(x)
    assert_close(got, expected, plain(model).double()(x.double()))
    assert got.shape == (16, 100) and got.is_contiguous()


@pytest.mark.parametrize("batch", [1, 2, 32])
def test_network_at_its_usual_size(batch):
    model = make_model(classes=1000, size=224).half()
    check(model, randn(batch, 3, 224, 224).half(), NETWORK)


@pytest.mark.parametrize("size", [(1, 1), (33, 47), (32, 64)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("options", [{}, {"tf_padding": True}, {"output_stride": 8}], ids=str)
def test_sizes_and_formats(size, memory_format, options):
    model = make_model(0.35, **options).half()
    check(model, randn(8, 3, *size).half().contiguous(memory_format=memory_format), NETWORK)


def test_strided_input():
    x = randn(8, 5, 80, 44).half()[:, 1:4, ::2, 2:42]
    check(make_small().half(), x, NETWORK)


def test_a_network_whose_units_run_one_by_one():
    model, x = make_small().half(), randn(8, 3, 40, 40).half()
    for unit in (model.features[1], model.features[3]):
        unit.register_forward_hook(lambda *_: None)
    check(model, x, ["dense", *["inverted_residual"] * 4, "head"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("seed", range(10))
@torch.no_grad()
def test_branches_and_taps(seed, dtype):
    """To the bit as the units one by one, every time. The stem is an output, so that it is not joined with a block."""
    with DEVICE:
        stem, *rest = random_network(seed).steps
    spec, x = NetworkSpec((stem._replace(tap=True), *rest), {}), randn([1, 2, 33][seed % 3], 3, 65, 62).to(dtype)
    expected = one_by_one(spec, x)
    for _ in range(5):
        for ours, theirs in zip(run_network(spec, x), expected, strict=True):
            assert torch.equal(ours, theirs) and ours.stride() == theirs.stride()


@torch.no_grad()
def test_a_joined_stem_before_branches():
    """To the bit as alone: a thread block rounds the stem's map as memory would."""
    with DEVICE:
        blocks = [block(32, 1, 16), block(16, 6, 24, 2, clamps=True), block(16, 6, 16), dense(24, 40)]
        steps = [Step(dense(3, 32, 3, 2), IMAGES, False)]
        steps += [Step(unit, source, source > 0) for unit, source in zip(blocks, (0, 1, 1, 2), strict=True)]
    x = randn(5, 3, 65, 62).half()
    joined, alone = (NetworkSpec((steps[0]._replace(tap=tap), *steps[1:]), {}) for tap in (False, True))
    for ours, theirs in zip(run_network(joined, x), run_network(alone, x)[1:], strict=True):
        assert torch.equal(ours, theirs)


@torch.no_grad()
def test_batch_of_none():
    model = make_small()
    y = model(randn(0, 3, 40, 40))
    assert y.shape == (0, 7) and y.device.type == "cuda" and y.is_contiguous()


@torch.no_grad()
def test_memory_formats_of_a_block():
    block = randomize(InvertedResidual(16, 24, 2, 6), torch.randn(4, 16, 20, 20)).to(DEVICE).half()
    x = randn(4, 16, 20, 20).half()
    for given in (x, channels_last(x), randn(4, 16, 20, 40).half()[..., ::2]):
        y = check(block, given, ["inverted_residual"])
        assert y.is_contiguous(memory_format=format_of(given))


@torch.no_grad()
def test_the_same_bits_every_time():
    model = make_model()
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        model = model.to(dtype)
        for batch in (1, 3, 64):
            x = randn(batch, 3, 96, 96).to(dtype)
            y = model(x)
            for _ in range(5):
                assert torch.equal(model(x), y)


def test_peak_memory():
    model, x = make_model(size=96).half(), channels_last(randn(64, 3, 224, 224).half())
    expected = plain(model).to(memory_format=torch.channels_last)

    def peak(network: nn.Module) -> int:
        with torch.no_grad():
            network(x)  # packs weights, chooses algorithms
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            network(x)
            torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    assert peak(model) < peak(expected) / 4


# ------------------------------------------------------------------------------------------------ streams and graphs


@torch.no_grad()
def test_current_stream():
    model, x = make_model().half(), randn(4, 3, 96, 96).half()
    y, other = model(x), torch.zeros_like(x)
    side, done = torch.cuda.Stream(), torch.cuda.Event()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        model(x)  # leaves free memory for the call below: allocating more may wait for the GPU
        torch.cuda.synchronize()
        torch.cuda._sleep(200_000_000)  # a tenth of a second: a kernel on another stream would still find zeros
        other.copy_(x)
        got = model(other)
        done.record()
    assert not done.query(), "the call has waited for the GPU"
    done.synchronize()
    assert torch.equal(got, y)


@torch.no_grad()
def test_weights_that_are_written_just_before_they_are_read():
    """Only the stream's order separates the packing or copying of weights from the kernels that read them."""
    x = channels_last(randn(2, 160, 7, 7).half())
    weights = [cast(block_weights(160, 960, 160), torch.float16) for _ in range(2)]
    packed = [ops.pack_block(*w) for w in weights]
    expected = [ops.run_block(x, p) for p in packed]
    torch.cuda.synchronize()
    for i in range(200):
        assert torch.equal(ops.run_block(x, ops.pack_block(*weights[i % 2])), expected[i % 2])
        copied = dataclasses.replace(packed[0], data=torch.empty_like(packed[0].data).copy_(packed[i % 2].data))
        assert torch.equal(ops.run_block(x, copied), expected[i % 2])


@torch.no_grad()
def test_weights_that_are_packed_in_a_graph():
    x, weights = channels_last(randn(2, 32, 14, 14).half()), cast(block_weights(32, 192, 32), torch.float16)
    ops.run_block(x, ops.pack_block(*weights))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ops.run_block(x, ops.pack_block(*weights))
    for _ in range(20):
        for t in weights:
            t.copy_(torch.randn_like(t))
        graph.replay()
        assert torch.equal(y, ops.run_block(x, ops.pack_block(*weights)))


@torch.no_grad()
def test_threads_that_launch_the_same_kernel():
    """Each thread has its own stream and needs another amount of shared memory."""
    weights = [block_weights(c_in, 6 * c_in, 24) for c_in in (32, 96, 160)]
    packed, inputs = [ops.pack_block(*w) for w in weights], [channels_last(randn(2, c, 14, 14)) for c in (32, 96, 160)]
    expected = [ops.run_block(x, p) for x, p in zip(inputs, packed, strict=True)]
    torch.cuda.synchronize()

    def work(i: int) -> bool:
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(500):
                y = ops.run_block(inputs[i % 3], packed[i % 3])
            return torch.equal(y, expected[i % 3])

    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        assert all(pool.map(work, range(6)))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")
@torch.no_grad()
def test_another_device_than_the_current_one():
    model, x = make_small().half(), randn(8, 3, 40, 40).half()
    y = model(x)
    assert torch.cuda.current_device() == 0
    got = model.to("cuda:1")(x.to("cuda:1"))
    assert got.device.index == 1 and torch.cuda.current_device() == 0
    assert torch.equal(got.to(DEVICE), y)


@pytest.mark.parametrize("batch", [1, 16])
@torch.no_grad()
def test_cuda_graph(batch):
    model, x = make_model().half(), randn(batch, 3, 96, 96).half()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            model(x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = model(x)
    for _ in range(3):
        x.copy_(randn(batch, 3, 96, 96))
        graph.replay()
        assert torch.equal(y, model(x))


def overwrite_free_memory(size: int) -> None:
    """Writes to all free memory that the allocator would give out for blocks of `size` bytes on the current stream."""
    taken = [torch.full((size,), 255, dtype=torch.uint8, device=DEVICE) for _ in range(64)]
    del taken


@torch.no_grad()
def test_a_captured_graph_gets_changed_weights_from_the_next_call():
    model, x = make_small().half(), randn(8, 3, 40, 40).half()
    model(x)
    graph, y = captured(model, x)
    for change in CHANGES.values():
        graph.replay()
        before = y.clone()
        change(model)
        expected = model(x)
        graph.replay()
        assert torch.equal(y, expected) and not torch.equal(y, before)
    assert len(model._cache.captured) == 1


@torch.no_grad()
def test_a_captured_graph_keeps_the_memory_it_reads():
    model, x = make_small().half(), randn(8, 3, 40, 40).half()
    expected = model(x)
    size = model._cache.readings[None].packed.data.numel()
    graph, y = captured(model, x)
    model.float()(x.float())
    torch.cuda.synchronize()
    overwrite_free_memory(size)
    graph.replay()
    assert torch.equal(y, expected)


@torch.no_grad()
def test_a_graph_that_packs_weights_itself():
    model, x = make_small().half(), randn(8, 3, 40, 40).half()
    copy.deepcopy(model)(x)  # loads the kernels
    graph, y = captured(model, x)
    assert model._cache.readings == {}
    for change in (lambda _: None, *CHANGES.values()):
        if change is CHANGES["other tensor"]:
            continue  # as in plain PyTorch, a graph reads the old weight's memory
        change(model)
        graph.replay()
        assert torch.equal(y, copy.deepcopy(model)(x))


@torch.no_grad()
def test_weights_packed_on_one_stream_are_read_on_another():
    model, x = make_small().half(), randn(8, 3, 40, 40).half()
    expected, side, other = copy.deepcopy(model)(x), torch.cuda.Stream(), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)
        model(x)
    with torch.cuda.stream(other):
        y = model(x)
    torch.cuda.synchronize()
    assert torch.equal(y, expected)


@torch.no_grad()
def test_memory_of_packed_weights_is_free_when_every_stream_has_read_them():
    model, x = make_small().half(), randn(8, 3, 40, 40).half()
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        expected = model(x)
    size = model._cache.readings[None].packed.data.numel()
    torch.cuda.synchronize()
    torch.cuda._sleep(200_000_000)
    y = model(x)
    del model
    with torch.cuda.stream(side):
        overwrite_free_memory(size)
    torch.cuda.synchronize()
    assert torch.equal(y, expected)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@torch.no_grad()
def test_compile(mode):
    model, x = make_small().half(), randn(4, 3, 40, 40).half()
    function = torch.compile(model, fullgraph=True, mode=mode)
    for _ in range(4):
        x = randn(4, 3, 40, 40).half()
        assert torch.equal(function(x).clone(), model(x))
    assert "cached_network" in operators(lambda: function(x))  # not in a graph, which would not check weights
    for change in CHANGES.values():
        y = function(x).clone()
        change(model)
        changed = function(x).clone()
        assert torch.equal(changed, model(x)) and not torch.equal(changed, y)


@torch.no_grad()
def test_export():
    model, x = make_small().half(), randn(4, 3, 40, 40).half()
    exported = torch.export.export(model, (x,))
    assert "mnv2_fused.cached_network" in str(exported.graph)
    assert torch.equal(exported.module()(x), model(x))
