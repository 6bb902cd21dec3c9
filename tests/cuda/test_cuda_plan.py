"""Properties of the plans of CUDA blocks, for every block. They need no GPU."""

from __future__ import annotations

import csv
import itertools
import math
import re
import statistics
import time

import cuda_plans
import pytest
import torch
from test_plan import block_shapes

from mnv2_fused import _C, MobileNetV2
from mnv2_fused._core.geometry import BlockShape, DenseShape, HeadShape
from mnv2_fused.cli.gpu_plan import GPUS, PARTS, gpu_plan
from mnv2_fused.tools.rates import network_spec, plan_arguments

WIDTHS = [0.35, 0.5, 0.75, 1.0, 1.3, 1.4]
RESOLUTIONS = [96, 128, 160, 192, 224, 256, 320, 513]
DTYPES = ["float32", "bfloat16", "float16"]
DEVICES = ["sm_80", "sm_86", "sm_90"]
ARITHMETIC = {"float16": ("float16", False), "bfloat16": ("bfloat16", False), "tf32": ("float32", False),
              "float32": ("float32", True)}  # fmt: skip
LAUNCH_PARTS = ("shared", "tensor", "issue")
BLOCK = dict(h=14, w=14, c_in=64, c_hidden=384, c_out=64, kernel=3, stride=1, dilation=1, padding=(1, 1, 1, 1),
             has_expand=True, residual=True)  # fmt: skip


def block_lists(n=1, **options):
    """x and block, as the operator takes them."""
    options = {**BLOCK, **options}
    h, w = options.pop("h"), options.pop("w")
    shape = BlockShape(**options)
    return (n, h, w, shape.c_in), shape.fields()


def plan(n=1, dtype="float16", device="sm_90", exact=False, **options):
    return _C.cuda_plan(*block_lists(n, **options), dtype, device, exact)


def limits_of(device):
    """Also the most thread blocks of a cluster."""
    return {**_C.cuda_device(device), "cluster": 8 if device == "sm_90" else 1}


def tiles_of(n, found):
    height, width, _ = found["output"]
    of_image = -(-height // found["tile_h"]) * -(-width // found["tile_w"])
    return of_image * -(-n // (found["images"] * found["rounds"]))


def network_plan(n, width=1.0, resolution=224, dtype="float16", device="sm_90", exact=False, **options):
    texts = network_spec(MobileNetV2(width_mult=width, **options).eval()).flat().arguments
    return _C.cuda_network_plan((n, resolution, resolution, 3), *texts, dtype, device, exact)


def check_block(n, found, dtype, limits):
    """A block's launch is consistent, and shared memory and registers are enough for it."""
    assert found["fits"]
    at_once, threads = found["blocks_at_once"], found["threads"]
    # Shared memory of a device with clusters also comes with bulk copies, whose kernels take fewer registers.
    clusters, tiles_of_columns = limits["cluster"] > 1, found["column_tiles"]
    half, few = dtype == "float16", tiles_of_columns <= 8
    most = 256 if tiles_of_columns > 12 else 512 if half and (few or clusters) else 384
    if half and tiles_of_columns == 2:
        most = 640
    assert threads % 32 == 0 and 128 <= threads <= most
    assert at_once >= 1 and at_once * (found["shared_bytes"] + 1024) <= limits["shared_bytes"]
    # A multiprocessor has 65536 registers; launch bounds give a kernel as many as let `most` threads fit.
    assert at_once * threads <= most <= 1536  # threads of sm_86; others have 2048
    # A lane has 2 x 2 or, if registers are few, 1 x 2 output pixels, and four lanes share them.
    rows = 2 if dtype != "float32" and tiles_of_columns <= 4 else 1
    pixels = found["tile_h"] * found["tile_w"] * found["images"]
    assert pixels <= threads // 4 * 2 * rows
    assert found["column_parts"] * tiles_of_columns * 8 >= found["output"][2]
    assert 1 <= found["splits"] <= -(-found["hidden"] // 32)
    tiles, parts, splits = tiles_of(n, found), found["column_parts"], found["splits"]
    assert found["grid"] == [tiles, parts, splits] and found["blocks"] == tiles * parts * splits
    assert found["images"] * found["input"][0] * found["input"][1] < 1 << 31
    # The splits of a tile add up in shared memory if they can be a cluster, otherwise in memory.
    sums = 4 * rows * tiles_of_columns * 4 * threads
    if splits > 1 and clusters:
        assert splits <= limits["cluster"] and found["shared_bytes"] >= sums
    if splits > 1 and not clusters:
        assert found["partial_bytes"] == sums * found["blocks"] and found["tickets"] == tiles * parts
    else:
        assert found["partial_bytes"] == found["tickets"] == 0


def check_launch(launch, limits):
    assert launch["shared_bytes"] <= limits["shared_block_bytes"]
    x, y, z = launch["grid"]
    assert 1 <= x < 1 << 31 and 1 <= y <= 65535 and 1 <= z <= 65535
    assert 0 < min(launch[f"{part}_cycles"] for part in LAUNCH_PARTS) and launch["memory_bytes"] > 0
    assert max(launch[f"{part}_cycles"] for part in LAUNCH_PARTS) <= launch["cycles"]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("device", DEVICES)
def test_every_block_of_the_network(width, device):
    """Alone, as the modules run them: the first one without the stem."""
    limits, model = limits_of(device), MobileNetV2(width_mult=width)
    shapes = {tuple(s.items()) for resolution in RESOLUTIONS for s in block_shapes(model, resolution)}
    for shape in map(dict, shapes):
        for n in (1, 32, 256):
            for dtype in DTYPES:
                found = plan(n, **shape, dtype=dtype, device=device)
                check_block(n, found, dtype, limits)
                check_launch(found, limits)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("device", DEVICES)
def test_every_network(width, device):
    """All that runs, as it runs: stem and first block in one, pool and classifier."""
    limits, spec = limits_of(device), network_spec(MobileNetV2(width_mult=width).eval())
    texts, last = spec.flat().arguments, spec.steps[-1].spec.shape.c_last
    for resolution, n, (dtype, exact) in itertools.product(RESOLUTIONS, (1, 32, 256), ARITHMETIC.values()):
        found = _C.cuda_network_plan((n, resolution, resolution, 3), *texts, dtype, device, exact)
        assert found["fits"] and found["joined"]
        launches = found["launches"]
        assert [launch["name"] for launch in launches] == [f"block {i}" for i in range(1, 18)] + ["pool", "classify"]
        for launch in launches:
            check_launch(launch, limits)
        for block in launches[:17]:
            check_block(n, block, dtype, limits)
        first, second = launches[:2]
        assert first["input"] == [-(-resolution // 2)] * 2 + [27] and first["output"] == second["input"]
        element = 4 if dtype == "float32" else 2
        maps = [n * h * w * c * element for h, w, c in (launch["output"] for launch in launches[:17])]
        largest = max(maps[::2]) + max(maps[1::2])
        partial = max(block["partial_bytes"] for block in launches[:17])
        assert largest + partial <= found["memory_bytes"] <= largest + partial + n * 1920 * element + (1 << 20)
        pool, classify = launches[17:]
        wide = -(-last // 128)
        assert pool["grid"][1] in (wide, -(-last // 32)) and n <= pool["grid"][0] * 8
        assert pool["grid"][1] == wide or n * wide <= limits["multiprocessors"]
        assert classify["grid"] == [-(-n // 16), 32, 1]


def test_a_stem_that_is_not_joined():
    """The first block expands, so that the stem runs alone."""
    found = network_plan(32, inverted_residual_setting=[[6, 16, 1, 1], [6, 24, 2, 2]])
    assert not found["joined"]
    names = [launch["name"] for launch in found["launches"]]
    assert names == ["stem", "block 1", "block 2", "block 3", "pool", "classify"]
    for device, (dtype, exact) in itertools.product(DEVICES, ARITHMETIC.values()):
        for n, width in itertools.product((1, 256), WIDTHS):
            setting = [[6, 16, 1, 1]]
            found = network_plan(n, width, 513, dtype, device, exact, inverted_residual_setting=setting)
            stem = found["launches"][0]
            check_launch(stem, _C.cuda_device(device))
            tiles = 19 * 29  # of 257 x 257 pixels, at most 128 each
            assert stem["grid"][0] == n * tiles and stem["threads"] == 128


def test_few_images_are_pooled_by_more_thread_blocks():
    grids = {n: network_plan(n)["launches"][-2]["grid"] for n in (1, 13, 14)}
    assert grids == {1: [1, 40, 1], 13: [13, 40, 1], 14: [14, 10, 1]}


def unfit(device="sm_90", dtype="float16", n=1, **options):
    x, block = block_lists(n, **options)
    return _C.cuda_unfit("inverted_residual", x, block, dtype, _C.cuda_device(device)["shared_block_bytes"])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_networks_fit(width, dtype, device):
    """Also if dilation replaces strides, except float32 on the device with the least shared memory."""
    for output_stride in (32, 16, 8):
        with torch.device("meta"):
            model = MobileNetV2(width_mult=width, output_stride=output_stride)
        units, _ = network_spec(model.eval()).flat().arguments
        limit = _C.cuda_device(device)["shared_block_bytes"]
        for n, size in ((1, 224), (0, 224), (256, 96), (1, 513)):
            why = _C.cuda_unfit("network", (n, size, size, 3), units, dtype, limit)
            if output_stride == 8 and dtype == "float32" and device == "sm_86" and width > 0.5:
                assert re.fullmatch(r"block 1\d: it needs \d+ bytes of shared memory, and a thread block .*101376", why)
            else:
                assert why is None


@pytest.mark.parametrize("dtype", DTYPES)
def test_there_is_one_place_for_weights_only_if_two_do_not_fit(dtype):
    wide = {"c_in": 224, "c_hidden": 1344, "c_out": 224}
    assert plan(1, **wide, dtype=dtype, device="sm_90")["buffers"] == 2
    assert plan(32, **wide, dtype=dtype, device="sm_86")["buffers"] == (1 if dtype == "float32" else 2)
    assert plan(1, c_hidden=32, dtype=dtype)["buffers"] == 1


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_fits_has_a_plan_and_what_does_not_has_none(dtype, device):
    limit = _C.cuda_device(device)["shared_block_bytes"]
    for c_in, kernel, dilation in itertools.product((8, 100, 300, 500, 700, 1000, 2000), (1, 3, 7, 21), (1, 3, 9)):
        padding = (kernel // 2 * dilation,) * 4
        options = dict(c_in=c_in, c_hidden=1500, kernel=kernel, dilation=dilation, padding=padding, residual=False)
        why = unfit(dtype=dtype, device=device, **options)
        assert plan(dtype=dtype, device=device, **options)["fits"] == (why is None)
        assert why is None or int(re.search(r"\d+", why)[0]) > limit


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_few_tiles_are_split_until_many_multiprocessors_have_one(device, dtype):
    """At batch 1 and 7x7 there are few pixels, but many hidden channels. 32 thread blocks are quickest on an H200."""
    found = plan(1, **{**BLOCK, "h": 7, "w": 7, "c_in": 160, "c_hidden": 960, "c_out": 160}, dtype=dtype, device=device)
    assert found["splits"] > 1
    assert found["blocks"] >= _C.cuda_device(device)["multiprocessors"] / 3
    many = plan(4096, dtype=dtype, device=device)
    assert many["splits"] == 1 and many["partial_bytes"] == 0


def test_small_images_share_a_thread_block():
    found = plan(1024, h=4, w=4)
    assert (found["tile_h"], found["tile_w"]) == (4, 4) and found["images"] > 1


def test_more_work_takes_longer():
    cycles = [plan(n, h=28, w=28)["cycles"] for n in (32, 64, 128, 256)]
    assert all(1.5 * a < b for a, b in itertools.pairwise(cycles))
    for exact in (False, True):
        launches = [network_plan(n, dtype="float32", exact=exact)["launches"] for n in (1, 32, 256)]
        for few, more in itertools.pairwise(launches):
            for a, b in zip(few, more, strict=True):
                assert a["cycles"] <= b["cycles"] and a["memory_bytes"] < b["memory_bytes"]
    assert plan(256, device="sm_80")["cycles"] > plan(256, device="sm_90")["cycles"]


def test_bytes_of_memory():
    """A tile reads the part of its halo that lies in the image; weights and output cross the memory once."""
    found = plan(256, h=56, w=56, c_in=24, c_hidden=144, c_out=24)
    height, width = found["tile_h"], found["tile_w"]
    rows = sum(min(top + height + 1, 56) - max(top - 1, 0) for top in range(0, 56, height))
    columns = sum(min(left + width + 1, 56) - max(left - 1, 0) for left in range(0, 56, width))
    weights = found["memory_bytes"] - 256 * 2 * 24 * (rows * columns + 56 * 56)
    assert 0 < weights < 2 * 160 * (32 * 2 + 16 + 32), "of padded channels, in fp16"
    # The image's rows and columns that a joined stem reads overlap more than its own map's.
    first = network_plan(256)["launches"][0]
    image, output = 256 * 224 * 224 * 3 * 2, 256 * 112 * 112 * 16 * 2
    assert 1.05 * image + output < first["memory_bytes"] < 1.5 * image + output


def test_exact_products_take_longer():
    tf32, exact = (plan(256, dtype="float32", exact=exact) for exact in (False, True))
    assert exact["tensor_cycles"] == pytest.approx(4 * tf32["tensor_cycles"])
    assert exact["issue_cycles"] > tf32["issue_cycles"] and exact["cycles"] > tf32["cycles"]
    assert exact["memory_bytes"] == tf32["memory_bytes"] and exact["shared_cycles"] == tf32["shared_cycles"]


@pytest.mark.parametrize("device", GPUS)
def test_predictions(device):
    """Microseconds are cycles at the clock and bytes at the bandwidth; the largest binds."""
    gpu = GPUS[device]
    for launch in gpu_plan(1.0, 224, 32, "float16", device)["launches"]:
        us = launch["us"]
        assert list(us) == list(PARTS) and launch["binds"] == max(us, key=us.get)
        assert us["hbm"] == pytest.approx(launch["memory_bytes"] / gpu.memory * 1e6)
        assert us["tensor"] == pytest.approx(launch["tensor_cycles"] / gpu.clock * 1e6)
        assert launch["predicted_us"] == pytest.approx(max(launch["cycles"] / gpu.clock * 1e6, *us.values()))


@pytest.mark.parametrize(
    "options",
    [
        {"c_in": 1, "c_hidden": 1, "c_out": 1},
        {"c_hidden": 1 << 20},
        {"c_out": 1 << 16, "residual": False},
        {"h": 1, "w": 1 << 20},
        {"h": 1 << 20, "w": 1},
        {"kernel": 15, "padding": (7, 7, 7, 7)},
        {"h": 3, "w": 3, "dilation": 4, "padding": (4, 4, 4, 4)},
    ],
)
def test_odd_shapes_fit(options):
    for dtype in DTYPES:
        for n in (1, 77):
            found = plan(n, **options, dtype=dtype)
            assert found["fits"]
            assert found["blocks"] == tiles_of(n, found) * found["column_parts"] * found["splits"]


@pytest.mark.parametrize(
    "options",
    [
        {"c_in": 1 << 20, "residual": False},
        {"kernel": 63, "padding": (31, 31, 31, 31)},
        {"h": 5000, "w": 5000, "dilation": 2000, "padding": (2000,) * 4},
    ],
)
def test_what_fits_nowhere_is_said_to(options):
    found = plan(**options)
    assert not found["fits"] and found["blocks"] == found["shared_bytes"] == 0


HUGE = 1 << 20


@pytest.mark.parametrize(
    "options",
    [
        {"c_in": HUGE, "c_hidden": HUGE, "c_out": HUGE, "kernel": 3, "dilation": HUGE, "padding": (HUGE,) * 4,
         "h": HUGE, "w": HUGE, "n": 1 << 40},
        {"h": HUGE, "w": HUGE, "kernel": 63, "dilation": 1 << 14, "padding": (1 << 19,) * 4},
        {"h": HUGE, "w": HUGE, "n": 1 << 40},
        {"h": 1, "w": 1, "padding": (HUGE,) * 4, "n": 1 << 22},
    ],
)  # fmt: skip
def test_absurd_sizes_overflow_nothing(options):
    options = {**options, "residual": False}
    for dtype, device in itertools.product(DTYPES, DEVICES):
        assert not plan(**options, dtype=dtype, device=device)["fits"]
        assert re.search("32-bit counters|bytes of shared memory", unfit(dtype=dtype, device=device, **options))


@pytest.mark.parametrize(
    ("options", "fits"),
    [
        ({"h": 1 << 18, "w": 1 << 19}, True),  # 2^37 pixels in tiles of several
        ({"h": HUGE, "w": HUGE, "n": 2}, False),
        ({"h": 1, "w": 1, "n": 1 << 34}, True),  # several images to a thread block
        ({"h": 1, "w": 1, "n": 1 << 36}, False),
    ],
)
def test_what_32_bits_do_not_count(options, fits):
    options = {"has_expand": False, "c_in": 8, "c_hidden": 8, "c_out": 8, "residual": False, **options}
    options["c_hidden"] = options["c_in"]
    why = unfit(**options)
    assert plan(**options)["fits"] == (why is None) == fits
    assert fits or "32-bit counters" in why


def test_stems_and_heads_fit_but_for_what_32_bits_do_not_count():
    def stem(n=1, h=224, w=224, c_in=3, kernel=3, stride=1, padding=(1, 1, 1, 1)):
        shape = DenseShape(c_in, 8, kernel, stride, padding)
        return _C.cuda_unfit("dense", (n, h, w, c_in), shape.fields(), "float32", 0)

    def head(n, h, w, c_in, c_last, classes):
        return _C.cuda_unfit("head", (n, h, w, c_in), HeadShape(c_in, c_last, classes).fields(), "float32", 0)

    assert stem() is None and stem(n=0) is None and stem(c_in=64, kernel=7) is None
    assert stem(h=1 << 11, w=(1 << 20) - 1) is None  # all but 2^11 of 2^31 pixels
    for options in ({"h": 1 << 11, "w": 1 << 20}, {"n": 1 << 31, "h": 1, "w": 1}, {"c_in": 1 << 20, "kernel": 63}):
        assert "32-bit counters" in stem(**options)
    assert stem(kernel=4) == "kernel must be odd, from 1 to 63"
    assert head(1, 7, 7, 448, 1792, 1000) is None
    assert head(1 << 33, 1, 1, 1, 1, 1) is None
    assert "32-bit counters" in head(1 << 35, 1, 1, 1, 1, 1)
    assert head(1, 7, 7, 448, 0, 1000) == "channel counts must be positive"


def test_an_empty_batch_has_no_plan():
    assert not plan(0)["fits"] and unfit(n=0) is None
    assert network_plan(0) == dict(fits=False, joined=False, memory_bytes=0, packed_bytes=0, launches=[])


def test_planning_is_quick():
    """It is part of a block's first call: milliseconds at most, even on a busy machine."""
    for options in ({}, {"h": 512, "w": 512}, {"h": 1, "w": 5000}, {"h": 2, "w": 2, "c_hidden": 4096}):
        seconds = []
        for _ in range(10):
            start = time.perf_counter()
            plan(256, **options)
            seconds.append(time.perf_counter() - start)
        assert min(seconds) < 1e-3


def test_a_broken_rule_is_named():
    with pytest.raises(ValueError, match="channel counts must be positive"):
        plan(c_hidden=0)
    with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16, float16, got int8"):
        plan(dtype="int8")
    with pytest.raises(ValueError, match="device must be sm_80, sm_86 or sm_90, got sm_70"):
        plan(device="sm_70")


def measured_plans():
    """Of each block of MobileNetV2 1.0 at 224x224 and each batch: predicted and measured microseconds of its plans."""
    blocks = {block.number: block for block in cuda_plans.blocks()}
    found = {}
    with cuda_plans.PLANS.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            block, batch = int(row["block"]), int(row["batch"])
            tile = tuple(int(row[name]) for name in ("rows", "columns", "images", "splits", "ahead", "rounds"))
            x, fields = plan_arguments(blocks[block].row, batch)
            launch = _C.cuda_plan(x, fields, "float16", "sm_90", tile=tile)
            assert launch["fits"]
            us = 1e6 * launch["cycles"] / GPUS["sm_90"].clock
            found.setdefault((block, batch), []).append((us, float(row["us"])))
    return found


def test_predictions_choose_among_measured_plans():
    cells = measured_plans()
    assert len(cells) == 33
    lost = {cell: min(plans)[1] / min(us for _, us in plans) for cell, plans in cells.items()}
    assert max(lost.values()) < 1.1, lost
    assert statistics.mean(lost.values()) < 1.04, lost
    apart = [abs(math.log(predicted / us)) for plans in cells.values() for predicted, us in plans
             if us < 1.5 * min(us for _, us in plans)]  # fmt: skip
    assert statistics.median(apart) < 0.1


@pytest.mark.parametrize("tile", [(0, 7, 1, 1, 0, 1), (7, 33, 1, 1, 0, 1), (7, 7, 2, 1, 0, 1), (7, 7, 1, 13, 0, 1)])
def test_impossible_tiles(tile):
    with pytest.raises(ValueError, match=r"plan: tile must have 1 to 32 rows and columns, .* 1 to 12 splits"):
        _C.cuda_plan(*block_lists(), tile=tile)


@pytest.mark.parametrize("tile", [(7, 7, 1, 1, 0, 33), (7, 7, 1, 1, 0, -1), (7, 7, 1, 2, 0, 2), (14, 14, 2, 1, 0, 2)])
def test_impossible_rounds(tile):
    with pytest.raises(ValueError, match=r"plan: tile must have 0 to 32 rounds, and several only with one image, one"):
        _C.cuda_plan(*block_lists(), tile=tile)
