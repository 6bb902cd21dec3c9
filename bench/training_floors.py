"""The least that training must be worth: how many times as fast as eager PyTorch (channels_last) each case is at least.

``python bench/training_floors.py [CASE ...]`` measures network 1.0 in fp32 on two threads, in one process that keeps
freed memory, both engines in turns, and prints the median of the turns' ratios beside the floor. A case is a kind and a
size, for example "step 2x224". Exits with 1 if a case is below its floor.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from statistics import median

import torch
from engines import Case
from recording import apart
from training_engines import PLAIN, Trainee, memory_kept

FUSED = "fused balanced"
TURNS, SECONDS = 9, 0.3  # SECONDS: about how long an engine runs in a turn

FLOORS = {
    "step 2x224": 1.15,
    "step 4x160": 1.15,
    "step 8x160": 1.2,
    "step 16x96": 1.2,
    "step 32x32": 1.0,
    "step 16x224": 1.6,
    "step 32x224": 2.0,
    "frozen 8x224": 1.5,  # fixed statistics of batch norm
    "forward 16x224": 1.8,
}


def _seconds(run: Callable[[], object], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls


def ratio(name: str) -> tuple[float, float]:
    """How many times as fast as eager, and the seconds of a fused call."""
    kind, size = name.split()
    batch, resolution = map(int, size.split("x"))
    case = Case(batch=batch, resolution=resolution, threads=2)
    with torch.set_grad_enabled(kind != "forward"):
        trainees = [Trainee(engine, case, frozen=kind == "frozen") for engine in (FUSED, PLAIN)]
        fused, plain = (t.forward if kind == "forward" else t.step for t in trainees)
        for run in (fused, plain) * 2:
            run()
        calls = max(1, round(SECONDS / _seconds(plain, 1)))
        times = [(_seconds(fused, calls), _seconds(plain, calls)) for _ in range(TURNS)]
    return median(theirs / ours for ours, theirs in times), median(ours for ours, _ in times)


def main(names: list[str]) -> int:
    torch.set_num_threads(2)
    torch.randn(1 << 22).exp()  # starts the threads that apart() places
    failed = False
    with memory_kept(), apart():
        for name in names or FLOORS:
            found, seconds = ratio(name)
            failed |= found < FLOORS[name]
            verdict = "ok" if found >= FLOORS[name] else "below"
            print(f"{name:15} {found:5.2f}  floor {FLOORS[name]:4.2f}  {1e3 * seconds:7.1f} ms  {verdict}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
