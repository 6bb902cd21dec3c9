"""Prints the peak bytes that a pass adds to this process. Linux only. For example,
``python bench/peak_rss.py forward "fused (live)" 32``.

Arguments: ``forward`` for inference or ``step`` for a training step, an engine that is based on PyTorch, a batch size.
Before the measurement the model runs on one image.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from engines import LIVE, Case, network
from training_engines import Trainee

CLEAR = Path("/proc/self/clear_refs")


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{key}:")).split()[1])


def added(function: Callable[[], object]) -> int:
    """Peak bytes that the process holds during `function`, above what it held before."""
    # Freed memory must go back to the system first, or `function` would reuse it unseen.
    gc.collect()
    with contextlib.suppress(AttributeError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)
    CLEAR.write_text("5", encoding="utf-8")  # resets the peak to the current size
    before = _status("VmRSS")
    function()
    return _status("VmHWM") - before


def forward(name: str, batch: int) -> int:
    case = Case(batch=batch)
    model = network(fused=True) if name == LIVE else network(memory_format=torch.channels_last)
    x = case.images_channels_last()
    with torch.no_grad():
        model(replace(case, batch=1).images_channels_last())
        return added(lambda: model(x))


def step(name: str, batch: int) -> int:
    trainee = Trainee(name, Case())
    trainee.step()  # creates the optimizer's state
    trainee.optimizer.zero_grad()
    trainee.give(batch)
    return added(trainee.step)


if __name__ == "__main__":
    what, name, batch = sys.argv[1:]
    print({"forward": forward, "step": step}[what](name, int(batch)))
