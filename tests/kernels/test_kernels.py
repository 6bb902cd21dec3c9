"""The kernels, through the functional operators, against the specification in float64, at shapes around tile sizes."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import assert_close
from torch import Tensor, nn

from mnv2_fused import _C, MobileNetV2, reference
from mnv2_fused import functional as ops
from mnv2_fused._core.geometry import NO_BOUNDS, BlockShape, DenseShape, HeadShape
from mnv2_fused.tools import measure
from mnv2_fused.tools.rates import block_shapes

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BLOCK = BlockShape(16, 96, 16, 3, 1, 1, (1, 1, 1, 1), True, True)
WIDTHS = [0.35, 0.5, 0.75, 1.0, 1.3, 1.4]


def block_weights(c_in: int, c_hidden: int, c_out: int, kernel: int = 3, expand: bool = True) -> list[Tensor | None]:
    """Weights that keep activations of order one, so that both bounds of the clamps apply."""
    shapes = [(c_hidden, c_in, 1, 1), (c_hidden, 1, kernel, kernel), (c_out, c_hidden, 1, 1)]
    weights: list[Tensor | None] = []
    for shape in shapes:
        fan_in = shape[1] * shape[2] * shape[3]
        weights += [torch.randn(shape) * 2 / fan_in**0.5, torch.randn(shape[0])]
    return weights if expand else [None, None, *weights[2:]]


def cast(tensors: list[Tensor | None], dtype: torch.dtype) -> list[Tensor | None]:
    return [None if t is None else t.to(dtype) for t in tensors]


def check_block(x: Tensor, weights: list[Tensor | None], dtype: torch.dtype = torch.float32, **options) -> Tensor:
    x, weights = x.to(dtype), cast(weights, dtype)
    got = ops.inverted_residual(x, *weights, **options)
    kernel, dilation = weights[2].shape[-1], options.get("dilation", 1)
    options["padding"] = padding = options.get("padding", ((kernel - 1) // 2 * dilation,) * 4)
    if "residual" not in options:
        keeps = padding[0] + padding[2] == padding[1] + padding[3] == (kernel - 1) * dilation
        options["residual"] = options.get("stride", 1) == 1 and keeps and x.shape[1] == weights[4].shape[0]
    plain = reference.inverted_residual(x, *weights, **options)
    exact = reference.inverted_residual(x.double(), *cast(weights, torch.float64), **options)
    assert_close(got, plain, exact)
    return got


def network_blocks() -> list[tuple]:
    """Every distinct block of the six widths at the sizes of a 96x96 input, for few pixels and all channel counts."""
    found = {
        tuple(shape[key] for key in ("h", "c_in", "c_hidden", "c_out", "stride", "has_expand"))
        for width in WIDTHS
        for shape in block_shapes(MobileNetV2(width_mult=width).eval(), 96)
    }
    return sorted(found)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", network_blocks(), ids=str)
def test_blocks_of_the_network(shape, dtype):
    h, c_in, c_hidden, c_out, stride, has_expand = shape
    check_block(
        torch.randn(2, c_in, h, h), block_weights(c_in, c_hidden, c_out, expand=has_expand), dtype, stride=stride
    )


@pytest.mark.parametrize("c_hidden", [1, 15, 17, 47, 48, 49, 95, 97, 385])
def test_hidden_channels_around_a_chunk(c_hidden):
    check_block(torch.randn(1, 8, 9, 9), block_weights(8, c_hidden, 12))
    check_block(torch.randn(1, c_hidden, 9, 9), block_weights(c_hidden, c_hidden, 12, expand=False))


@pytest.mark.parametrize("c_out", [*range(1, 10), 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 65, 97])
def test_output_channels_around_a_vector(c_out):
    check_block(torch.randn(1, 8, 6, 7), block_weights(8, 24, c_out))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("width", [*range(1, 20), 27, 28, 29, 57])
def test_widths_around_a_tile(width, stride):
    check_block(torch.randn(1, 4, 5, width), block_weights(4, 20, 8), stride=stride)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("height", [1, 2, 3, 5, 13, 14, 15, 40, 113])
def test_heights_around_a_strip(height, stride):
    check_block(torch.randn(1, 16, height, 30), block_weights(16, 60, 16), stride=stride)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("expand", [True, False])
@pytest.mark.parametrize(
    "padding", [(0, 0, 0, 0), (0, 0, 1, 1), (1, 1, 0, 0), (0, 1, 2, 0), (2, 3, 1, 4), (5, 5, 5, 5)]
)
def test_padding(padding, expand, dtype):
    for stride in (1, 2):
        check_block(
            torch.randn(2, 24, 8, 9), block_weights(24, 24, 24, expand=expand), dtype, stride=stride, padding=padding
        )


@pytest.mark.parametrize(("kernel", "stride", "dilation"), list(itertools.product([1, 3, 5, 7], [1, 2, 3], [1, 2, 4])))
def test_kernel_stride_dilation(kernel, stride, dilation):
    check_block(torch.randn(1, 10, 17, 15), block_weights(10, 50, 10, kernel), stride=stride, dilation=dilation)


@pytest.mark.parametrize(
    "activation", [(0.0, 6.0), (0.0, float("inf")), (-1.0, 1.0), (0.5, 2.0), (-float("inf"), float("inf"))]
)
def test_activation_bounds(activation):
    check_block(torch.randn(1, 16, 10, 10), block_weights(16, 40, 16), activation=activation)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("project_activation", [(0.0, 6.0), (-0.5, 0.25), (0.0, float("inf"))], ids=str)
def test_activation_behind_the_projection(project_activation, dtype):
    options = {"project_activation": project_activation}
    for c_in, c_hidden, c_out, size, residual in (
        (16, 40, 16, 10, True),
        (16, 40, 7, 10, False),
        (40, 600, 40, 7, True),  # several groups of hidden channels
        (40, 600, 24, 7, False),
        (24, 60, 24, 60, True),  # several strips
    ):
        check_block(torch.randn(3, c_in, size, size), block_weights(c_in, c_hidden, c_out), dtype, residual=residual,
                    **options)  # fmt: skip
    check_block(torch.randn(1, 50, 9, 9), block_weights(50, 50, 50, expand=False), dtype, residual=True, **options)


@pytest.mark.parametrize("shape", [(160, 960, 160, 33), (1280, 256, 512, 10), (64, 960, 24, 21)], ids=str)
def test_long_sums(shape):
    c_in, c_hidden, c_out, size = shape
    check_block(torch.randn(1, c_in, size, size), block_weights(c_in, c_hidden, c_out))


def test_residual_of_many_groups_in_16_bits():
    for dtype in DTYPES:
        check_block(torch.randn(3, 40, 7, 7), block_weights(40, 600, 40), dtype)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(data=st.data())
def test_random_blocks(data):
    def draw(lo, hi):
        return data.draw(st.integers(lo, hi))

    kernel, dilation = data.draw(st.sampled_from([1, 3, 3, 5])), data.draw(st.sampled_from([1, 1, 2, 3]))
    reach = (kernel - 1) * dilation + 1
    h, w = draw(1, 24), draw(1, 24)
    top, left = draw(0, reach), draw(0, reach)
    padding = (top, left, max(0, reach - h - top) + draw(0, 2), max(0, reach - w - left) + draw(0, 2))
    expand = data.draw(st.booleans())
    c_in = draw(1, 40)
    c_hidden = draw(1, 200) if expand else c_in
    torch.manual_seed(draw(0, 1 << 30))
    x = torch.randn(draw(1, 3), c_in, h, w)
    if data.draw(st.booleans()):
        x = x.contiguous(memory_format=torch.channels_last)
    weights = block_weights(c_in, c_hidden, draw(1, 40), kernel, expand)
    dtype = data.draw(st.sampled_from(DTYPES))
    check_block(x, weights, dtype, stride=draw(1, 3), dilation=dilation, padding=padding)


# ---------------------------------------------------------------------------------------------------- stem and head


def check_stem(x: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype, **options) -> None:
    x, weight, bias = cast([x, weight, bias], dtype)
    got = ops.run_dense(x, ops.pack_dense(weight, bias), **options)
    plain = reference.dense(x, weight, bias, **options)
    assert_close(got, plain, reference.dense(x.double(), weight.double(), bias.double(), **options))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("c_out", [16, 24, 32, 40, 48, 5])
def test_stem(c_out, memory_format, dtype):
    x = torch.randn(2, 3, 33, 30).contiguous(memory_format=memory_format)
    weight, bias = torch.randn(c_out, 3, 3, 3), torch.randn(c_out)
    for padding in ((1, 1, 1, 1), (0, 0, 1, 1), (0, 0, 0, 0), (2, 3, 4, 1)):
        check_stem(x, weight, bias, dtype, padding=padding)


@pytest.mark.parametrize(("kernel", "stride", "c_in"), [(1, 1, 1), (3, 1, 4), (5, 2, 2), (3, 3, 3), (7, 2, 3)])
def test_stem_of_other_kinds(kernel, stride, c_in):
    x = torch.randn(1, c_in, 20, 21)
    weight = torch.randn(12, c_in, kernel, kernel)
    check_stem(x, weight, torch.randn(12), torch.float32, stride=stride, padding=(kernel // 2,) * 4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("c_out", [1, 21, 48, 50, 256])
def test_bias_of_each_image(c_out, dtype):
    x, weight = cast([torch.randn(3, 40, 5, 6), torch.randn(c_out, 40, 1, 1) / 6], dtype)
    options = {"stride": 1, "padding": (0,) * 4, "activation": (0.0, float("inf"))}
    bias = torch.randn(3, c_out)
    got = ops.run_dense(x, ops.pack_dense(weight, None), image_bias=bias, **options)
    plain = reference.dense(x, weight, None, image_bias=bias.to(dtype), **options)
    exact = reference.dense(x.double(), weight.double(), None, image_bias=bias.double(), **options)
    assert_close(got, plain, exact)
    with pytest.raises(ValueError, match=r"image_bias must have shape \(3, "):
        torch.ops.mnv2_fused.dense(
            x, ops.pack_dense(weight, None).data, DenseShape(40, c_out, 1, 1, (0,) * 4).fields(), [0.0, 6.0], False,
            bias[:2],
        )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("c_in", [191, 193, 320, 640, 1280, 1999])
def test_long_sums_of_a_dense_convolution(c_in, dtype):
    x, weight = torch.randn(2, c_in, 10, 10).relu(), torch.randn(250, c_in, 1, 1) * 2 / c_in**0.5
    check_stem(x, weight, torch.randn(250), dtype, stride=1, padding=(0,) * 4)


def layouts(x: Tensor) -> dict[str, Tensor]:
    """`x` with its values in every order that a stem reads in its own way: planes, pixels, parts of a larger image."""
    larger = nn.functional.pad(x, (3, 5, 2, 4))
    part = (..., slice(2, -4), slice(3, -5))
    return {
        "planes": x.contiguous(),
        "pixels": x.contiguous(memory_format=torch.channels_last),
        "part of planes": larger[part],
        "part of pixels": larger.contiguous(memory_format=torch.channels_last)[part],
        "some of more planes": torch.stack([x, x + 1], 2)[:, :, 0],
        "every other row": x.repeat_interleave(2, 2)[:, :, ::2],
        "columns first": x.transpose(2, 3).contiguous().transpose(2, 3),
        "one plane three times": x[:, :1].expand_as(x),
        "one image for all": x[:1].expand_as(x),
    }


def test_stem_of_a_strided_input():
    x = torch.randn(2, 5, 40, 44)[:, 1:4, ::2, 3:30]
    assert not x.is_contiguous() and not x.is_contiguous(memory_format=torch.channels_last)
    check_stem(x, torch.randn(8, 3, 3, 3), torch.randn(8), torch.float32, padding=(1, 1, 1, 1))


# Rows of three planes are read in parts of 128 pixels.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 9, 127, 128, 129, 300])
@pytest.mark.parametrize("c_in", [1, 3])
def test_stem_of_every_layout(c_in, width, dtype):
    weight, bias = torch.randn(8, c_in, 3, 3), torch.randn(8)
    for x in layouts(torch.randn(2, c_in, 9, width).to(dtype)).values():
        check_stem(x, weight, bias, dtype, padding=(1, 1, 1, 1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("batch", "size", "c_in", "c_last", "classes"),
    [
        (1, 7, 320, 1280, 1000),
        (9, 7, 112, 1280, 1001),
        (2, 1, 16, 40, 1),
        (5, 3, 17, 49, 33),
        (16, 2, 8, 100, 10),
        (29, 1, 8, 100, 97),
    ],
)
def test_head(batch, size, c_in, c_last, classes, dtype):
    weights = [torch.randn(c_last, c_in, 1, 1) * 2 / c_in**0.5, torch.randn(c_last)]
    weights += [torch.randn(classes, c_last) / c_last**0.5, torch.randn(classes)]
    x, weights = torch.randn(batch, c_in, size, size).to(dtype), cast(weights, dtype)
    got = ops.run_head(x, ops.pack_head(*weights))
    assert_close(got, reference.head(x, *weights), reference.head(x.double(), *cast(weights, torch.float64)))


# ------------------------------------------------------------------------------------------------------- properties


def units() -> list:
    """Calls that together use every way of sharing work among threads."""
    calls = []
    for batch, size, c_in, c_hidden, c_out, stride in [
        (1, 40, 24, 144, 24, 1), (3, 14, 64, 384, 64, 1), (1, 7, 160, 960, 320, 1), (5, 28, 16, 96, 24, 2),
    ]:  # fmt: skip
        x = torch.randn(batch, c_in, size, size).contiguous(memory_format=torch.channels_last)
        packed = ops.pack_block(*block_weights(c_in, c_hidden, c_out))
        residual = stride == 1 and c_in == c_out
        calls.append(lambda x=x, p=packed, s=stride, r=residual: ops.run_block(x, p, stride=s, residual=r))
    image, stem = torch.randn(1, 3, 65, 65), ops.pack_dense(torch.randn(32, 3, 3, 3), torch.randn(32))
    calls.append(lambda: ops.run_dense(image, stem))
    features = torch.randn(3, 320, 7, 7)
    head = ops.pack_head(torch.randn(1280, 320, 1, 1), torch.randn(1280), torch.randn(100, 1280), torch.randn(100))
    calls.append(lambda: ops.run_head(features, head))
    return calls


def test_the_same_bits_for_any_number_of_threads():
    calls = units()
    results = {}
    for threads in (1, 2, 3, 5, 8):
        with measure.threads(threads):
            results[threads] = [call() for call in calls]
    for threads, outputs in results.items():
        for expected, got in zip(results[1], outputs, strict=True):
            assert torch.equal(expected, got), f"{threads} threads"


def test_concurrent_calls_from_python_threads():
    calls = units()
    expected = [call() for call in calls]
    with ThreadPoolExecutor(8) as pool:
        futures = [(i % len(calls), pool.submit(calls[i % len(calls)])) for i in range(160)]
        assert all(torch.equal(future.result(), expected[i]) for i, future in futures)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("expand", [True, False])
def test_nan_and_inf_go_through_as_in_pytorch(expand, value):
    x, weights = torch.randn(2, 20, 9, 9), block_weights(20, 50 if expand else 20, 20, expand=expand)
    x[1, 3, 4, 5] = value
    y = check_block(x, weights)
    assert y[0].isfinite().all()
    if value != value:
        assert y[1, :, 3:6, 4:7].isnan().all()
    assert y[1, :, :3].isfinite().all()


def test_denormals_of_the_caller_survive():
    units()[0]()
    with measure.threads(2):
        assert (torch.full((1000,), 1e-40) * 0.5 > 0).all()


def test_scratch_is_counted_and_far_below_the_expanded_tensor():
    x = torch.randn(1, 24, 56, 56).contiguous(memory_format=torch.channels_last)
    packed = ops.pack_block(*block_weights(24, 144, 24))
    with measure.threads(1):
        _C.reset_scratch_high_water()
        ops.run_block(x, packed, residual=True)
        used = _C.scratch_high_water()
    assert 0 < used < 4 * 144 * 56 * 56 / 10


@pytest.mark.parametrize("name", ["inverted_residual", "dense", "head"])
def test_opcheck(name):
    x = torch.randn(2, 16, 9, 9).contiguous(memory_format=torch.channels_last)
    operator = getattr(torch.ops.mnv2_fused, name).default
    relu6 = [0.0, 6.0]
    packed = {
        "inverted_residual": ops.pack_block(*block_weights(16, 96, 16)).data,
        "dense": ops.pack_dense(torch.randn(8, 3, 3, 3), None).data,
        "head": ops.pack_head(torch.randn(40, 16, 1, 1), None, torch.randn(5, 40), None).data,
    }
    arguments = {
        "inverted_residual": (x, packed[name], BLOCK.fields(), [*relu6, *NO_BOUNDS]),
        "dense": (x[:, :3], packed[name], DenseShape(3, 8, 3, 2, (1, 1, 1, 1)).fields(), relu6),
        "head": (x, packed[name], HeadShape(16, 40, 5).fields(), relu6),
    }
    torch.library.opcheck(operator, arguments[name])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.randn(2, 16, 9)}, "x must have 4 dimensions"),
        ({"x": torch.randn(2, 16, 9, 9).double()}, "x must be float32, bfloat16 or float16"),
        ({"x": torch.randn(2, 16, 9, 9)}, "x must be dense in channels_last order"),
        ({"packed": torch.zeros(3)}, "packed must come from the matching pack operator"),
        ({"packed": torch.zeros(9, dtype=torch.uint8)[1:]}, "packed must come from the matching pack operator"),
        ({"block": BLOCK._replace(c_hidden=0)}, "channel counts must be positive"),
        ({"block": BLOCK._replace(kernel=2)}, "kernel must be odd"),
        ({"block": BLOCK._replace(stride=0)}, "stride and dilation must be positive"),
        ({"block": BLOCK._replace(stride=0, padding=None)}, "stride and dilation must be positive"),
        ({"block": BLOCK._replace(dilation=1 << 62, padding=None)}, "stride and dilation must be at most"),
        ({"block": BLOCK._replace(stride=2)}, "a residual needs stride 1"),
        ({"block": BLOCK.fields()[1:]}, r"block must be \(c_hidden, c_out, kernel, .*, residual\), got 11 values"),
        ({"block": BLOCK._replace(padding=(-1, 1, 1, 1))}, "padding must not be negative"),
        ({"block": BLOCK._replace(padding=(0, 0, 0, 0), dilation=9)}, "the depthwise kernel must fit"),
        ({"bounds": [0.0, 6.0]}, r"bounds must be \(lo, hi, lo of the output, hi of the output\), got 2 values"),
        ({"bounds": [7.0, 6.0, 0.0, 6.0]}, "activation bounds must satisfy lo <= hi"),
        ({"bounds": [0.0, 6.0, 7.0, 6.0]}, "activation bounds must satisfy lo <= hi"),
        ({"bounds": [0.0, float("nan"), 0.0, 6.0]}, "activation bounds must satisfy lo <= hi"),
    ],
)
def test_errors_name_operator_argument_and_rule(change, message):
    def fields(block):
        return block.fields() if isinstance(block, BlockShape) else block

    arguments = {
        "x": torch.randn(2, 16, 9, 9).contiguous(memory_format=torch.channels_last),
        "packed": ops.pack_block(*block_weights(16, 96, 16)).data,
        "block": BLOCK,
        "bounds": [0.0, 6.0, *NO_BOUNDS],
    }
    changed = {**arguments, **change}
    arguments["block"], changed["block"] = fields(arguments["block"]), fields(changed["block"])
    torch.ops.mnv2_fused.inverted_residual(**arguments)
    with pytest.raises(ValueError, match=rf"mnv2_fused::inverted_residual: {message}"):
        torch.ops.mnv2_fused.inverted_residual(**changed)


@pytest.mark.parametrize("left", [0, 100])
@pytest.mark.parametrize("argument", ["x", "packed"])
def test_memory_that_is_not_there_is_not_read(argument, left):
    x = torch.randn(2, 16, 9, 9).contiguous(memory_format=torch.channels_last)
    given = {"x": x, "packed": ops.pack_block(*block_weights(16, 96, 16)).data.clone()}
    given[argument].untyped_storage().resize_(left)
    with pytest.raises(RuntimeError, match=rf"inverted_residual: {argument} must have memory for all its elements"):
        torch.ops.mnv2_fused.inverted_residual(**given, block=BLOCK.fields(), bounds=[0.0, 6.0, *NO_BOUNDS])


@pytest.mark.parametrize("index", range(6))
def test_weights_that_are_not_there_are_not_packed(index):
    weights = [t.clone() for t in block_weights(16, 96, 16)]
    weights[index].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"mnv2_fused::pack_block: \w+ must have memory for all its elements"):
        torch.ops.mnv2_fused.pack_block(*weights, torch.float32)


def test_fields_have_one_order():
    """The Python twin follows the order of csrc/shapes.h."""

    def named(names, shape):
        return dict(zip(names, shape.fields(), strict=True))

    block = BlockShape(1, 2, 3, 5, 7, 11, (13, 17, 19, 23), True, False)
    window = {"kernel": 5, "stride": 7, "same": 0, "top": 13, "left": 17, "bottom": 19, "right": 23}
    expected = {"c_hidden": 2, "c_out": 3, "dilation": 11, **window, "has_expand": 1, "residual": 0}
    assert named(_C.BLOCK_FIELDS, block) == expected
    assert named(_C.BLOCK_FIELDS, block._replace(padding=None, has_expand=False, residual=True)) == {
        **expected, "same": 1, "top": 0, "left": 0, "bottom": 0, "right": 0, "has_expand": 0, "residual": 1
    }  # fmt: skip
    dense = DenseShape(1, 3, 5, 7, (13, 17, 19, 23))
    assert named(_C.DENSE_FIELDS, dense) == {"c_out": 3, **window}
    assert named(_C.HEAD_FIELDS, HeadShape(1, 2, 3)) == {"c_last": 2, "classes": 3}
    for shape in (block, block._replace(padding=None), dense, dense._replace(padding=None)):
        assert type(shape).of(1, shape.fields()) == shape


@pytest.mark.parametrize(("kernel", "stride", "dilation"), [(3, 1, 1), (3, 2, 1), (3, 2, 2), (5, 3, 1), (7, 2, 1)])
def test_same_padding_is_resolved_alike_on_both_sides(kernel, stride, dilation):
    for h, w in ((9, 12), (10, 7), (1, 1), (23, 4)):
        shape = BlockShape(8, 16, 8, kernel, stride, dilation, None, True, False)
        plans = [_C.cpu_plan((1, h, w, 8), s.fields(), 1) for s in (shape, shape.resolved(h, w))]
        assert plans[0] == plans[1] and (plans[0]["h_out"], plans[0]["w_out"]) == shape.size_out(h, w)


def test_plans_are_kept_by_what_they_are_made_for():
    """Calls with other sizes, threads and networks in between change nothing."""
    weights = block_weights(16, 96, 16)
    packed = ops.pack_block(*weights)
    images = [torch.randn(n, 16, h, w) for n in (1, 3) for h, w in ((9, 9), (14, 7), (40, 33))]
    first = {}
    for _ in range(2):
        for threads in (1, 3):
            with measure.threads(threads):
                for i, x in enumerate(images):
                    y = ops.run_block(x, packed, residual=True)
                    assert torch.equal(y, first.setdefault(i, y))


# -------------------------------------------------------------------------------------------- instruction sets

FORCED = "MNV2_FUSED_CPU_ISA"


@pytest.mark.skipif(FORCED in os.environ, reason=f"{FORCED} is set: this is one of the runs that the test starts")
@pytest.mark.parametrize("isa", _C.cpu_supported_isas()[:-1])
def test_everything_again_with_a_lower_instruction_set(isa):
    """The tests above use the best one. The others need a process of their own, because the choice is made once."""
    run = subprocess.run(
        [sys.executable, "-m", "pytest", __file__, "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist"],
        env={**os.environ, FORCED: isa},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-1000:]


@pytest.mark.skipif(FORCED not in os.environ, reason=f"{FORCED} is not set")
def test_the_forced_instruction_set_is_in_use():
    assert _C.cpu_isa() == os.environ[FORCED]


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_an_unknown_instruction_set_is_refused_before_any_kernel_runs(mode):
    first = f"import torch, mnv2_fused; mnv2_fused.MobileNetV2(5, 0.1).{mode}()(torch.zeros(2, 3, 32, 32))"
    run = subprocess.run(
        [sys.executable, "-c", first],
        env={**os.environ, FORCED: "mmx"},
        capture_output=True,
        text=True,
    )
    assert run.returncode != 0 and "MNV2_FUSED_CPU_ISA must be one of scalar" in run.stderr and "'mmx'" in run.stderr
