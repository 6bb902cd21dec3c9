"""The CUDA kernels of stem, joined stem and block, and head, on the host, against the specification in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_close, to_tf32
from test_cuda_kernels import (
    A100,
    CHANNELS_LAST,
    DTYPES,
    H200,
    RELU6,
    SCHEDULES,
    TF32,
    Weights,
    floats,
    integers,
    plain_tf32_block,
    small_device,
    storage,
    tile_list,
)
from test_kernels import block_weights, cast
from torch import Tensor

from mnv2_fused import reference
from mnv2_fused._core.geometry import NO_BOUNDS, BlockShape, DenseShape, HeadShape


def image(n: int, c: int, h: int, w: int, layout: str) -> Tensor:
    if layout == "view":  # every second column and some of the channels of a larger one
        x = torch.randn(n, c + 2, h + 1, 2 * w + 3)[:, 1 : c + 1, 1:, 2 : 2 * w + 2 : 2]
    else:
        x = torch.randn(n, c, h, w).contiguous(
            memory_format=CHANNELS_LAST if layout == "NHWC" else torch.contiguous_format
        )
    assert x.shape == (n, c, h, w)
    return x


def plain_tf32_stem(x, weight, bias, *, image_bias=None, **options):
    if image_bias is not None:
        options["image_bias"] = image_bias.double()
    return reference.dense(to_tf32(x).double(), to_tf32(weight).double(), bias.double(), **options).float()


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
    image_bias: bool = False,
    device: tuple[int, ...] = H200,
    schedules: tuple[int, ...] = (8,),
    before: int = 0,
) -> None:
    """image_bias: each image has biases of its own, in float32."""
    x = x.to(storage(dtype))
    weights = cast([torch.randn(c_out, x.shape[1], kernel, kernel), torch.randn(c_out)], x.dtype)
    options = dict(stride=stride, padding=padding, activation=activation)
    biases = torch.randn(x.shape[0], c_out) if image_bias else None
    exact, given = (
        reference.dense(
            x.double(),
            *cast(weights, torch.float64),
            **options,
            image_bias=biases.double() if image_bias else None,
        ),
        Weights([*weights, *[None] * 4]),
    )
    plain = (plain_tf32_stem if dtype == TF32 else reference.dense)(
        x, *weights, **options, image_bias=biases if dtype == TF32 or not image_bias else biases.to(x.dtype)
    )
    for schedule in schedules:
        y = torch.empty_like(exact, dtype=x.dtype, memory_format=CHANNELS_LAST)
        emulator(
            "emulate_stem", schedule, before, integers(device), stem_shape(x, weights[0], stride, padding, before),
            *activation,
            DTYPES.index(dtype), given.pointers, biases if image_bias else 0, x, integers(x.stride()), y,
        )  # fmt: skip
        assert_close(y, plain, exact)


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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("c_out", [1, 5, 8, 12, 31, 32, 33, 40, 71])
def test_biases_of_images(cuda_emulator, c_out, dtype):
    """Channels beyond the last one have no biases to be read, and several thread blocks share an image."""
    for n, size in ((3, (3, 5)), (2, (12, 13))):
        x, schedules = image(n, 24, *size, "NHWC"), (c_out % 12, 7)
        check_stem(
            cuda_emulator, x, c_out, dtype, kernel=1, stride=1, padding=(0,) * 4, image_bias=True, schedules=schedules
        )
    check_stem(cuda_emulator, image(2, 5, 9, 8, "view"), c_out, dtype, kernel=5, image_bias=True)


def test_biases_of_images_whose_windows_come_in_shares(cuda_emulator):
    for dtype in DTYPES:
        x = image(2, 13, 9, 8, "NHWC")
        check_stem(cuda_emulator, x, 40, dtype, image_bias=True, device=small_device(16), schedules=SCHEDULES)


def check_joined(
    emulator,
    x: Tensor,
    c_hidden: int,
    c_out: int,
    dtype: torch.dtype | str,
    *,
    stride: int = 1,
    bounds: tuple[float, float] = RELU6,
    output: tuple[float, float] = NO_BOUNDS,
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
    options["project_activation"] = output

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
            "emulate_joined", schedule, before, integers(device), tile_list(tile),
            stem_shape(x, stem[0], 2, padding, before), shape, *bounds, floats((*RELU6, *output)), DTYPES.index(dtype),
            given.pointers, x, integers(x.stride()), y,
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


@pytest.mark.parametrize(
    ("n", "tile"),
    [(3, (4, 3, 2, 1)), (17, (4, 3, 4, 1)), (2, (3, 2, 1, 2)), (33, (4, 3, 1, 1)), (5, (3, 2, 1, 1, 0, 3))],
)
def test_joined_tiles(cuda_emulator, n, tile):
    for dtype, output in zip(DTYPES, (NO_BOUNDS, RELU6, RELU6, (-1.0, 1.0)), strict=True):
        x, options = image(n, 3, 8, 6, "NCHW"), dict(tile=tile, output=output, schedules=(n % 12,))
        check_joined(cuda_emulator, x, 64, 16, dtype, **options)


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
    """With warps that work together, as on many multiprocessors, and each by itself; on the same numbers."""
    numbers = torch.get_rng_state()
    for device in (H200, (1, *H200[1:])):
        torch.set_rng_state(numbers)
        check_head(cuda_emulator, n, size, c_in, c_last, classes, dtype, device=device, schedules=(n % 12,))


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
        for n, device in ((9, (1, *H200[1:])), (2, H200)):
            check_head(cuda_emulator, n, (9, 8), 17, 200, 33, dtype, device=device, schedules=SCHEDULES)


# Not bfloat16, in which PyTorch's own convolution with padding spreads NaN.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, TF32], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_stay_in_their_windows(cuda_emulator, value, dtype):
    """Also in channels that fill up a chunk, whose weights are 0."""
    x = image(2, 3, 9, 9, "NCHW")
    x[1, 2, 4, 4] = value
    check_stem(cuda_emulator, x, 20, dtype)
    check_joined(cuda_emulator, x, 20, 12, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("layer", [0, 2], ids=["convolution", "classifier"])
def test_nan_and_inf_in_weights_of_the_head(cuda_emulator, layer, value, dtype):
    weights = [torch.randn(24, 20, 1, 1), torch.randn(24), torch.randn(5, 24), torch.randn(5)]
    weights[layer].view(-1, weights[layer].shape[1])[2, 3] = value
    check_head(cuda_emulator, 1, (2, 3), 20, 24, 5, dtype, weights=weights)
