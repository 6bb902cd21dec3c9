"""The tile plan as a function: invariants for every block on any machine."""

from __future__ import annotations

import pytest

from mnv2_fused import _C, MobileNetV2
from mnv2_fused._core.geometry import BlockShape
from mnv2_fused.tools.rates import block_shapes as named_block_shapes


def block_shapes(model, resolution):
    return [{k: v for k, v in shape.items() if k != "block"} for shape in named_block_shapes(model.eval(), resolution)]


def plan(n=1, h=14, w=14, c_in=64, c_hidden=384, c_out=64, kernel=3, stride=1, dilation=1, padding=(1, 1, 1, 1),
         has_expand=True, residual=False, threads=1, **options):  # fmt: skip
    shape = BlockShape(c_in, c_hidden, c_out, kernel, stride, dilation, padding, has_expand, residual)
    return _C.cpu_plan((n, h, w, c_in), shape.fields(), threads, **options)


@pytest.mark.parametrize("resolution", [96, 128, 160, 192, 224, 321, 513])
@pytest.mark.parametrize("width", [0.35, 0.5, 0.75, 1.0, 1.3, 1.4])
def test_every_block_of_the_network(width, resolution):
    for shape in block_shapes(MobileNetV2(width_mult=width), resolution):
        one, many = plan(**shape, threads=1), plan(**shape, threads=64)
        assert one["groups"] == many["groups"]  # the order of sums must not depend on the threads
        assert 1 <= one["rows"] <= one["h_out"] and 1 <= one["strips"] <= one["h_out"]
        expanded = 4 * shape["c_hidden"] * shape["h"] * shape["w"]
        output = 4 * shape["c_out"] * one["h_out"] * one["w_out"]
        if expanded > 1 << 20:  # if the expanded tensor is large, only a small part of it ever exists
            assert one["scratch_bytes"] < expanded / 4 + output
        assert many["tasks"] >= one["tasks"]


def test_the_network_has_the_multiply_adds_of_the_paper():
    blocks = sum(plan(**shape)["macs"] for shape in block_shapes(MobileNetV2(), 224))
    stem, head = 112 * 112 * 27 * 32, 49 * 320 * 1280 + 1280 * 1000
    assert blocks + stem + head == 300_774_272


def test_groups_depend_on_the_shape_alone():
    groups = [plan(h=7, w=7, c_in=160, c_hidden=960, n=n, threads=t, l1=l1, l2=l2)["groups"]
              for n in (1, 9) for t in (1, 3, 64) for l1 in (8192, 1 << 17) for l2 in (1 << 16, 1 << 22)]  # fmt: skip
    assert set(groups) == {4}


@pytest.mark.parametrize("threads", [1, 2, 4, 8])
def test_all_threads_have_work(threads):
    for shape in block_shapes(MobileNetV2(), 224):
        one = plan(**shape, threads=threads)
        assert one["tasks"] >= min(threads, one["h_out"] // 2)


def test_smaller_caches_mean_smaller_tiles():
    small, large = (
        plan(h=56, w=56, c_in=24, c_hidden=144, c_out=24, l1=l1, l2=l2)
        for l1, l2 in ((1 << 14, 1 << 17), (1 << 17, 1 << 22))
    )
    assert small["rows"] <= large["rows"] and small["strips"] > large["strips"]


def cut(**options):
    found = plan(**{"l1": 32 << 10, "l2": 1 << 20, **options})
    return found["strips"], found["columns"]


@pytest.mark.parametrize(("width", "threads"), [(w, t) for w in (0.35, 0.5, 0.75, 1.0, 1.3, 1.4) for t in (1, 2, 16)])
def test_classification_is_cut_into_whole_rows(width, threads):
    for shape in block_shapes(MobileNetV2(width_mult=width), 224):
        found = plan(**shape, threads=threads, l1=32 << 10, l2=1 << 20)
        assert found["columns"] == 1
        rows = (
            found["l2"] // 2 // (4 * (shape["stride"] * shape["w"] * shape["c_in"] + found["w_out"] * shape["c_out"]))
        )
        if threads == 1 and found["groups"] == 1:
            assert found["strips"] == -(-found["h_out"] // max(min(rows, found["h_out"]), 2 * found["rows"]))


def test_dilated_blocks_are_cut_into_few_square_tiles():
    block = {"c_in": 160, "c_hidden": 960, "c_out": 160, "dilation": 4, "padding": (4, 4, 4, 4), "residual": True}
    assert cut(h=33, w=33, **block) == (1, 1)
    assert cut(h=65, w=65, **block) == (2, 1)
    strips, columns = cut(h=129, w=257, **block)
    assert columns > strips > 1  # strips of whole rows would compute most rows twice
    assert plan(h=129, w=257, **block)["halo"] == 8
    # The other way round, and for several threads.
    assert cut(h=257, w=129, **block)[0] > 1
    for threads in (2, 3, 8, 32):
        found = plan(h=129, w=257, **block, threads=threads, l1=32 << 10, l2=1 << 20)
        assert found["columns"] > 1 and found["tasks"] == found["strips"] * found["columns"] >= threads


def test_wide_maps_are_cut_into_columns():
    assert cut(h=257, w=513, c_in=24, c_hidden=144, c_out=24, residual=True)[1] > 1
    assert cut(h=17, w=4097, c_in=24, c_hidden=144, c_out=24, dilation=4, padding=(4, 4, 4, 4))[1] > 1


def test_a_tile_uses_little_scratch_whatever_the_width():
    block = {"h": 65, "c_in": 64, "c_hidden": 384, "c_out": 64, "dilation": 4, "padding": (4, 4, 4, 4)}
    assert plan(w=8193, **block, l1=32 << 10, l2=1 << 20)["scratch_bytes"] < 1 << 20


def test_plans_of_absurd_shapes_end():
    shape = {"h": 1 << 20, "w": 1 << 20, "c_in": 8, "c_hidden": 48, "c_out": 8, "l2": 1 << 20}
    assert plan(**shape, threads=256)["columns"] >= 1
    assert plan(**shape, kernel=63, dilation=1 << 14, padding=(31 << 14,) * 4, threads=1)["columns"] >= 1


def test_a_broken_rule_is_named():
    with pytest.raises(ValueError, match="channel counts must be positive"):
        plan(c_hidden=0)
    with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16, float16, got int8"):
        plan(dtype="int8")
