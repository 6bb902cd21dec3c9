"""Times plans of the network's blocks on a GPU: ``python bench/cuda_plans.py [--seconds 60] [--csv FILE]``

For each distinct block of MobileNetV2 1.0 at 224x224 with an expansion, in float16, and each batch, it runs tiles of at
least 16 pixels, first those that are predicted to be quickest, then others at random, until the time is up. Each is a
CUDA graph of several calls over two inputs; the least of a few replays counts. Every output is compared with that of
the plan that the operator chooses. The costs in csrc/cuda/cost.cpp are fitted to the table.
"""

from __future__ import annotations

import argparse
import csv
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from measure_cuda import RESOLUTION
from smoke_cuda import block_weights
from torch import Tensor

from mnv2_fused import _C, MobileNetV2
from mnv2_fused import functional as ops
from mnv2_fused._core.geometry import BlockShape
from mnv2_fused.tools.rates import block_shapes, plan_arguments

PLANS = Path(__file__).resolve().parent / "results" / "plans.csv"
COLUMNS = ("block", "batch", "rows", "columns", "images", "splits", "ahead", "rounds", "us")
CALLS = {256: 3, 32: 12, 1: 20}  # of a graph, for each batch
TOLERANCE = 5e-3  # of the largest value; other splits add in another order
LEAST_PIXELS, LONGEST = 16, 8  # of a tile; its longer side over its shorter one

Tile = tuple[int, int, int, int, int, int]


class Block(NamedTuple):
    number: int
    row: dict  # of `block_shapes`
    shape: BlockShape


def blocks() -> Iterator[Block]:
    """One of all blocks that are the same."""
    seen = set()
    for number, row in enumerate(block_shapes(MobileNetV2().eval(), RESOLUTION), 1):
        shape = BlockShape(*(row[name] for name in BlockShape._fields))
        if shape.has_expand and (shape, row["h"]) not in seen:
            seen.add((shape, row["h"]))
            yield Block(number, row, shape)


def tiles(shape: BlockShape, height: int, width: int, batch: int) -> Iterator[Tile]:
    """Tiles of an output of this size: its whole parts, all counts of splits and images, and 0 rounds."""
    chunks = -(-shape.c_hidden // 32)
    for rows in _parts(height):
        for columns in _parts(width):
            whole = (rows, columns) == (height, width)
            if not whole and (rows * columns < LEAST_PIXELS or max(rows, columns) > LONGEST * min(rows, columns)):
                continue
            for images in (1, 2, 4) if whole else (1,):
                for splits in (1, 2, 4, 8):
                    if splits <= chunks and images <= batch:
                        yield from ((rows, columns, images, splits, ahead, 0) for ahead in (0, 1))


def _parts(size: int) -> list[int]:
    return sorted(part for part in {-(-size // count) for count in range(1, size + 1)} if part <= 32)


def candidates(block: Block, batch: int) -> list[Tile]:
    """The tiles that fit, in the order in which they are measured: in one round, and in as many as are quickest."""
    x, fields = plan_arguments(block.row, batch)
    found = []
    for tile in tiles(block.shape, *block.shape.size_out(block.row["h"], block.row["w"]), batch):
        quickest = _C.cuda_plan(x, fields, "float16", "sm_90", tile=tile)
        if not quickest["fits"]:
            continue
        for rounds in {1, quickest["rounds"]}:
            in_rounds = (*tile[:5], rounds)
            launch = _C.cuda_plan(x, fields, "float16", "sm_90", tile=in_rounds)
            found.append((launch["cycles"], in_rounds))
    order = [tile for _, tile in sorted(found)]
    rest = order[12:]
    random.shuffle(rest)
    return order[:12] + rest


def microseconds(call: Callable[[int], Tensor], calls: int, best: float) -> float:
    """Of a call, in a graph. A plan that takes twice as long as the `best` is not measured as often."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="relaxed"):
        outputs = [call(i) for i in range(calls)]
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def once() -> float:
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return 1e3 * start.elapsed_time(end) / calls

    least = min(once() for _ in range(2))
    if least < 2 * best:
        least = min(least, *(once() for _ in range(4)))
    del outputs
    return least


@torch.no_grad()
def measured(block: Block, batch: int, until: float) -> Iterator[tuple[Tile, float]]:
    shape = block.shape
    packed = ops.pack_block(*block_weights(shape.c_in, shape.c_hidden, shape.c_out, torch.float16))
    size = (batch, shape.c_in, block.row["h"], block.row["w"])
    x = [torch.randn(size, device="cuda").half() for _ in range(2)]
    x = [t.contiguous(memory_format=torch.channels_last) for t in x]
    expected = ops.run_block(x[0], packed, stride=shape.stride, residual=shape.residual)
    planned = torch.ops.mnv2_fused.inverted_residual_planned.default
    bounds = [0.0, 6.0, -float("inf"), float("inf")]
    best = float("inf")
    for tile in candidates(block, batch):
        if time.monotonic() > until:
            return

        def call(i: int, tile: Tile = tile) -> Tensor:
            return planned(x[i % 2], packed.data, shape.fields(), bounds, False, tile)

        error = ((call(0) - expected).abs().max() / expected.abs().max()).item()
        if not error < TOLERANCE:
            raise RuntimeError(f"block {block.number}, batch {batch}, tile {tile} differs by {error:.2g}")
        us = microseconds(call, CALLS[batch], best)
        best = min(best, us)
        yield tile, us


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60, help="for all blocks and batches together")
    parser.add_argument("--csv", type=Path, default=PLANS, help="is written anew")
    arguments = parser.parse_args()
    random.seed(0)
    cells = [(block, batch) for batch in CALLS for block in blocks()]
    end = time.monotonic() + arguments.seconds
    with arguments.csv.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(COLUMNS)
        for left, (block, batch) in zip(range(len(cells), 0, -1), cells, strict=True):
            share = (end - time.monotonic()) / left
            rows = list(measured(block, batch, time.monotonic() + share))
            table.writerows((block.number, batch, *tile, f"{us:.1f}") for tile, us in rows)
            file.flush()
            tile, us = min(rows, key=lambda row: row[1])
            print(
                f"block {block.number}, batch {batch}: {len(rows)} plans, quickest {us:.1f} us with {tile}", flush=True
            )


if __name__ == "__main__":
    main()
