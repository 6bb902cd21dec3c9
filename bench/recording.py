"""Measures a benchmark's engines without mutual disturbance, and records the FMA limit beside the figures."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from engines import ALL, Case, build, network

from mnv2_fused import _C
from mnv2_fused.tools import measure
from mnv2_fused.tools.counts import multiply_adds


@contextlib.contextmanager
def apart() -> Iterator[None]:
    """Pins this thread to a processor of its own, and the process's other threads to the other processors. Linux only.

    Some Linux kernels leave two threads of a pool on one processor while another is idle. Each then spins for the
    other, and a parallel region takes 8 ms instead of 0.2.
    """
    tasks = Path("/proc/self/task")
    if not tasks.is_dir() or measure.usable_cpus() < 2:
        yield
        return
    main, every = os.getpid(), os.sched_getaffinity(0)

    def place(mine: set[int], others: set[int]) -> None:
        for task in map(int, os.listdir(tasks)):
            with contextlib.suppress(ProcessLookupError):
                os.sched_setaffinity(task, mine if task == main else others)

    first = min(every)
    place({first}, every - {first})
    try:
        yield
    finally:
        place(every, every)


def record(
    benchmark,
    engines: dict[str, Callable[[], object]],
    *,
    macs: int,
    threads: int,
    seconds: float,
    burst: int = 3,
    minimum: int = 5,
    gradients: bool = False,
) -> None:
    """Measures all engines in turns, then the first engine again as pytest-benchmark's own row.

    `burst` and `minimum` are `measure.interleaved`'s. `gradients` sets the gradient mode.

    extra_info gets every engine's median, its ratio to the first engine's median, and the share of the FMA peak that
    the first engine reaches. The peak is measured before and after.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(measure.threads(threads))
        stack.enter_context(torch.set_grad_enabled(gradients))
        for engine in engines.values():  # the engine starts its threads
            engine()
        stack.enter_context(apart())
        measure.settle()
        peak = _C.cpu_fma_peak()
        medians = measure.medians(measure.interleaved(engines, seconds=seconds, burst=burst, minimum=minimum))
        measure.settle()
        peak = max(peak, _C.cpu_fma_peak()) * threads
        first = next(iter(engines))
        benchmark.extra_info.update(
            threads=threads,
            milliseconds={name: 1e3 * median for name, median in medians.items()},
            times_as_long={name: median / medians[first] for name, median in medians.items()},
            limit_milliseconds=1e3 * macs / peak,
            gmacs_per_second=macs / medians[first] / 1e9,
            peak_gmacs_per_second=peak / 1e9,
            share_of_peak=macs / medians[first] / peak,
        )
        benchmark.pedantic(engines[first], rounds=max(3, int(seconds / medians[first] / 4)), warmup_rounds=1)


def record_network(benchmark, case: Case, *, seconds: float, names: Sequence[str] = ALL) -> None:
    """Builds and measures engines of a whole network. extra_info also gets the case, and which engines are missing and
    why.
    """
    engines, missing = build(case, names)
    benchmark.extra_info.update(width=case.width, resolution=case.resolution, batch=case.batch, missing=missing)
    macs = multiply_adds(network(case.width), case.images_channels_last())
    record(benchmark, engines, macs=macs, threads=case.threads, seconds=seconds)
