"""The operators on a GPU against the specification in float64, and their errors."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from gpu_checks import (
    ARITHMETICS,
    DEVICE,
    WIDTHS,
    block_weights,
    cast,
    channels_last,
    check_block,
    every_arithmetic,
    make_small,
    randn,
    rounding,
    tf32,
)
from oracle import assert_close
from torch import nn

import mnv2_fused
from mnv2_fused import _C, MobileNetV2, reference
from mnv2_fused import functional as ops
from mnv2_fused._core import call
from mnv2_fused._core.geometry import NO_BOUNDS, BlockShape, DenseShape, HeadShape

pytestmark = pytest.mark.usefixtures("exact_float32")


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


@every_arithmetic
@pytest.mark.parametrize(("n", "size", "c"), [(2, 10, 16), (1, 9, 13), (1, 7, 160)])
def test_output_bounds(n, size, c, arithmetic):
    """The hidden channels of the last one are split over thread blocks."""
    for output in ((0.0, 6.0), (-0.5, 0.25)):
        for expand, stride in ((True, 1), (True, 2), (False, 1)):
            weights = block_weights(c, 6 * c if expand else c, c, expand=expand)
            check_block(randn(n, c, size, size), weights, arithmetic, stride=stride, project_activation=output)


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


@every_arithmetic
@pytest.mark.parametrize(("c_in", "c_out", "kernel"), [(24, 12, 1), (320, 256, 1), (5, 33, 3), (16, 7, 1)])
def test_biases_of_images(c_in, c_out, kernel, arithmetic):
    x, weight = cast(
        [channels_last(randn(3, c_in, 17, 14)), randn(c_out, c_in, kernel, kernel)], ARITHMETICS[arithmetic]
    )
    weight, biases = weight / c_in**0.5, randn(3, c_out)
    options = {"stride": 1, "padding": (kernel // 2,) * 4}
    with tf32(arithmetic == "tf32"):
        got = ops.run_dense(x, ops.pack_dense(weight, None), **options, image_bias=biases)
    with rounding(arithmetic):
        expected = reference.dense(x, weight, None, **options, image_bias=biases.to(x.dtype))
    exact = reference.dense(x.double(), weight.double(), None, **options, image_bias=biases.double())
    assert_close(got, expected, exact)


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
    if _C.cuda_unfit("inverted_residual", (2, 6, 7, 700), fields, dtype, call.shared_memory(0)):
        pytest.skip("the GPU has too little shared memory")
    check_block(randn(2, 700, 6, 7), block_weights(700, 1100, 24), arithmetic)


@every_arithmetic
@pytest.mark.parametrize("layer", [0, 4], ids=["expansion", "projection"])
def test_infinite_weights_as_in_pytorch(layer, arithmetic):
    for x in (randn(1, 20, 5, 4), torch.randint(1, 4, (1, 20, 5, 4), device=DEVICE).float()):
        weights = block_weights(20, 40, 20)
        weights[layer][3, 5] = float("inf")
        check_block(x, weights, arithmetic, activation=(-float("inf"), float("inf")))


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
        ({"bounds": lambda bounds: bounds[:2]}, r"bounds must be \(lo, hi, lo of the output, .*\), got 2 values"),
        ({"bounds": lambda bounds: [7.0, *bounds[1:]]}, "activation bounds must satisfy lo <= hi"),
        ({"bounds": lambda bounds: [*bounds[:2], 1.0, 0.0]}, "activation bounds must satisfy lo <= hi"),
    ],
)
def test_errors_name_operator_argument_and_rule(change, message):
    arguments = {
        "x": channels_last(randn(2, 16, 9, 9).half()),
        "packed": ops.pack_block(*cast(block_weights(16, 96, 16), torch.float16)).data,
        "block": BlockShape(16, 96, 16, 3, 1, 1, (1,) * 4, True, True).fields(),
        "bounds": [0.0, 6.0, *NO_BOUNDS],
    }
    torch.ops.mnv2_fused.inverted_residual(**arguments)
    (name, changed), *_ = change.items()
    with pytest.raises((ValueError, RuntimeError), match=rf"mnv2_fused::inverted_residual: {message}"):
        torch.ops.mnv2_fused.inverted_residual(**{**arguments, name: changed(arguments[name])})


@pytest.mark.parametrize(
    "tile", [(8, 9, 1, 1, 0, 0), (3, 7, 1, 1, 1, 2), (4, 5, 1, 1, 0, 3), (4, 5, 1, 2, 0, 1), (9, 9, 2, 4, 1, 0)]
)
def test_chosen_plans(tile):
    weights = cast(block_weights(16, 128, 16), torch.float16)
    packed = ops.pack_block(*weights).data
    x = channels_last(randn(2, 16, 9, 9).half())
    block = BlockShape(16, 128, 16, 3, 1, 1, (1,) * 4, True, True).fields()
    planned = torch.ops.mnv2_fused.inverted_residual_planned
    got = planned(x, packed, block, [0.0, 6.0, *NO_BOUNDS], False, tile)
    options = {"stride": 1, "padding": (1,) * 4, "residual": True}
    expected = reference.inverted_residual(x.clone(), *weights, **options)
    assert_close(got, expected, reference.inverted_residual(x.double(), *cast(weights, torch.float64), **options))
    for wrong in [tile[1:], (0, *tile[1:]), (*tile[:3], 5, 0, 0), (*tile[:5], 33)]:
        with pytest.raises((ValueError, RuntimeError), match=r"tile must have"):
            planned(x, packed, block, [0.0, 6.0, *NO_BOUNDS], False, wrong)


@pytest.mark.parametrize("name", ["inverted_residual", "dense", "head"])
def test_opcheck(name):
    x, relu6 = channels_last(randn(2, 16, 9, 9).half()), [0.0, 6.0]
    block = ops.pack_block(*cast(block_weights(16, 96, 16), torch.float16))
    dense = ops.pack_dense(randn(8, 3, 3, 3).half(), None)
    head = ops.pack_head(randn(40, 16, 1, 1).half(), None, randn(5, 40).half(), None)
    arguments = {
        "inverted_residual": (
            x,
            block.data,
            BlockShape(16, 96, 16, 3, 1, 1, (1,) * 4, True, True).fields(),
            [*relu6, *NO_BOUNDS],
        ),
        "dense": (x[:, :3], dense.data, DenseShape(3, 8, 3, 2, (1,) * 4).fields(), relu6, False, randn(2, 8)),
        "head": (x, head.data, HeadShape(16, 40, 5).fields(), relu6),
    }
    torch.library.opcheck(getattr(torch.ops.mnv2_fused, name).default, arguments[name])
