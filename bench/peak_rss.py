"""Bytes that one forward pass adds to what this process holds: ``python bench/peak_rss.py fused 32``. Linux only.

Arguments: an engine of PyTorch's, a batch size. The model has run on one image before.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
from dataclasses import replace
from pathlib import Path

import torch
from engines import OURS, Case, network

CLEAR = Path("/proc/self/clear_refs")


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{key}:")).split()[1])


def main() -> None:
    name, batch = sys.argv[1], int(sys.argv[2])
    case = Case(batch=batch)
    model = network(fused=True) if name == OURS else network(memory_format=torch.channels_last)
    x = case.images_channels_last()
    with torch.no_grad():
        model(replace(case, batch=1).images_channels_last())
        # What was freed must not be there to be used again.
        gc.collect()
        with contextlib.suppress(AttributeError):  # glibc's
            ctypes.CDLL(None).malloc_trim(0)
        CLEAR.write_text("5", encoding="utf-8")  # sets the peak to what is held now
        before = _status("VmRSS")
        model(x)
        print(_status("VmHWM") - before)


if __name__ == "__main__":
    main()
