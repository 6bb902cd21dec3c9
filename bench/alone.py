"""Prints the seconds of each step of one engine, measured in this process alone:
``python bench/alone.py KIND ENGINE BATCH THREADS STEPS``. KIND is step, frozen (fine-tuning) or forward.

The C library allocates and returns memory as it does by default.
"""

from __future__ import annotations

import sys
import time

import torch
from engines import Case
from recording import apart
from training_engines import Trainee

if __name__ == "__main__":
    kind, name, batch, threads, steps = sys.argv[1:]
    torch.set_num_threads(int(threads))
    trainee = Trainee(name, Case(batch=int(batch), threads=int(threads)), frozen=kind == "frozen")
    forward = kind == "forward"
    with torch.set_grad_enabled(not forward):
        run = trainee.forward if forward else trainee.step
        run()
        with apart():
            for _ in range(int(steps)):
                start = time.perf_counter()
                run()
                print(time.perf_counter() - start)
