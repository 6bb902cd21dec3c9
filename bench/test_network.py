"""The whole network, 1.0 at 224x224 in fp32: fused against plain PyTorch, by batch size and threads."""

from __future__ import annotations

import pytest
from recording import images, multiply_adds, record

from mnv2_fused import measure


@pytest.mark.parametrize("threads", [n for n in (1, 2) if n <= measure.usable_cpus()])
@pytest.mark.parametrize("batch", [1, 8, 32])
def test_network(benchmark, fused, plain, plain_contiguous, batch, threads, seconds):
    benchmark.group = "network"
    x = images(batch)
    contiguous = x.contiguous()
    engines = {
        "fused": lambda: fused(x),
        "eager channels_last": lambda: plain(x),
        "eager contiguous": lambda: plain_contiguous(contiguous),
    }
    benchmark.extra_info.update(batch=batch)
    record(benchmark, engines, macs=multiply_adds(plain, x), threads=threads, seconds=seconds)
