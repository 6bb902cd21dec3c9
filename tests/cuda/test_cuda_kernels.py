"""The CUDA kernels themselves, run on the host by tests/cuda_emulator, against the specification in float64."""

from __future__ import annotations

import itertools
import os
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import assert_close, to_tf32
from test_kernels import block_weights, cast, network_blocks
from torch import Tensor

from mnv2_fused import reference
from mnv2_fused._core.geometry import BlockShape, DenseShape, HeadShape, same_padding

TF32 = "tf32"
DTYPES = [torch.float32, torch.bfloat16, torch.float16, TF32]  # as kernels.cpp numbers them
SCHEDULES = range(12)
TILES = [2, 3, 4, 8, 12, 20]  # kColumnTiles
# Multiprocessors, shared memory of a thread block and of all.
H200, A100 = (132, 232448, 233472), (108, 166912, 167936)
CHANNELS_LAST = torch.channels_last
RELU6 = (0.0, 6.0)


class Planned(NamedTuple):
    tile_h: int
    tile_w: int
    images: int
    threads: int
    splits: int  # of the hidden channels
    parts: int  # of the output channels
    tiles: int  # of eight of them, in each part
    buffers: int  # places for the weights of a chunk of hidden channels
    shared: int  # bytes of a thread block


def storage(dtype: torch.dtype | str) -> torch.dtype:
    return torch.float32 if dtype == TF32 else dtype


def integers(values) -> Tensor:
    return torch.tensor([int(v) for v in values])


class Weights:
    """fp32 weights as an array of pointers."""

    def __init__(self, tensors: list[Tensor | None]) -> None:
        self.tensors = [None if t is None else t.float().contiguous() for t in tensors]
        self.pointers = torch.tensor([0 if t is None else t.data_ptr() for t in self.tensors])


def plain_tf32_block(x, w1, b1, w2, b2, w3, b3, *, stride, dilation, padding, residual, activation):
    """The block in float64 but for what tf32 rounds: the operands of both 1x1 convolutions."""
    y = x.double()
    if w1 is not None:
        y = F.conv2d(to_tf32(x).double(), to_tf32(w1).double(), b1.double()).clamp(*activation)
    top, left, bottom, right = padding
    y = F.conv2d(
        F.pad(y, (left, right, top, bottom)), w2.double(), b2.double(), stride, dilation=dilation, groups=w2.shape[0]
    )
    y = F.conv2d(to_tf32(y.clamp(*activation)).double(), to_tf32(w3).double(), b3.double())
    return (y + x.double() if residual else y).float()


def check_block(
    emulator,
    x: Tensor,
    weights: list[Tensor | None],
    dtype: torch.dtype | str = torch.float16,
    *,
    stride: int = 1,
    dilation: int = 1,
    padding: tuple[int, ...] | None = None,
    activation: tuple[float, float] = RELU6,
    device: tuple[int, ...] = H200,
    tile: tuple[int, ...] = (0, 0, 0, 0),
    schedules: tuple[int, ...] = (8,),
    before: int = 0,
) -> Planned:
    """Every schedule gives the same bits and is right. tile: height, width, images and splits of the hidden channels;
    zeros: what the plan finds best. before: images ahead of those of x that exist and are not worked on."""
    x, weights = x.to(storage(dtype)), cast(weights, storage(dtype))
    kernel, (c_out, c_hidden) = weights[2].shape[-1], weights[4].shape[:2]
    if padding is None:
        padding = ((kernel - 1) // 2 * dilation,) * 4
    keeps = padding[0] + padding[2] == padding[1] + padding[3] == (kernel - 1) * dilation
    residual = stride == 1 and keeps and x.shape[1] == c_out
    n, c_in, h, w = x.shape
    block = BlockShape(c_in, c_hidden, c_out, kernel, stride, dilation, padding, weights[0] is not None, residual)
    shape = (before + n, h, w, c_in, *block.fields())
    options = dict(stride=stride, dilation=dilation, padding=padding, residual=residual, activation=activation)
    exact = reference.inverted_residual(x.double(), *cast(weights, torch.float64), **options)
    given, pixels, planned = Weights(weights), x.contiguous(memory_format=CHANNELS_LAST), torch.zeros(9).long()
    results = []
    for schedule in schedules:
        y = torch.empty_like(exact, dtype=x.dtype, memory_format=CHANNELS_LAST)
        emulator(
            "emulate_block", schedule, before, integers(device), integers(tile), integers(shape), *activation,
            DTYPES.index(dtype), given.pointers, pixels, y, planned,
        )  # fmt: skip
        results.append(y)
    plain = (plain_tf32_block if dtype == TF32 else reference.inverted_residual)(x, *weights, **options)
    assert_close(results[0], plain, exact)
    for other in results[1:]:
        assert torch.equal(other.nan_to_num(), results[0].nan_to_num())
    return Planned(*planned.tolist())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", network_blocks(), ids=str)
def test_blocks_of_the_network(cuda_emulator, shape, dtype):
    h, c_in, c_hidden, c_out, stride, has_expand = shape
    check_block(
        cuda_emulator,
        torch.randn(1, c_in, min(h, 7), min(h, 8)),
        block_weights(c_in, c_hidden, c_out, expand=has_expand),
        dtype,
        stride=stride,
        device=(H200, A100)[hash(shape) % 2],
        schedules=(hash(shape) % 12,),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("c_in", "c_hidden"), [(960, 32), (16, 960)], ids=["expansion", "projection"])
def test_long_sums_of_one_sign(cuda_emulator, c_in, c_hidden, dtype):
    """The bits that tensor cores cut off all err the same way."""
    weights = [None if w is None else w.abs() for w in block_weights(c_in, c_hidden, 24)]
    check_block(cuda_emulator, torch.rand(1, c_in, 4, 4), weights, dtype, activation=(0.0, float("inf")))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"stride": 2}, {"dilation": 2}], ids=["stride 1", "stride 2", "any"])
@pytest.mark.parametrize("tiles", TILES)
def test_every_variant(cuda_emulator, tiles, options, dtype):
    """With and without 16-byte copies, and a tile at every edge and corner of the image."""
    for c_in, c_out, schedule in ((8, 8 * tiles, 1), (9, 8 * tiles - 5, 10)):
        planned = check_block(
            cuda_emulator,
            torch.randn(1, c_in, 9, 7),
            block_weights(c_in, 40, c_out),
            dtype,
            tile=(4, 3, 1, 1),
            schedules=(schedule,),
            **options,
        )
        assert planned.tiles == tiles and planned.parts == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("c_out", "parts"), [(161, 2), (320, 2), (448, 3)])
def test_parts_of_the_output(cuda_emulator, c_out, parts, dtype):
    for splits in (1, 2):
        weights = block_weights(8, 64, c_out)
        planned = check_block(cuda_emulator, torch.randn(1, 8, 3, 5), weights, dtype, tile=(3, 3, 1, splits))
        assert planned.parts == parts
    check_block(cuda_emulator, torch.randn(1, c_out, 2, 3), block_weights(c_out, c_out, c_out, expand=False), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("splits", [2, 3, 4, 5, 8])
def test_split_hidden_channels(cuda_emulator, splits, dtype):
    """Also shares of unequal size."""
    for c_hidden, expand in ((32 * splits, True), (32 * splits + 40, True), (32 * splits + 8, False)):
        x, weights = torch.randn(1, 16 if expand else c_hidden, 5, 4), block_weights(16, c_hidden, 16)
        weights = weights if expand else block_weights(c_hidden, c_hidden, 24, expand=False)
        check_block(cuda_emulator, x, weights, dtype, tile=(3, 4, 1, splits), schedules=(splits, 11 - splits))


def test_hidden_channels_are_split_if_there_are_few_tiles(cuda_emulator):
    splits = {
        check_block(cuda_emulator, torch.randn(1, 16, 7, 7), block_weights(16, c_hidden, 24), device=device).splits
        for c_hidden in (512, 960)
        for device in (H200, A100)
    }
    assert max(splits) > 4


def small_device(shared_kib: int) -> tuple[int, ...]:
    """With so much shared memory for a thread block."""
    return (1, shared_kib << 10, (shared_kib + 1) << 10)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("c_in", "expand"), [(40, True), (33, True), (136, False)])
def test_one_place_for_weights(cuda_emulator, c_in, expand, dtype):
    """If two do not fit: from the second of three chunks on, each waits until the one before it is done."""
    weights = block_weights(c_in, 136 if expand else c_in, 40, expand=expand)
    x = torch.randn(1, c_in, 4, 5)
    tile = (2, 4, 1, 1)
    two = check_block(cuda_emulator, x, weights, dtype, tile=tile)
    less = (1, two.shared - 16, two.shared + 1008)
    one = check_block(cuda_emulator, x, weights, dtype, tile=tile, device=less, schedules=SCHEDULES)
    assert (two.buffers, one.buffers) == (2, 1) and one.shared < two.shared


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_block_without_room_for_its_least_tile_is_refused(cuda_emulator, dtype):
    x, weights = torch.randn(1, 64, 3, 3), block_weights(64, 128, 24)
    with pytest.raises(RuntimeError, match=r"it needs \d+ bytes of shared memory, and a thread block can have 8192"):
        check_block(cuda_emulator, x, weights, dtype, device=small_device(8))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "images"), [(3, 2), (5, 4), (2, 3), (17, 8)])
def test_images_of_a_thread_block(cuda_emulator, n, images, dtype):
    """The last thread block has fewer."""
    for expand, c_out in ((True, 8), (True, 9), (False, 8)):
        weights = block_weights(8, 40 if expand else 8, c_out, expand=expand)
        check_block(cuda_emulator, torch.randn(n, 8, 3, 4), weights, dtype, tile=(3, 4, images, 1), schedules=(n % 12,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("channels", [*range(1, 10), 15, 16, 17, 31, 33])
def test_odd_channels(cuda_emulator, channels, dtype):
    x = torch.randn(2, channels, 5, 6)
    check_block(cuda_emulator, x, block_weights(channels, 20, channels), dtype)
    check_block(cuda_emulator, x, block_weights(channels, channels, channels, expand=False), dtype)
    check_block(cuda_emulator, x, block_weights(channels, 20, 33), dtype, stride=2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("c_hidden", [1, 8, 31, 32, 33, 63, 64, 65, 97])
def test_hidden_channels_around_a_chunk(cuda_emulator, c_hidden, dtype):
    check_block(cuda_emulator, torch.randn(1, 8, 6, 5), block_weights(8, c_hidden, 12), dtype)
    weights = block_weights(c_hidden, c_hidden, 12, expand=False)
    check_block(cuda_emulator, torch.randn(1, c_hidden, 6, 5), weights, dtype, tile=(3, 5, 1, 1), schedules=(4,))


@pytest.mark.parametrize(("kernel", "stride", "dilation"), list(itertools.product([1, 3, 5, 7], [1, 2, 3], [1, 2, 4])))
def test_kernel_stride_dilation(cuda_emulator, kernel, stride, dilation):
    x, weights = torch.randn(1, 10, 13, 11), block_weights(10, 40, 10, kernel)
    for dtype in (torch.float16, DTYPES[(kernel + stride + dilation) % 4]):
        check_block(cuda_emulator, x, weights, dtype, stride=stride, dilation=dilation, tile=(3, 4, 1, 1))


@pytest.mark.parametrize("expand", [True, False])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(
    "padding", [(0, 0, 0, 0), (0, 0, 1, 1), (1, 1, 0, 0), (0, 1, 2, 0), (2, 3, 1, 4), (5, 5, 5, 5)]
)
def test_padding(cuda_emulator, padding, stride, expand):
    for dtype, tile in zip(DTYPES, ((0, 0, 0, 0), (2, 3, 1, 1), (4, 2, 1, 1), (3, 5, 1, 1)), strict=True):
        x, weights = torch.randn(2, 24, 5, 6), block_weights(24, 24, 24, expand=expand)
        check_block(cuda_emulator, x, weights, dtype, stride=stride, padding=padding, tile=tile)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("size", "kernel", "dilation"),
    [((1, 1), 3, 1), ((1, 200), 3, 1), ((200, 1), 3, 1), ((2, 3), 5, 2), ((3, 3), 3, 4), ((1, 2), 7, 1)],
)
def test_sizes(cuda_emulator, size, kernel, dilation, dtype):
    """Also inputs that are smaller than the kernel."""
    x = torch.randn(2, 16, *size)
    for stride in (1, 2):
        weights = block_weights(16, 40, 16, kernel)
        check_block(cuda_emulator, x, weights, dtype, stride=stride, dilation=dilation)
    check_block(cuda_emulator, x, block_weights(16, 16, 16, kernel, expand=False), dtype, dilation=dilation)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "activation", [(0.0, 6.0), (0.0, float("inf")), (-1.0, 1.0), (0.5, 2.0), (-float("inf"), float("inf"))]
)
def test_activation_bounds(cuda_emulator, activation, dtype):
    for expand in (True, False):
        weights = block_weights(16, 40 if expand else 16, 16, expand=expand)
        check_block(cuda_emulator, torch.randn(1, 16, 6, 7), weights, dtype, activation=activation)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("expand", [True, False])
def test_nan_and_inf_go_through_as_in_pytorch(cuda_emulator, expand, value, dtype):
    x, weights = torch.randn(2, 20, 7, 6), block_weights(20, 50 if expand else 20, 20, expand=expand)
    x[1, 3, 4, 5] = value
    check_block(cuda_emulator, x, weights, dtype, tile=(4, 4, 1, 1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("layer", [0, 4], ids=["expansion", "projection"])
def test_nan_and_inf_in_weights_go_through_as_in_pytorch(cuda_emulator, layer, value, dtype):
    """Times numbers that tf32 holds, and times others, whose rests have either sign."""
    weights = block_weights(20, 40, 20)
    weights[layer][3, 5] = value
    for x in (torch.randn(1, 20, 5, 4), torch.randint(1, 4, (1, 20, 5, 4)).float()):
        check_block(cuda_emulator, x, weights, dtype, activation=(-float("inf"), float("inf")))
    head = [torch.randn(24, 20, 1, 1), torch.randn(24), torch.randn(5, 24), torch.randn(5)]
    head[layer // 2].view(-1, head[layer // 2].shape[1])[2, 3] = value
    check_head(cuda_emulator, 1, (2, 3), 20, 24, 5, dtype, weights=head)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize(("c_in", "expand"), [(16, True), (9, True), (80, False), (65, False)])
def test_every_schedule(cuda_emulator, c_in, expand, splits, dtype):
    """Every barrier and copy, over enough chunks to fill both places for weights twice."""
    weights = block_weights(c_in, 80 * splits if expand else c_in, 16, expand=expand)
    x = torch.randn(1, c_in, 6, 5)
    check_block(cuda_emulator, x, weights, dtype, tile=(6, 3, 1, splits), schedules=SCHEDULES)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(data=st.data())
def test_random_blocks(cuda_emulator, data):
    def draw(lo, hi):
        return data.draw(st.integers(lo, hi))

    kernel, dilation, stride = (
        data.draw(st.sampled_from([1, 3, 3, 5])),
        data.draw(st.sampled_from([1, 1, 2])),
        draw(1, 3),
    )
    reach = (kernel - 1) * dilation + 1
    h, w = draw(1, 12), draw(1, 12)
    top, left = draw(0, reach), draw(0, reach)
    padding = (top, left, max(0, reach - h - top) + draw(0, 2), max(0, reach - w - left) + draw(0, 2))
    expand = data.draw(st.booleans())
    c_in = draw(4, 40)
    c_hidden = draw(4, 100) if expand else c_in
    n = draw(1, 3)
    tile = (0, 0, 0, 0)
    if data.draw(st.booleans()):
        tile = (draw(1, 5), draw(1, 5), 1, draw(1, -(-c_hidden // 32)))
    torch.manual_seed(draw(0, 1 << 30))
    check_block(
        cuda_emulator,
        torch.randn(n, c_in, h, w),
        block_weights(c_in, c_hidden, draw(8, 200), kernel, expand),
        data.draw(st.sampled_from(DTYPES)),
        stride=stride,
        dilation=dilation,
        padding=padding,
        tile=tile,
        device=data.draw(st.sampled_from([H200, A100])),
        schedules=(draw(0, 11),),
    )


# ------------------------------------------------------------------------------------------------------ the two ends


def image(n: int, c: int, h: int, w: int, layout: str) -> Tensor:
    if layout == "view":  # every second column and some of the channels of a larger one
        x = torch.randn(n, c + 2, h + 1, 2 * w + 3)[:, 1 : c + 1, 1:, 2 : 2 * w + 2 : 2]
    else:
        x = torch.randn(n, c, h, w).contiguous(
            memory_format=CHANNELS_LAST if layout == "NHWC" else torch.contiguous_format
        )
    assert x.shape == (n, c, h, w)
    return x


def plain_tf32_stem(x, weight, bias, *, stride, padding, activation):
    exact = reference.dense(
        to_tf32(x).double(), to_tf32(weight).double(), bias.double(), stride=stride, padding=padding,
        activation=activation,
    )  # fmt: skip
    return exact.float()


def stem_shape(x: Tensor, weight: Tensor, stride: int, padding: tuple[int, ...], before: int = 0) -> Tensor:
    n, c_in, h, w = x.shape
    dense = DenseShape(c_in, weight.shape[0], weight.shape[-1], stride, padding)
    return integers((before + n, h, w, c_in, *dense.fields()))


def check_stem(
    emulator,
    x: Tensor,
    c_out: int,
    dtype: torch.dtype | str,
    *,
    kernel: int = 3,
    stride: int = 2,
    padding: tuple[int, ...] = (1, 1, 1, 1),
    activation: tuple[float, float] = RELU6,
    device: tuple[int, ...] = H200,
    schedules: tuple[int, ...] = (8,),
    before: int = 0,
) -> None:
    x = x.to(storage(dtype))
    weights = cast([torch.randn(c_out, x.shape[1], kernel, kernel), torch.randn(c_out)], x.dtype)
    options = dict(stride=stride, padding=padding, activation=activation)
    exact, given = (
        reference.dense(x.double(), *cast(weights, torch.float64), **options),
        Weights([*weights, *[None] * 4]),
    )
    for schedule in schedules:
        y = torch.empty_like(exact, dtype=x.dtype, memory_format=CHANNELS_LAST)
        emulator(
            "emulate_stem", schedule, before, integers(device), stem_shape(x, weights[0], stride, padding, before),
            *activation,
            DTYPES.index(dtype), given.pointers, x, integers(x.stride()), y,
        )  # fmt: skip
        assert_close(y, (plain_tf32_stem if dtype == TF32 else reference.dense)(x, *weights, **options), exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["NCHW", "NHWC", "view"])
@pytest.mark.parametrize(("c_out", "size"), [(16, (15, 18)), (5, (9, 7)), (33, (2, 3)), (48, (16, 33))])
def test_stem(cuda_emulator, c_out, size, layout, dtype):
    for padding in ((1, 1, 1, 1), (0, 0, 1, 1), (2, 3, 4, 1)):
        check_stem(cuda_emulator, image(2, 3, *size, layout), c_out, dtype, padding=padding)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "width"), [(1, 1), (1, 127), (1, 128), (2, 129), (3, 43), (17, 15), (33, 4)])
def test_pixels_around_a_tile_of_the_stem(cuda_emulator, n, width, dtype):
    """Every thread block's pixels are those of one image."""
    check_stem(cuda_emulator, image(n, 2, 1, width, "NCHW"), 8, dtype, stride=1, schedules=(n % 12,))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("kernel", "stride", "c_in"), [(1, 1, 1), (3, 1, 4), (5, 2, 2), (3, 3, 3), (7, 2, 3), (1, 2, 17)]
)
def test_stem_of_other_kinds(cuda_emulator, kernel, stride, c_in, dtype):
    check_stem(
        cuda_emulator,
        image(1, c_in, 10, 11, "NCHW"),
        12,
        dtype,
        kernel=kernel,
        stride=stride,
        padding=(kernel // 2,) * 4,
        activation=(-1.0, 1.0),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shared_kib", [8, 16, 40])
def test_a_stem_whose_windows_come_in_shares(cuda_emulator, shared_kib, dtype):
    """Of a group of values, of several, and of unequal numbers of them."""
    for c_in, kernel in ((5, 5), (13, 3)):
        x = image(1, c_in, 9, 8, "NHWC")
        device = small_device(shared_kib)
        check_stem(cuda_emulator, x, 40, dtype, kernel=kernel, padding=(1,) * 4, device=device, schedules=(1, 4, 8))


def test_every_schedule_of_the_stem(cuda_emulator):
    for dtype in (torch.float32, torch.float16):
        check_stem(cuda_emulator, image(2, 3, 13, 11, "NCHW"), 40, dtype, schedules=SCHEDULES)


def check_joined(
    emulator,
    x: Tensor,
    c_hidden: int,
    c_out: int,
    dtype: torch.dtype | str,
    *,
    stride: int = 1,
    bounds: tuple[float, float] = RELU6,
    tile: tuple[int, ...] = (0, 0, 0, 0),
    device: tuple[int, ...] = H200,
    schedules: tuple[int, ...] = (8,),
    before: int = 0,
) -> None:
    """A stem of stride 2 and a block without expansion, whose bounds are others than the stem's."""
    x, padding = x.to(storage(dtype)), (1, 1, 1, 1)
    stem = cast([torch.randn(c_hidden, x.shape[1], 3, 3), torch.randn(c_hidden)], x.dtype)
    block = cast(block_weights(c_hidden, c_hidden, c_out, expand=False), x.dtype)
    stem_options = dict(stride=2, padding=padding, activation=bounds)
    options = dict(stride=stride, dilation=1, padding=padding, residual=False, activation=RELU6)

    def both(run_stem, run_block, dtype):
        y = run_stem(x.to(dtype), *cast(stem, dtype), **stem_options)
        return run_block(y, *cast(block, dtype), **options), y

    exact, between = both(reference.dense, reference.inverted_residual, torch.float64)
    plain, _ = both(
        *((plain_tf32_stem, plain_tf32_block) if dtype == TF32 else (reference.dense, reference.inverted_residual)),
        x.dtype,
    )
    n, _, h, w = between.shape
    fields = BlockShape(c_hidden, c_hidden, c_out, 3, stride, 1, padding, False, False).fields()
    shape = integers((before + n, h, w, c_hidden, *fields))
    given = Weights([*stem, *block[2:]])
    for schedule in schedules:
        y = torch.empty_like(exact, dtype=x.dtype, memory_format=CHANNELS_LAST)
        emulator(
            "emulate_joined", schedule, before, integers(device), integers(tile),
            stem_shape(x, stem[0], 2, padding, before), shape, *bounds, *RELU6, DTYPES.index(dtype), given.pointers, x,
            integers(x.stride()), y,
        )  # fmt: skip
        assert_close(y, plain, exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["NCHW", "NHWC", "view"])
@pytest.mark.parametrize(("n", "size"), [(1, (1, 1)), (2, (2, 3)), (3, (15, 16)), (1, (24, 21))])
def test_joined(cuda_emulator, n, size, layout, dtype):
    check_joined(cuda_emulator, image(n, 3, *size, layout), 32, 16, dtype)
    check_joined(cuda_emulator, image(n, 3, *size, layout), 48, 24, dtype, stride=2, bounds=(-1.0, 2.0), device=A100)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("c_in", "c_hidden", "c_out"), [(1, 1, 1), (3, 17, 9), (4, 33, 31), (2, 40, 161)])
def test_joined_odd_channels(cuda_emulator, c_in, c_hidden, c_out, dtype):
    check_joined(cuda_emulator, image(1, c_in, 13, 12, "NCHW"), c_hidden, c_out, dtype, tile=(4, 3, 1, 1))


@pytest.mark.parametrize(("n", "tile"), [(3, (4, 3, 2, 1)), (17, (4, 3, 4, 1)), (2, (3, 2, 1, 2)), (33, (4, 3, 1, 1))])
def test_joined_tiles(cuda_emulator, n, tile):
    for dtype in DTYPES:
        check_joined(cuda_emulator, image(n, 3, 8, 6, "NCHW"), 64, 16, dtype, tile=tile, schedules=(n % 12,))


def test_every_schedule_of_joined(cuda_emulator):
    for dtype in (torch.float32, torch.float16):
        check_joined(cuda_emulator, image(1, 3, 11, 9, "NCHW"), 80, 16, dtype, tile=(3, 5, 1, 1), schedules=SCHEDULES)


def plain_tf32_head(x, w1, b1, w2, b2, *, activation):
    y = F.conv2d(to_tf32(x).double(), to_tf32(w1).double(), b1.double()).clamp(*activation).mean((2, 3))
    return F.linear(to_tf32(y).double(), to_tf32(w2).double(), b2.double()).float()


def check_head(
    emulator,
    n: int,
    size: tuple[int, int],
    c_in: int,
    c_last: int,
    classes: int,
    dtype: torch.dtype | str,
    *,
    activation: tuple[float, float] = RELU6,
    device: tuple[int, ...] = H200,
    schedules: tuple[int, ...] = (8,),
    weights: list[Tensor] | None = None,
    before: int = 0,
) -> None:
    if weights is None:
        weights = [torch.randn(c_last, c_in, 1, 1) * 2 / c_in**0.5, torch.randn(c_last)]
        weights += [torch.randn(classes, c_last) / c_last**0.5, torch.randn(classes)]
    weights = cast(weights, storage(dtype))
    x = torch.randn(n, c_in, *size).to(storage(dtype), memory_format=CHANNELS_LAST)
    exact = reference.head(x.double(), *cast(weights, torch.float64), activation=activation)
    plain = (plain_tf32_head if dtype == TF32 else reference.head)(x, *weights, activation=activation)
    given = Weights([*weights[:2], None, None, *weights[2:]])
    shape = integers((before + n, *size, c_in, *HeadShape(c_in, c_last, classes).fields()))
    for schedule in schedules:
        y = torch.empty_like(plain)
        emulator(
            "emulate_head", schedule, before, integers(device), shape, *activation, DTYPES.index(dtype),
            given.pointers, x, y,
        )  # fmt: skip
        assert_close(y, plain, exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("n", "size", "c_in", "c_last", "classes"),
    [
        (1, (7, 7), 64, 129, 100), (2, (1, 1), 16, 40, 1), (16, (1, 3), 17, 49, 33), (17, (2, 2), 8, 128, 10),
        (33, (1, 2), 24, 127, 32), (2, (9, 7), 5, 31, 31), (1, (8, 8), 32, 33, 65), (2, (5, 13), 9, 1, 7),
        (1, (1, 150), 8, 64, 20),
    ],
)  # fmt: skip
def test_head(cuda_emulator, n, size, c_in, c_last, classes, dtype):
    check_head(cuda_emulator, n, size, c_in, c_last, classes, dtype, schedules=(n % 12,))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_images_of_a_thread_block_of_the_head(cuda_emulator, dtype):
    for n in (8, 33):
        check_head(cuda_emulator, n, (3, 3), 16, 72, 9, dtype, device=(1, *H200[1:]), activation=(-1.0, 1.0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shared_kib", [4, 12, 20])
def test_a_head_whose_pixels_come_in_shares(cuda_emulator, shared_kib, dtype):
    for c_in in (72, 103):
        check_head(cuda_emulator, 2, (9, 8), c_in, 136, 9, dtype, device=small_device(shared_kib), schedules=(1, 4, 8))


@pytest.mark.parametrize(
    ("unit", "launches"),
    [(0, [0]), (1, [0]), (2, [0, 1]), (3, [0, 1, 1, 1, 1]), (4, [0, 1, 1, 1])],
    ids=["block", "stem", "head", "network", "joined"],
)
def test_the_first_kernel_of_an_operator_waits_for_what_is_ahead(cuda_emulator, unit, launches):
    """The others begin earlier and read weights, which a kernel ahead of the first may have written."""
    dependent, count = torch.full((8,), -1), torch.zeros(1).long()
    cuda_emulator("emulate_launches", unit, dependent, count)
    assert dependent[: count.item()].tolist() == launches


def test_every_schedule_of_the_head(cuda_emulator):
    for dtype in (torch.float32, torch.float16):
        check_head(cuda_emulator, 9, (9, 8), 17, 200, 33, dtype, device=(1, *H200[1:]), schedules=SCHEDULES)


# Not bfloat16, in which PyTorch's own convolution with padding spreads NaN.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, TF32], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_stay_in_their_windows(cuda_emulator, value, dtype):
    """Also in channels that fill up a chunk, whose weights are 0."""
    x = image(2, 3, 9, 9, "NCHW")
    x[1, 2, 4, 4] = value
    check_stem(cuda_emulator, x, 20, dtype)
    check_joined(cuda_emulator, x, 20, 12, dtype)


# ---------------------------------------------------------------------------------------------------- whole networks


class Unit(NamedTuple):
    """A block; `expansion` 1: without an expansion."""

    expansion: int
    c_out: int
    stride: int = 1
    kernel: int = 3
    dilation: int = 1


class Network(NamedTuple):
    c_stem: int
    blocks: list[Unit]
    c_last: int
    classes: int
    stem_kernel: int = 3
    stem_stride: int = 2


NETWORKS = {
    "joined": Network(32, [Unit(1, 16), Unit(6, 24, 2), Unit(8, 24), Unit(8, 40, 2)], 160, 100),
    "joined, with a stride": Network(40, [Unit(1, 24, 2), Unit(4, 33)], 70, 129),
    "first block expands": Network(16, [Unit(3, 16), Unit(6, 24, 2), Unit(8, 24)], 130, 64),
    "first block has a shortcut": Network(24, [Unit(1, 24), Unit(4, 17, 2)], 65, 100),
    "other filters": Network(9, [Unit(1, 11, 1, 5), Unit(5, 20, 1, 3, 2), Unit(3, 20, 2, 5, 2)], 48, 80, 5, 1),
    "no blocks": Network(32, [], 96, 100),
}  # fmt: skip
ONE, SOME = ((n, *H200[1:]) for n in (1, 8))  # multiprocessors: hidden channels are split if there are some


def check_network(
    emulator,
    network: Network,
    x: Tensor,
    dtype: torch.dtype | str,
    *,
    same: bool = False,
    device: tuple[int, ...] = SOME,
    schedules: tuple[int, ...] = (8,),
) -> tuple[bool, int, int]:
    """Every schedule gives the same bits and is right. Returns whether the stem is one with the first block, and the
    least and the most splits of a block's hidden channels."""
    x = x.to(storage(dtype))

    def padding(size: tuple[int, int], kernel: int, stride: int, dilation: int = 1) -> tuple[int, ...]:
        return same_padding(*size, kernel, stride, dilation) if same else ((kernel - 1) // 2 * dilation,) * 4

    c, size, kernel, stride = network.c_stem, tuple(x.shape[2:]), network.stem_kernel, network.stem_stride
    bounds = [(0.0, 6.0), *((-0.5 - i, 4.0 + i) for i in range(len(network.blocks))), (0.0, 3.0)]
    stem = cast([torch.randn(c, x.shape[1], kernel, kernel) / 3, torch.randn(c)], x.dtype)
    stem_options = dict(stride=stride, padding=padding(size, kernel, stride), activation=bounds[0])
    lists = [DenseShape(x.shape[1], c, kernel, stride, None if same else stem_options["padding"]).fields()]
    size = reference.dense(x[:1], *stem, **stem_options).shape[2:]
    blocks, given, fields = [], list(stem), []
    for unit, activation in zip(network.blocks, bounds[1:], strict=False):
        pads = padding(size, unit.kernel, unit.stride, unit.dilation)
        options = dict(stride=unit.stride, dilation=unit.dilation, padding=pads, activation=activation)
        options["residual"] = unit.stride == 1 and c == unit.c_out
        weights = cast(block_weights(c, c * unit.expansion, unit.c_out, unit.kernel, unit.expansion > 1), x.dtype)
        weights[4] = weights[4] / 2
        shape = BlockShape(
            c, c * unit.expansion, unit.c_out, unit.kernel, unit.stride, unit.dilation, None if same else pads,
            unit.expansion > 1, options["residual"],
        )  # fmt: skip
        fields += shape.fields()
        blocks.append((weights, options))
        given += weights
        c, size = unit.c_out, tuple(-(-s // unit.stride) for s in size)
    head = [torch.randn(network.c_last, c, 1, 1) * 2 / c**0.5, torch.randn(network.c_last)]
    head += [torch.randn(network.classes, network.c_last) / network.c_last**0.5, torch.randn(network.classes)]
    head = cast(head, x.dtype)
    lists += [fields, HeadShape(c, network.c_last, network.classes).fields(), sum(bounds, ())]

    def run(run_stem, run_block, run_head, dtype):
        y = run_stem(x.to(dtype), *cast(stem, dtype), **stem_options)
        for weights, options in blocks:
            y = run_block(y, *cast(weights, dtype), **options)
        return run_head(y, *cast(head, dtype), activation=bounds[-1])

    plainly = reference.dense, reference.inverted_residual, reference.head
    exact = run(*plainly, torch.float64)
    plain = run(*((plain_tf32_stem, plain_tf32_block, plain_tf32_head) if dtype == TF32 else plainly), x.dtype)
    pointers, planned, results = Weights([*given, *head]), torch.zeros(3).long(), []
    for schedule in schedules:
        results.append(torch.empty_like(plain))
        emulator(
            "emulate_network", schedule, integers(device), integers(x.permute(0, 2, 3, 1).shape), integers(x.stride()),
            integers(itertools.chain(*lists[:3])), integers(map(len, lists)),
            torch.tensor(lists[3], dtype=torch.float64), DTYPES.index(dtype), pointers.pointers, x, results[-1],
            planned,
        )  # fmt: skip
    assert_close(results[0], plain, exact)
    for other in results[1:]:
        assert torch.equal(other, results[0])
    joined, least, most = planned.tolist()
    return bool(joined), least, most


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("same", [False, True], ids=["PyTorch", "TensorFlow"])
@pytest.mark.parametrize("name", NETWORKS)
def test_network(cuda_emulator, name, same, dtype):
    layouts, i = ["NCHW", "NHWC", "view"], same + DTYPES.index(dtype)
    for device, n in ((SOME, 1), (ONE, 3)):
        x = image(n, 3, 14, 13, layouts[(i + n) % 3])
        joined, _, most = check_network(
            cuda_emulator, NETWORKS[name], x, dtype, same=same, device=device, schedules=((i + 3 * n) % 12,)
        )
        assert joined == ("joined" in name or name == "other filters")
        assert most <= 1 if device == ONE else most > 1 or name not in ("joined", "first block expands")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["NCHW", "NHWC", "view"])
def test_layouts_of_a_network(cuda_emulator, layout, dtype):
    for name in ("joined", "first block expands"):
        check_network(cuda_emulator, NETWORKS[name], image(2, 3, 9, 11, layout), dtype, same=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_every_schedule_of_a_network(cuda_emulator, dtype):
    """Blocks whose hidden channels are split, and some that are not; several tiles of an image, and several images."""
    for name in ("joined", "first block expands"):
        x = image(2, 3, 15, 12, "NHWC")
        _, least, most = check_network(cuda_emulator, NETWORKS[name], x, dtype, schedules=SCHEDULES)
        assert least == 1 and most > 1


# ------------------------------------------------------------------------------------- more than 2^31 values in a map

SPARSE = pytest.mark.skipif(
    bool(os.environ.get("MNV2_FUSED_SANITIZE")), reason="the sanitizer keeps a note of every byte, also of those unused"
)


def images_before(values: int) -> int:
    """Images of so many values that hold more than 2^31 together, rounded up to a multiple of sixteen."""
    return ((1 << 31) // values // 16 + 1) * 16


@SPARSE
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("c_in", "c_hidden", "c_out", "splits"), [(32, 64, 32, 1), (32, 64, 32, 2), (31, 40, 7, 1), (40, 40, 40, 1)]
)
def test_a_block_beyond_32_bits(cuda_emulator, c_in, c_hidden, c_out, splits, dtype):
    """Runs only the last of so many images; even the smaller of both maps has more values than 32 bits count."""
    before = images_before(9 * 8 * min(c_in, c_out))
    weights = block_weights(c_in, c_hidden, c_out, expand=c_in != c_hidden)
    for tile in ((3, 4, 1, splits), (0, 0, 0, 0)):
        check_block(cuda_emulator, torch.randn(2, c_in, 9, 8), weights, dtype, tile=tile, before=before)


@SPARSE
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_stems_beyond_32_bits(cuda_emulator, layout, dtype):
    x, before = image(2, 3, 30, 31, layout), images_before(3 * 30 * 31)
    check_stem(cuda_emulator, x, 12, dtype, before=before)
    check_joined(cuda_emulator, x, 24, 12, dtype, tile=(5, 5, 1, 1), before=before)


@SPARSE
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_head_beyond_32_bits(cuda_emulator, dtype):
    check_head(cuda_emulator, 2, (3, 5), 17, 40, 33, dtype, before=images_before(33))
