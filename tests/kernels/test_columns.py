"""Blocks whose output columns are cut: the same bits as uncut, whatever the shape."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from test_kernels import DTYPES, FORCED, block_weights, cast, check_block
from torch import Tensor

from mnv2_fused import _C
from mnv2_fused import functional as ops
from mnv2_fused._core.geometry import BlockShape
from mnv2_fused.tools import measure

HUGE = 1 << 30


@contextlib.contextmanager
def caches(l1: int, l2: int) -> Iterator[None]:
    """Planners see caches of these sizes in bytes."""
    _C.pretend_caches(l1, l2)
    try:
        yield
    finally:
        _C.pretend_caches(0, 0)


def check_cuts(x: Tensor, weights: list[Tensor | None], dtype: torch.dtype, **options) -> set[int]:
    """Runs a block uncut, and with small caches on one and on three threads: the numbers of column strips.

    Without padding it is TensorFlow's "SAME".
    """
    x, weights = x.to(dtype).contiguous(memory_format=torch.channels_last), cast(weights, dtype)
    packed = ops.pack_block(*weights)
    shape = BlockShape(
        packed.c_in, packed.c_hidden, packed.c_out, packed.kernel, options["stride"], options["dilation"],
        options.get("padding"), weights[0] is not None, options.get("residual", False),
    )  # fmt: skip
    n, c_in, h, w = x.shape
    shape = shape.resolved(h, w)
    options["padding"] = shape.padding
    with measure.threads(1), caches(HUGE, HUGE):
        plan = _C.cpu_plan((n, h, w, c_in), shape.fields(), 1)
        assert plan["columns"] == plan["strips"] == 1
        expected = ops.run_block(x, packed, **options)
    found = set()
    for l1, l2, threads in itertools.product((1 << 10, 1 << 16), (4 << 10, 12 << 10, 32 << 10, 64 << 10), (1, 3)):
        with measure.threads(threads), caches(l1, l2):
            found.add(_C.cpu_plan((n, h, w, c_in), shape.fields(), threads)["columns"])
            y = ops.run_block(x, packed, **options)
        assert torch.equal(y, expected), f"L1 {l1}, L2 {l2}, {threads} threads"
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dilation", [1, 2, 4])
@pytest.mark.parametrize("stride", [1, 2])
def test_cut_columns_change_no_bit(stride, dilation, dtype):
    found = set()
    for width, expand, padding in [
        (61, True, (dilation,) * 4),  # what keeps the size
        (50, True, (0, 3 * dilation, 5, 1)),  # to one side only
        (57, False, (1, 0, dilation, 2)),
        (26, True, (2, 37, 1, 29)),  # column strips that read no column of the image
    ]:
        c_in = 21 if expand else 50
        c_out = c_in if padding == (dilation,) * 4 else 19
        x, weights = torch.randn(2, c_in, 45, width), block_weights(c_in, 50, c_out, expand=expand)
        residual = stride == 1 and c_out == c_in
        options = {"stride": stride, "dilation": dilation, "padding": padding, "residual": residual}
        found |= check_cuts(x, weights, dtype, **options)
    found |= check_cuts(torch.randn(1, 24, 44, 58), block_weights(24, 96, 24), dtype, stride=stride,
                        dilation=dilation, residual=stride == 1)  # fmt: skip
    assert max(found) > 2


@pytest.mark.parametrize("kernel", [1, 5, 7])
def test_other_kernels(kernel):
    weights = block_weights(16, 70, 16, kernel)
    options = {"stride": 1, "dilation": 2, "padding": (kernel - 1,) * 4, "residual": True}
    assert max(check_cuts(torch.randn(1, 16, 40, 63), weights, torch.float32, **options)) > 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_cut_block_is_right(dtype):
    with caches(1 << 14, 1 << 14):
        check_block(torch.randn(1, 32, 40, 70), block_weights(32, 96, 32), dtype, dilation=2)
        check_block(torch.randn(2, 24, 41, 70), block_weights(24, 60, 30), dtype, stride=2, dilation=4)


def test_nan_and_inf_stay_where_they_belong():
    x, weights = torch.randn(1, 20, 40, 70), block_weights(20, 50, 20)
    x[0, 3, 20, 33] = math.nan
    with caches(1 << 14, 1 << 14):
        y = check_block(x, weights, dilation=4)
    bad = y.isnan().any(dim=1)[0].nonzero()
    assert set(map(tuple, bad.tolist())) == {(20 + 4 * i, 33 + 4 * j) for i in (-1, 0, 1) for j in (-1, 0, 1)}


@pytest.mark.skipif(FORCED in os.environ, reason=f"{FORCED} is set: this is one of the runs that the test starts")
@pytest.mark.parametrize("isa", _C.cpu_supported_isas()[:-1])
def test_everything_again_with_a_lower_instruction_set(isa):
    run = subprocess.run(
        [sys.executable, "-m", "pytest", __file__, "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist"],
        env={**os.environ, FORCED: isa},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-1000:]
