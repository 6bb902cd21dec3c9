"""The fused network on one thread against two, in one process, 1.0 at 224x224 in fp32."""

from __future__ import annotations

import pytest
import torch
from engines import LIVE, Case, build, network
from recording import multiply_adds, record

from mnv2_fused.tools import measure


@pytest.mark.skipif(measure.usable_cpus() < 2, reason="needs two processors")
@pytest.mark.parametrize("batch", [1, 8])
def test_scaling(benchmark, batch, seconds):
    benchmark.group = "scaling"
    case = Case(batch=batch)
    fused = build(case, [LIVE])[0][LIVE]

    def on(threads: int):
        def run():
            torch.set_num_threads(threads)
            return fused()

        return run

    benchmark.extra_info.update(batch=batch)
    macs = multiply_adds(network(), case.images_channels_last())
    record(benchmark, {"1 thread": on(1), "2 threads": on(2)}, macs=macs, threads=1, seconds=seconds)
