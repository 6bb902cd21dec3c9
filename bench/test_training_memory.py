"""Memory of a training step, 1.0 at 224x224 in fp32: bytes saved for the backward, and the process's peak."""

from __future__ import annotations

import os
import subprocess
import sys

import peak_rss
import pytest
import torch
from engines import Case
from training_engines import CHECKPOINTED, FUSED, PLAIN, Trainee, saved_bytes

NAMES = (*FUSED, PLAIN, CHECKPOINTED)


def _record(benchmark, level: str, batch: int, found: dict[str, int]) -> None:
    share = {name: size / found[PLAIN] for name, size in found.items()}
    benchmark.extra_info.update(level=level, batch=batch, threads=torch.get_num_threads(), bytes=found, share=share)


def test_training_saved(benchmark):
    """Bytes saved for the backward, for each image."""
    benchmark.group = "training memory"
    batch = 16

    def saved(name: str) -> int:
        return saved_bytes(Trainee(name, Case(batch=batch))) // batch

    found = {name: saved(name) for name in NAMES[1:]}
    found = {NAMES[0]: benchmark.pedantic(saved, [NAMES[0]], rounds=1), **found}
    _record(benchmark, "saved", batch, found)


@pytest.mark.skipif(not os.access(peak_rss.CLEAR, os.W_OK), reason=f"needs {peak_rss.CLEAR}, which Linux has")
def test_training_resident(benchmark, quick):
    """The peak by the system's count, in a process for each engine, above model, optimizer state and images."""
    benchmark.group = "training memory"
    batch, names = (4, (FUSED[0], PLAIN)) if quick else (32, NAMES)

    def peak(name: str) -> int:
        command = [sys.executable, peak_rss.__file__, "step", name, str(batch)]
        return int(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)

    found = {name: peak(name) for name in names[1:]}
    found = {names[0]: benchmark.pedantic(peak, [names[0]], rounds=1), **found}
    _record(benchmark, "peak", batch, found)
