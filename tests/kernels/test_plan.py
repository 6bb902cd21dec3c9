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


def test_a_broken_rule_is_named():
    with pytest.raises(ValueError, match="channel counts must be positive"):
        plan(c_hidden=0)
    with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16, float16, got int8"):
        plan(dtype="int8")
