"""Seconds of a step by one engine alone, as a script of its own would see them, one a line:
``python bench/alone.py KIND ENGINE BATCH THREADS STEPS``, where KIND is step, frozen (fine-tuning) or forward.

Memory comes from and goes to the system as the C library does it by default.
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
