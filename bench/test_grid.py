"""The published widths and resolutions in fp32: fused against inference engines, by threads, and by batch size at the
smallest network. bench/test_network.py has the larger batches of 1.0 at 224x224.
"""

from __future__ import annotations

import pytest
from engines import GRID, LITERT, ONNX, OPENVINO, OURS, Case
from recording import record_network

from mnv2_fused.tools import measure


@pytest.mark.parametrize("threads", [n for n in (1, 2) if n <= measure.usable_cpus()])
@pytest.mark.parametrize(("width", "resolution", "batch"), GRID)
def test_grid(benchmark, width, resolution, batch, threads, seconds):
    benchmark.group = "grid"
    names = (*OURS, ONNX, OPENVINO, LITERT)
    record_network(benchmark, Case(width, resolution, batch, threads), seconds=seconds / 4, names=names)
