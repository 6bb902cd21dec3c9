"""The whole network, 1.0 at 224x224 in fp32: fused against all peers, by batch size and threads."""

from __future__ import annotations

import pytest
from engines import Case
from recording import record_network

from mnv2_fused.tools import measure


@pytest.mark.parametrize("threads", [n for n in (1, 2) if n <= measure.usable_cpus()])
@pytest.mark.parametrize("batch", [1, 8, 32])
def test_network(benchmark, batch, threads, seconds):
    benchmark.group = "network"
    record_network(benchmark, Case(batch=batch, threads=threads), seconds=seconds)
