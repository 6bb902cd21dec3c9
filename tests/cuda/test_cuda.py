"""The CUDA kernels against the specification in float64, and the contract of functions and modules on a GPU.

float32 is tested twice: with TF32 allowed in convolutions (`torch.backends.cudnn.allow_tf32`), and without. Whether
cuDNN then uses TF32 depends on the shape. So "plain" with TF32 is computed here in float32, with the operands of
convolutions without groups rounded to TF32.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import copy
import dataclasses
import random
import re

import pytest
import torch
from oracle import assert_close, check, operators, plain, randomize, to_tf32
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import mnv2_fused
from mnv2_fused import _C, InvertedResidual, MobileNetV2, reference
from mnv2_fused import functional as ops
from mnv2_fused._core import call
from mnv2_fused._core import library as _library
from mnv2_fused._core.geometry import BlockShape, DenseShape, HeadShape

if not torch.cuda.is_available():
    pytest.skip("torch sees no GPU that it can use", allow_module_level=True)

DEVICE = torch.device("cuda")
ARITHMETICS = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "tf32": torch.float32}
WIDTHS = [0.35, 0.5, 0.75, 1.0, 1.4]
SMALL = [[1, 8, 1, 1], [6, 16, 2, 2], [6, 24, 1, 2]]
NETWORK = ["network"]

every_arithmetic = pytest.mark.parametrize("arithmetic", ARITHMETICS)


@pytest.fixture(autouse=True)
def _exact_float32():
    """TF32 is off unless a test allows it."""
    with tf32(False):
        yield


@contextlib.contextmanager
def tf32(allowed: bool):
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


class RoundedToTF32(TorchFunctionMode):
    """Rounds what tensor cores would round: both operands of convolutions without groups."""

    def __torch_function__(self, function, types, arguments=(), keywords=None):
        if function is torch.conv2d and arguments[0].dtype == torch.float32 and (arguments[6:] or (1,))[0] == 1:
            arguments = (*map(to_tf32, arguments[:2]), *arguments[2:])
        return function(*arguments, **(keywords or {}))


def rounding(arithmetic: str) -> contextlib.AbstractContextManager:
    return RoundedToTF32() if arithmetic == "tf32" else contextlib.nullcontext()


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE)


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def cast(tensors: list[Tensor | None], dtype: torch.dtype) -> list[Tensor | None]:
    return [None if t is None else t.to(dtype) for t in tensors]


def block_weights(c_in: int, c_hidden: int, c_out: int, kernel: int = 3, expand: bool = True) -> list[Tensor | None]:
    """Weights that keep activations of order one, so that both bounds of the clamps apply."""
    weights: list[Tensor | None] = []
    for shape in [(c_hidden, c_in, 1, 1), (c_hidden, 1, kernel, kernel), (c_out, c_hidden, 1, 1)]:
        weights += [randn(*shape) * 2 / (shape[1] * shape[2] * shape[3]) ** 0.5, randn(shape[0])]
    return weights if expand else [None, None, *weights[2:]]


def check_block(
    x: Tensor,
    weights: list[Tensor | None],
    arithmetic: str = "float16",
    *,
    stride: int = 1,
    dilation: int = 1,
    padding: tuple[int, ...] | None = None,
    activation: tuple[float, float] = (0.0, 6.0),
) -> Tensor:
    dtype = ARITHMETICS[arithmetic]
    x, weights = x.to(dtype), cast(weights, dtype)
    reach = (weights[2].shape[-1] - 1) * dilation
    padding = (reach // 2,) * 4 if padding is None else padding
    keeps = stride == 1 and padding[0] + padding[2] == padding[1] + padding[3] == reach
    options = {"stride": stride, "dilation": dilation, "padding": padding, "activation": activation}
    options["residual"] = keeps and x.shape[1] == weights[4].shape[0]
    with tf32(arithmetic == "tf32"):
        got = ops.run_block(x, ops.pack_block(*weights), **options)
    with rounding(arithmetic):
        expected = reference.inverted_residual(x.clone(), *weights, **options)  # a clone is aligned; cuDNN may need it
    assert_close(got, expected, reference.inverted_residual(x.double(), *cast(weights, torch.float64), **options))
    assert got.device == x.device and got.stride() == torch.empty_like(got, memory_format=_format(x)).stride()
    return got


def _format(x: Tensor) -> torch.memory_format:
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


# ----------------------------------------------------------------------------------------------------------- blocks


def network_blocks() -> list[tuple]:
    """Every distinct block of the widths at 224 x 224: h, c_in, c_hidden, c_out, stride, has_expand."""
    found = set()
    for width in WIDTHS:
        with torch.device("meta"):
            blocks = MobileNetV2(width_mult=width).features[1:-1]
        h = 112
        for block in blocks:
            convs = [m for m in block.modules() if isinstance(m, nn.Conv2d)]
            depthwise, project = convs[-2:]
            c_in, c_hidden = convs[0].in_channels, depthwise.out_channels
            found.add((h, c_in, c_hidden, project.out_channels, block.stride, len(convs) == 3))
            h = -(-h // block.stride)
    return sorted(found)


@every_arithmetic
@pytest.mark.parametrize("shape", network_blocks(), ids=str)
def test_blocks_of_the_network(shape, arithmetic):
    h, c_in, c_hidden, c_out, stride, has_expand = shape
    weights = block_weights(c_in, c_hidden, c_out, expand=has_expand)
    check_block(channels_last(randn(3, c_in, h, h)), weights, arithmetic, stride=stride)


@every_arithmetic
@pytest.mark.parametrize("expand", [True, False])
@pytest.mark.parametrize(
    ("kernel", "stride", "dilation", "padding"),
    [
        (3, 1, 2, None),
        (3, 2, 2, None),
        (3, 1, 4, (4, 4, 4, 4)),
        (3, 3, 1, None),
        (3, 2, 1, (0, 0, 1, 1)),
        (3, 1, 1, (0, 0, 0, 0)),
        (3, 1, 1, (2, 3, 1, 4)),
        (3, 2, 1, (5, 5, 5, 5)),
        (5, 1, 1, None),
        (5, 2, 1, (1, 1, 2, 2)),
        (5, 1, 2, None),
        (7, 1, 1, None),
        (1, 1, 1, None),
        (1, 2, 1, None),
    ],
)
def test_kernel_stride_dilation_padding(kernel, stride, dilation, padding, expand, arithmetic):
    weights = block_weights(24, 96 if expand else 24, 24, kernel, expand)
    check_block(randn(2, 24, 19, 22), weights, arithmetic, stride=stride, dilation=dilation, padding=padding)


@every_arithmetic
@pytest.mark.parametrize(
    ("c_in", "c_hidden", "c_out"),
    [(1, 1, 1), (3, 18, 5), (7, 33, 7), (8, 31, 9), (17, 65, 17), (20, 97, 33), (8, 385, 129), (63, 100, 63)],
)
def test_odd_channel_counts(c_in, c_hidden, c_out, arithmetic):
    for stride in (1, 2):
        check_block(randn(2, c_in, 11, 13), block_weights(c_in, c_hidden, c_out), arithmetic, stride=stride)
    check_block(randn(2, c_hidden, 9, 9), block_weights(c_hidden, c_hidden, c_out, expand=False), arithmetic)


@pytest.mark.parametrize("arithmetic", ["float16", "float32"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("w", [*range(1, 18), 27, 28, 29, 31, 32, 33, 57, 113])
def test_sizes_around_a_tile(w, stride, arithmetic):
    weights = block_weights(16, 64, 16)
    check_block(randn(2, 16, 15, w), weights, arithmetic, stride=stride)
    check_block(randn(2, 16, w, 17), weights, arithmetic, stride=stride)


@pytest.mark.parametrize("arithmetic", ["float16", "float32"])
@pytest.mark.parametrize("batch", [0, 1, 2, 5, 131, 257])
def test_batches(batch, arithmetic):
    for size in (7, 14):
        check_block(randn(batch, 32, size, size), block_weights(32, 192, 32), arithmetic)


@every_arithmetic
@pytest.mark.parametrize("activation", [(0.0, float("inf")), (-1.0, 1.0), (0.5, 2.0), (-float("inf"), float("inf"))])
def test_activation_bounds(activation, arithmetic):
    check_block(randn(2, 16, 10, 10), block_weights(16, 40, 16), arithmetic, activation=activation)


@pytest.mark.parametrize("seed", range(80))
def test_random_blocks(seed):
    r = random.Random(seed)
    kernel, dilation = r.choice([1, 3, 3, 3, 5]), r.choice([1, 1, 1, 2, 3])
    reach = (kernel - 1) * dilation + 1
    h, w, top, left = r.randint(1, 40), r.randint(1, 40), r.randint(0, reach), r.randint(0, reach)
    padding = (top, left, max(0, reach - h - top) + r.randint(0, 2), max(0, reach - w - left) + r.randint(0, 2))
    expand, c_in = r.random() < 0.7, r.randint(1, 80)
    weights = block_weights(c_in, r.randint(1, 300) if expand else c_in, r.randint(1, 80), kernel, expand)
    x = randn(r.randint(1, 9), c_in, h, w)
    x = channels_last(x) if r.random() < 0.5 else x
    arithmetic = r.choice(list(ARITHMETICS))
    check_block(x, weights, arithmetic, stride=r.randint(1, 3), dilation=dilation, padding=padding)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("expand", [True, False])
@every_arithmetic
def test_nan_and_inf_go_through_as_in_pytorch(arithmetic, expand, value):
    x, weights = randn(2, 20, 9, 9), block_weights(20, 50 if expand else 20, 20, expand=expand)
    x[1, 3, 4, 5] = value
    y = check_block(x, weights, arithmetic)
    assert y[0].isfinite().all() and y[1, :, :3].isfinite().all()
    if value != value:
        assert y[1, :, 3:6, 4:7].isnan().all()


def test_more_elements_than_an_int_counts():
    c, size = 24, 56
    n = 2**31 // (c * size * size) + 2
    if torch.cuda.mem_get_info()[0] < 3 * 2 * n * c * size * size:
        pytest.skip("the GPU has less than 13 GB free")
    weights = block_weights(c, 144, c)
    x = torch.empty(n, size, size, c, dtype=torch.float16, device=DEVICE).permute(0, 3, 1, 2)
    x[-3:] = randn(3, c, size, size)
    x[:1] = x[-1:]
    packed = ops.pack_block(*cast(weights, torch.float16))
    y = ops.run_block(x, packed, residual=True)
    assert y.numel() > 2**31 and torch.equal(y[:1], y[-1:])
    ends = check_block(x[-3:], weights)
    assert_close(y[-3:], ends, ends.double())


# ---------------------------------------------------------------------------------------------------- stem and head


@every_arithmetic
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(("c_out", "kernel", "stride"), [(16, 3, 2), (32, 3, 2), (48, 3, 2), (5, 3, 2), (8, 5, 1)])
def test_stem(c_out, kernel, stride, memory_format, arithmetic):
    x = randn(3, 3, 65, 62).contiguous(memory_format=memory_format)
    x, weight, bias = cast([x, randn(c_out, 3, kernel, kernel), randn(c_out)], ARITHMETICS[arithmetic])
    for padding in ((1, 1, 1, 1), (0, 0, 1, 1), (2, 3, 4, 1)):
        options = {"stride": stride, "padding": padding}
        with tf32(arithmetic == "tf32"):
            got = ops.run_dense(x, ops.pack_dense(weight, bias), **options)
        with rounding(arithmetic):
            expected = reference.dense(x, weight, bias, **options)
        assert_close(got, expected, reference.dense(x.double(), weight.double(), bias.double(), **options))


def check_head(x, weights, arithmetic):
    with tf32(arithmetic == "tf32"):
        got = ops.run_head(x, ops.pack_head(*weights))
    with rounding(arithmetic):
        expected = reference.head(x, *weights)
    assert_close(got, expected, reference.head(x.double(), *cast(weights, torch.float64)))


@every_arithmetic
@pytest.mark.parametrize(
    ("batch", "size", "c_in", "c_last", "classes"),
    [(1, 7, 320, 1280, 1000), (9, 7, 112, 1280, 1001), (2, 1, 16, 40, 1), (5, 3, 17, 49, 33), (130, 7, 320, 1280, 10)],
)
def test_head(batch, size, c_in, c_last, classes, arithmetic):
    weights = [randn(c_last, c_in, 1, 1) * 2 / c_in**0.5, randn(c_last)]
    weights += [randn(classes, c_last) / c_last**0.5, randn(classes)]
    x, *weights = cast([randn(batch, c_in, size, size), *weights], ARITHMETICS[arithmetic])
    check_head(x, weights, arithmetic)


@every_arithmetic
def test_values_that_do_not_fit_into_shared_memory_together(arithmetic):
    dtype = ARITHMETICS[arithmetic]
    x, weight, bias = cast([randn(2, 64, 21, 20), randn(40, 64, 7, 7) / 30, randn(40)], dtype)
    with tf32(arithmetic == "tf32"):
        got = ops.run_dense(x, ops.pack_dense(weight, bias))
    with rounding(arithmetic):
        expected = reference.dense(x, weight, bias, stride=2, padding=(3,) * 4)
    exact = reference.dense(x.double(), weight.double(), bias.double(), stride=2, padding=(3,) * 4)
    assert_close(got, expected, exact)
    weights = [randn(64, 1900, 1, 1) / 30, randn(64), randn(10, 64) / 8, randn(10)]
    x, *weights = cast([randn(3, 1900, 7, 7), *weights], dtype)
    check_head(x, weights, arithmetic)


@every_arithmetic
def test_one_place_for_weights(arithmetic):
    dtype = str(ARITHMETICS[arithmetic]).removeprefix("torch.")
    fields = BlockShape(700, 1100, 24, 3, 1, 1, (1,) * 4, True, False).fields()
    if _C.cuda_unfit("inverted_residual", (2, 6, 7, 700), [fields], dtype, call.shared_memory(0)):
        pytest.skip("the GPU has too little shared memory")
    check_block(randn(2, 700, 6, 7), block_weights(700, 1100, 24), arithmetic)


@every_arithmetic
@pytest.mark.parametrize("layer", [0, 4], ids=["expansion", "projection"])
def test_infinite_weights_as_in_pytorch(layer, arithmetic):
    for x in (randn(1, 20, 5, 4), torch.randint(1, 4, (1, 20, 5, 4), device=DEVICE).float()):
        weights = block_weights(20, 40, 20)
        weights[layer][3, 5] = float("inf")
        check_block(x, weights, arithmetic, activation=(-float("inf"), float("inf")))


# ---------------------------------------------------------------------------------------------------------- network


def make_model(width: float = 1.0, classes: int = 100, size: int = 64, **options) -> MobileNetV2:
    """A network on the GPU, in eval mode, with random batch-norm statistics."""
    model = MobileNetV2(classes, width, **options)
    return randomize(model, torch.randn(4, 3, size, size)).to(DEVICE)


def make_small(**options) -> MobileNetV2:
    return make_model(0.5, 7, 40, inverted_residual_setting=SMALL, **options)


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
        assert y.is_contiguous(memory_format=_format(given))


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


def captured(model: nn.Module, x: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph), torch.no_grad():
        y = model(x)
    return graph, y


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


@pytest.fixture
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_dynamo")
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


# --------------------------------------------------------------------------------------------- weights, gradients


def _step(model: nn.Module) -> None:
    parameter = model.features[1].conv[-2].weight
    parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD([parameter], lr=0.1).step()


CHANGES = {
    "in place": lambda m: m.features[2].conv[0][0].weight.mul_(1.5),
    "one element": lambda m: m.features[3].conv[1][0].weight[0, 0, 0, 0].add_(1.0),
    "statistics": lambda m: m.features[1].conv[0][1].running_var.mul_(1.5),
    "other tensor": lambda m: setattr(m.classifier[1].bias, "data", m.classifier[1].bias.data + 1),
    "optimizer": _step,
    "load_state_dict": lambda m: m.load_state_dict({k: v * 1.01 for k, v in m.state_dict().items()}),
}


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
        assert got.is_contiguous(memory_format=_format(x))


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


@pytest.mark.usefixtures("_fresh_dynamo")
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


@pytest.mark.usefixtures("_fresh_dynamo")
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


# ----------------------------------------------------------------------------------------------------------- errors


def test_packed_weights_that_are_not_aligned():
    x, packed = channels_last(randn(2, 8, 9, 9).half()), ops.pack_block(*cast(block_weights(8, 24, 8), torch.float16))
    shifted = torch.empty(packed.data.numel() + 2, dtype=torch.uint8, device=DEVICE)[2:].copy_(packed.data)
    with pytest.raises((ValueError, RuntimeError), match=r"packed must be aligned to 16 bytes, got .* 2 bytes behind"):
        ops.run_block(x, dataclasses.replace(packed, data=shifted))


@every_arithmetic
def test_inputs_that_are_not_aligned(arithmetic):
    """A view may begin at any element."""
    dtype = ARITHMETICS[arithmetic]
    n, c, size = 2, 32, 9
    x = torch.randn(n * c * size * size + 1, device=DEVICE).to(dtype)[1:].view(n, size, size, c).permute(0, 3, 1, 2)
    assert x.data_ptr() % 16 != 0 and x.is_contiguous(memory_format=torch.channels_last)
    for expand in (True, False):
        check_block(x, block_weights(c, 96 if expand else c, c, expand=expand), arithmetic)
    weights = cast([randn(40, c, 1, 1) / 6, randn(40), randn(10, 40) / 6, randn(10)], dtype)
    with tf32(arithmetic == "tf32"):
        got = ops.run_head(x, ops.pack_head(*weights))
    with rounding(arithmetic):
        expected = reference.head(x.clone(), *weights)
    assert_close(got, expected, reference.head(x.double(), *cast(weights, torch.float64)))


def test_tensors_on_different_devices():
    weights = block_weights(8, 24, 8)
    on_cpu = [t.cpu() for t in weights]
    x = randn(2, 8, 9, 9)
    with pytest.raises(TypeError, match=r"expand_weight must have .*torch\.float32 on cuda:0; got"):
        mnv2_fused.inverted_residual(x, *on_cpu)
    with pytest.raises(TypeError, match=r"expand_weight must have .*torch\.float32 on cpu; got"):
        mnv2_fused.inverted_residual(x.cpu(), *weights)
    for given, packed in ((x, ops.pack_block(*on_cpu)), (x.cpu(), ops.pack_block(*weights))):
        with pytest.raises((TypeError, ValueError, RuntimeError), match="packed"):
            ops.run_block(given, packed, residual=True)
    model = make_small()
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"device|type"):
        model(randn(2, 3, 40, 40).cpu())
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"device|type"):
        model.cpu()(randn(2, 3, 40, 40))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": lambda x: x[0]}, "x must have 4 dimensions"),
        ({"x": lambda x: x.double()}, "x must be float32, bfloat16 or float16"),
        ({"x": lambda x: x.contiguous()}, "x must be dense in channels_last order"),
        ({"packed": lambda packed: packed[1:]}, "packed must come from the matching pack operator"),
        ({"block": lambda block: [0, *block[1:]]}, "channel counts must be positive"),
        ({"block": lambda block: block[1:]}, r"block must be \(c_hidden, .*\), got 11 values"),
        ({"bounds": lambda _: [7.0, 6.0]}, "activation bounds must satisfy lo <= hi"),
    ],
)
def test_errors_name_operator_argument_and_rule(change, message):
    arguments = {
        "x": channels_last(randn(2, 16, 9, 9).half()),
        "packed": ops.pack_block(*cast(block_weights(16, 96, 16), torch.float16)).data,
        "block": BlockShape(16, 96, 16, 3, 1, 1, (1,) * 4, True, True).fields(),
        "bounds": [0.0, 6.0],
    }
    torch.ops.mnv2_fused.inverted_residual(**arguments)
    (name, changed), *_ = change.items()
    with pytest.raises((ValueError, RuntimeError), match=rf"mnv2_fused::inverted_residual: {message}"):
        torch.ops.mnv2_fused.inverted_residual(**{**arguments, name: changed(arguments[name])})


@pytest.mark.parametrize("name", ["inverted_residual", "dense", "head"])
def test_opcheck(name):
    x, relu6 = channels_last(randn(2, 16, 9, 9).half()), [0.0, 6.0]
    block = ops.pack_block(*cast(block_weights(16, 96, 16), torch.float16))
    dense = ops.pack_dense(randn(8, 3, 3, 3).half(), None)
    head = ops.pack_head(randn(40, 16, 1, 1).half(), None, randn(5, 40).half(), None)
    arguments = {
        "inverted_residual": (x, block.data, BlockShape(16, 96, 16, 3, 1, 1, (1,) * 4, True, True).fields(), relu6),
        "dense": (x[:, :3], dense.data, DenseShape(3, 8, 3, 2, (1,) * 4).fields(), relu6),
        "head": (x, head.data, HeadShape(16, 40, 5).fields(), relu6),
    }
    torch.library.opcheck(getattr(torch.ops.mnv2_fused, name).default, arguments[name])
