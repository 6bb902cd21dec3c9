"""The published widths and resolutions, batch 1 in fp32, one thread: fused against inference engines."""

from __future__ import annotations

import pytest
from engines import OURS, Case
from recording import record_network


@pytest.mark.parametrize("resolution", [96, 128, 160, 192, 224])
@pytest.mark.parametrize("width", [0.35, 0.5, 0.75, 1.0, 1.4])
def test_grid(benchmark, width, resolution, seconds):
    benchmark.group = "grid"
    names = (OURS, "ONNX Runtime", "OpenVINO")
    record_network(benchmark, Case(width, resolution), seconds=seconds / 2, names=names)
