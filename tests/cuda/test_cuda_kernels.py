"""The CUDA kernels themselves, run on the host by tests/cuda_emulator, against the specification in float64."""

from __future__ import annotations

import itertools
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
from mnv2_fused._core.geometry import NO_BOUNDS, BlockShape

TF32 = "tf32"
DTYPES = [torch.float32, torch.bfloat16, torch.float16, TF32]  # as kernels.cpp numbers them
SCHEDULES = range(12)
TILES = [2, 3, 4, 8, 12, 20]  # kColumnTiles
# Multiprocessors, shared memory of a thread block and of all, most thread blocks of a cluster. Splits of hidden
# channels add up in a cluster if there are any, otherwise in memory.
H200, A100 = (132, 232448, 233472, 8), (108, 166912, 167936, 1)
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
    ahead: int  # whether a chunk is expanded while the one before is filtered
    rounds: int  # of images, one after the other


def storage(dtype: torch.dtype | str) -> torch.dtype:
    return torch.float32 if dtype == TF32 else dtype


def integers(values) -> Tensor:
    return torch.tensor([int(v) for v in values])


def tile_list(tile: tuple[int, ...]) -> Tensor:
    """Height, width, images, splits and, if they are given, whether to expand ahead, and rounds."""
    return integers((*tile, 0, 0)[:6])


class Weights:
    """fp32 weights as an array of pointers."""

    def __init__(self, tensors: list[Tensor | None]) -> None:
        self.tensors = [None if t is None else t.float().contiguous() for t in tensors]
        self.pointers = torch.tensor([0 if t is None else t.data_ptr() for t in self.tensors])


def floats(values) -> Tensor:
    return torch.tensor(list(values), dtype=torch.float32)


def plain_tf32_block(
    x, w1, b1, w2, b2, w3, b3, *, stride, dilation, padding, residual, activation, project_activation=NO_BOUNDS
):
    """The block in float64 but for what tf32 rounds: the operands of both 1x1 convolutions."""
    y = x.double()
    if w1 is not None:
        y = F.conv2d(to_tf32(x).double(), to_tf32(w1).double(), b1.double()).clamp(*activation)
    top, left, bottom, right = padding
    y = F.conv2d(
        F.pad(y, (left, right, top, bottom)), w2.double(), b2.double(), stride, dilation=dilation, groups=w2.shape[0]
    )
    y = F.conv2d(to_tf32(y.clamp(*activation)).double(), to_tf32(w3).double(), b3.double()).clamp(*project_activation)
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
    output: tuple[float, float] = NO_BOUNDS,
    residual: bool | None = None,
    device: tuple[int, ...] = H200,
    same_on: tuple[int, ...] | None = None,
    tile: tuple[int, ...] = (0, 0, 0, 0),
    schedules: tuple[int, ...] = (8,),
    before: int = 0,
) -> Planned:
    """Every schedule gives the same bits and is right. output: bounds of the projection. residual: None adds x if
    that is possible. same_on: another device that gives the same bits by the same tile. tile: height, width,
    images, splits of the hidden channels, 1 if each chunk is to be expanded ahead, and rounds; zeros: what the plan
    finds best. before: images ahead of those of x that exist and are not worked on."""
    x, weights = x.to(storage(dtype)), cast(weights, storage(dtype))
    kernel, (c_out, c_hidden) = weights[2].shape[-1], weights[4].shape[:2]
    if padding is None:
        padding = ((kernel - 1) // 2 * dilation,) * 4
    keeps = padding[0] + padding[2] == padding[1] + padding[3] == (kernel - 1) * dilation
    if residual is None:
        residual = stride == 1 and keeps and x.shape[1] == c_out
    n, c_in, h, w = x.shape
    block = BlockShape(c_in, c_hidden, c_out, kernel, stride, dilation, padding, weights[0] is not None, residual)
    shape = (before + n, h, w, c_in, *block.fields())
    options = dict(stride=stride, dilation=dilation, padding=padding, residual=residual, activation=activation)
    options["project_activation"] = output
    exact = reference.inverted_residual(x.double(), *cast(weights, torch.float64), **options)
    given, pixels, planned = Weights(weights), x.contiguous(memory_format=CHANNELS_LAST), torch.zeros(11).long()
    results = []
    for gpu, schedule in itertools.product(filter(None, (same_on, device)), schedules):
        y = torch.empty_like(exact, dtype=x.dtype, memory_format=CHANNELS_LAST)
        emulator(
            "emulate_block", schedule, before, integers(gpu), tile_list(tile), integers(shape),
            floats((*activation, *output)), DTYPES.index(dtype), given.pointers, pixels, y, planned,
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
            tile=(4, 3, 1, 1, c_in == 9),
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
    weights = block_weights(c_out, c_out, c_out, expand=False)
    check_block(cuda_emulator, torch.randn(1, c_out, 2, 3), weights, dtype, tile=(2, 2, 1, 1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("splits", range(2, 9))
def test_split_hidden_channels(cuda_emulator, splits, dtype):
    """Also shares of unequal size. In a cluster and in memory they are added in the same order."""
    for c_hidden, expand in ((32 * splits, True), (32 * splits + 40, True), (32 * splits + 8, False)):
        x, weights = torch.randn(1, 16 if expand else c_hidden, 5, 4), block_weights(16, c_hidden, 16)
        weights = weights if expand else block_weights(c_hidden, c_hidden, 24, expand=False)
        options = dict(tile=(3, 4, 1, splits), schedules=(splits, 11 - splits))
        planned = check_block(cuda_emulator, x, weights, dtype, same_on=A100, **options)
        assert planned.splits == splits


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tiles", TILES)
def test_every_variant_adds_up_splits(cuda_emulator, tiles, dtype):
    """More splits than a thread block has warps, whose shares are warps: some have none."""
    x, weights = torch.randn(1, 8, 5, 4), block_weights(8, 200, 8 * tiles)
    check_block(cuda_emulator, x, weights, dtype, same_on=A100, tile=(5, 4, 1, 6), schedules=(tiles % 12,))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_more_splits_than_a_cluster_has_thread_blocks(cuda_emulator, dtype):
    x, weights = torch.randn(1, 16, 5, 4), block_weights(16, 32 * 9, 16)
    for splits, cluster in ((9, 8), (5, 4), (2, 1)):
        device, tile = (*H200[:3], cluster), (3, 4, 1, splits)
        if cluster > 1:
            with pytest.raises(RuntimeError, match="the tile does not fit"):
                check_block(cuda_emulator, x, weights, dtype, device=device, tile=tile)
            assert check_block(cuda_emulator, x, weights, dtype, device=device).splits <= cluster
        assert check_block(cuda_emulator, x, weights, dtype, device=A100, tile=tile).splits == splits


def test_hidden_channels_are_split_if_there_are_few_tiles(cuda_emulator):
    splits = {
        check_block(cuda_emulator, torch.randn(1, 16, 7, 7), block_weights(16, c_hidden, 24), device=device).splits
        for c_hidden in (512, 960)
        for device in (H200, A100)
    }
    assert max(splits) > 4


def small_device(shared_kib: int) -> tuple[int, ...]:
    """With so much shared memory for a thread block."""
    return (1, shared_kib << 10, (shared_kib + 1) << 10, 1)


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
@pytest.mark.parametrize("tiles", TILES)
def test_rounds_of_images(cuda_emulator, tiles, dtype):
    """One, two and three chunks, with and without those that are expanded ahead; the last thread block has fewer
    rounds."""
    several = not (tiles == 12 and storage(dtype) != torch.float32)
    for n, rounds, c_hidden, ahead in ((3, 2, 24, 0), (5, 3, 64, 0), (3, 3, 72, 0), (2, 2, 64, 1), (4, 2, 72, 1)):
        tile, c = (3, 4, 1, 1, ahead, rounds if several else 1), 8 * tiles - 1
        x, weights = torch.randn(n, c, 5, 6), block_weights(c, c_hidden, c)
        planned = check_block(cuda_emulator, x, weights, dtype, tile=tile, schedules=(n, 11))
        assert planned.rounds == tile[-1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stride", [1, 2])
def test_rounds_without_an_expansion(cuda_emulator, stride, dtype):
    for n, rounds, c_hidden in ((3, 2, 16), (4, 3, 72)):
        x, weights = torch.randn(n, c_hidden, 6, 5), block_weights(c_hidden, c_hidden, 16, expand=False)
        check_block(cuda_emulator, x, weights, dtype, stride=stride, tile=(2, 3, 1, 1, 0, rounds))


def test_rounds_are_chosen(cuda_emulator):
    """With many more tiles than thread blocks at once."""
    x, weights = torch.randn(16, 8, 24, 24), block_weights(8, 40, 8)
    assert check_block(cuda_emulator, x, weights, device=small_device(64)).rounds > 1
    assert check_block(cuda_emulator, x[:1], weights, device=H200).rounds == 1


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
    "activation",
    [(0.0, 6.0), (0.0, float("inf")), (0.0, 2.7), (-1.0, 1.0), (0.5, 2.0), (0.1, 0.3), (-float("inf"), float("inf"))],
)
def test_activation_bounds(cuda_emulator, activation, dtype):
    for expand in (True, False):
        weights = block_weights(16, 40 if expand else 16, 16, expand=expand)
        check_block(cuda_emulator, torch.randn(1, 16, 6, 7), weights, dtype, activation=activation)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize(("splits", "device"), [(1, H200), (3, H200), (3, A100)])
def test_output_bounds(cuda_emulator, splits, device, residual, dtype):
    """Of the whole sum, before the residual is added; of whole vectors of channels, and of single ones."""
    for c, expand in ((16, True), (13, True), (96, False)):
        x, weights = torch.randn(1, c, 6, 5), block_weights(c, 96, c, expand=expand)
        for output in (RELU6, (0.0, float("inf")), (-0.5, 0.25)):
            options = dict(output=output, residual=residual, tile=(3, 4, 1, splits), schedules=(splits, 11))
            check_block(cuda_emulator, x, weights, dtype, device=device, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tiles", TILES)
def test_output_bounds_of_every_variant(cuda_emulator, tiles, dtype):
    for c, stride in ((8 * tiles, 1), (8 * tiles - 3, 2)):
        x, weights = torch.randn(1, c, 5, 5), block_weights(c, 40, c)
        check_block(cuda_emulator, x, weights, dtype, stride=stride, output=RELU6, tile=(4, 3, 1, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_every_schedule_with_output_bounds(cuda_emulator, dtype):
    for splits, device in ((1, H200), (2, H200), (2, A100)):
        weights = block_weights(16, 80 * splits, 16)
        options = dict(output=(-1.0, 1.0), tile=(6, 3, 1, splits), schedules=SCHEDULES, device=device)
        check_block(cuda_emulator, torch.randn(1, 16, 6, 5), weights, dtype, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("output", [NO_BOUNDS, RELU6])
@pytest.mark.parametrize("expand", [True, False])
def test_nan_and_inf_go_through_as_in_pytorch(cuda_emulator, expand, output, value, dtype):
    x, weights = torch.randn(2, 20, 7, 6), block_weights(20, 50 if expand else 20, 20, expand=expand)
    x[1, 3, 4, 5] = value
    check_block(cuda_emulator, x, weights, dtype, tile=(4, 4, 1, 1), output=output)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("layer", [0, 4], ids=["expansion", "projection"])
def test_nan_and_inf_in_weights_go_through_as_in_pytorch(cuda_emulator, layer, value, dtype):
    """Times numbers that tf32 holds, and times others, whose rests have either sign."""
    weights = block_weights(20, 40, 20)
    weights[layer][3, 5] = value
    for x in (torch.randn(1, 20, 5, 4), torch.randint(1, 4, (1, 20, 5, 4)).float()):
        check_block(cuda_emulator, x, weights, dtype, activation=(-float("inf"), float("inf")))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("splits", "device"), [(1, H200), (2, H200), (2, A100)])
@pytest.mark.parametrize(("c_in", "expand"), [(16, True), (9, True), (80, False), (65, False)])
def test_every_schedule(cuda_emulator, c_in, expand, splits, device, dtype):
    """Every barrier and copy, over enough chunks to fill both places for weights twice."""
    weights = block_weights(c_in, 80 * splits if expand else c_in, 16, expand=expand)
    x = torch.randn(1, c_in, 6, 5)
    for ahead in (0, 1) if expand else (0,):
        tile = (6, 3, 1, splits, ahead)
        planned = check_block(cuda_emulator, x, weights, dtype, tile=tile, device=device, schedules=SCHEDULES)
        assert planned.ahead == ahead


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("chunks", [2, 3, 4, 5, 9])
def test_chunks_that_are_expanded_ahead(cuda_emulator, chunks, dtype):
    """Also of several images, and in shares of one and two chunks."""
    for c_hidden in (32 * chunks, 32 * chunks - 20):
        x, weights = torch.randn(3, 24, 4, 4), block_weights(24, c_hidden, 24)
        for tile in ((4, 4, 2, 1, 1), (3, 2, 1, chunks - 1, 1)):
            check_block(cuda_emulator, x, weights, dtype, tile=tile, schedules=(chunks, 11 - chunks))


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
    output = data.draw(st.sampled_from([NO_BOUNDS, RELU6]))
    check_block(
        cuda_emulator,
        torch.randn(n, c_in, h, w),
        block_weights(c_in, c_hidden, draw(8, 200), kernel, expand),
        data.draw(st.sampled_from(DTYPES)),
        stride=stride,
        dilation=dilation,
        padding=padding,
        output=output,
        tile=tile,
        device=data.draw(st.sampled_from([H200, A100])),
        schedules=(draw(0, 11),),
    )
