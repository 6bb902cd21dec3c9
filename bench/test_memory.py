"""Peak activation memory of one forward pass, 1.0 at 224x224 in fp32: PyTorch's allocator's, and the process's."""

from __future__ import annotations

import os
import subprocess
import sys

import peak_rss
import pytest
import torch
from engines import LIVE, PLAIN, Case, build

from mnv2_fused.tools import measure


def _record(benchmark, level: str, batch: int, peaks: dict[str, int]) -> None:
    share = {name: peak / peaks[PLAIN] for name, peak in peaks.items()}
    benchmark.extra_info.update(level=level, batch=batch, threads=torch.get_num_threads(), bytes=peaks, share=share)


@pytest.mark.parametrize("batch", [1, 32])
def test_allocated(benchmark, batch):
    benchmark.group = "memory"
    engines, _ = build(Case(batch=batch, threads=torch.get_num_threads()), [LIVE, PLAIN])
    with torch.no_grad():
        peaks = {name: measure.peak_memory(engine) for name, engine in engines.items()}
        benchmark.pedantic(engines[LIVE], rounds=3)
    _record(benchmark, "allocator", batch, peaks)


@pytest.mark.skipif(not os.access(peak_rss.CLEAR, os.W_OK), reason=f"needs {peak_rss.CLEAR}, which Linux has")
def test_resident(benchmark):
    """By the system's count, in a process for each engine. It includes what other libraries allocate."""
    benchmark.group = "memory"

    def peak(name: str) -> int:
        command = [sys.executable, peak_rss.__file__, "forward", name, "32"]
        return int(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)

    peaks = {PLAIN: peak(PLAIN)}
    peaks = {LIVE: benchmark.pedantic(peak, [LIVE], rounds=1), **peaks}
    _record(benchmark, "process", 32, peaks)
