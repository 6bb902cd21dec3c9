"""Which plans of blocks are measured on a GPU. Needs no GPU."""

import cuda_plans
import pytest

from mnv2_fused import _C
from mnv2_fused.tools.rates import plan_arguments


def test_distinct_blocks_with_an_expansion():
    found = {block.number: (block.row["h"], block.shape.c_in, block.shape.c_out) for block in cuda_plans.blocks()}
    assert list(found) == [2, 3, 4, 5, 7, 8, 11, 12, 14, 15, 17]
    assert found[2] == (112, 16, 24) and found[14] == (14, 96, 160) and found[17] == (7, 160, 320)


@pytest.mark.parametrize("batch", [1, 32])
@pytest.mark.parametrize("number", [3, 14])
def test_candidates_fit_and_the_quickest_come_first(number, batch):
    block = next(b for b in cuda_plans.blocks() if b.number == number)
    out, _ = block.shape.size_out(block.row["h"], block.row["w"])
    found = cuda_plans.candidates(block, batch)
    assert len(found) == len(set(found)) > 40
    x, fields = plan_arguments(block.row, batch)
    launches = [_C.cuda_plan(x, fields, "float16", "sm_90", tile=tile) for tile in found]
    cycles = [launch["cycles"] for launch in launches]
    assert cycles[:12] == sorted(cycles)[:12]
    for (rows, columns, images, splits, _, rounds), launch in zip(found, launches, strict=True):
        assert launch["fits"] and launch["splits"] == splits and launch["rounds"] == rounds and launch["threads"] >= 128
        assert rows * columns >= cuda_plans.LEAST_PIXELS and images <= batch
        assert images == 1 or (rows, columns) == (out, out)
