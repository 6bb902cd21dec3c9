"""Serving in fp32, batch 1: images a second by the number of callers, and latency beside a busy process."""

from __future__ import annotations

import contextlib
from statistics import median, quantiles

import pytest
import torch
from engines import LITERT, LIVE, ONNX, OPENVINO, OURS, PLAIN, Case, build
from serving import busy_process, images_per_second, many_callers

from mnv2_fused.tools import measure

ENGINES = (*OURS, ONNX, OPENVINO, LITERT)
CPUS, MANY = 2, 16
CALLS = 1000  # ten are above the 99th percentile
pytestmark = pytest.mark.skipif(measure.usable_cpus() < CPUS, reason="needs two processors")
NETWORKS = pytest.mark.parametrize(("width", "resolution"), [(1.0, 224), (0.35, 96)])


@NETWORKS
def test_callers(benchmark, width, resolution, seconds, quick):
    """One caller on all processors, a caller for each processor, and many callers. All take turns."""
    benchmark.group = "serving"
    # One caller, for which OpenVINO's hint is LATENCY.
    engines, missing = build(Case(width, resolution, threads=CPUS), (*ENGINES, PLAIN))
    rates: dict[tuple[int, str], list[float]] = {}
    turn = min(0.3, seconds)
    with measure.threads(1), torch.no_grad():
        measures = {callers: many_callers(Case(width, resolution), callers, list(engines)) for callers in (CPUS, MANY)}

        def measure_all() -> None:
            for name, engine in engines.items():
                measure.settle()
                with measure.threads(CPUS):
                    rates.setdefault((1, name), []).append(images_per_second([engine], turn))
                for callers, functions in measures.items():
                    rates.setdefault((callers, name), []).append(functions[name](turn))

        benchmark.pedantic(measure_all, rounds=max(1, round(seconds / turn)))
    medians = {key: median(values) for key, values in rates.items()}
    benchmark.extra_info.update(
        width=width,
        resolution=resolution,
        threads=CPUS,
        missing=missing,
        images_per_second={
            str(callers): {name: medians[callers, name] for name in engines} for callers in (1, *measures)
        },
    )
    for name in () if quick else OURS:
        share = medians[MANY, name] / medians[CPUS, name]
        # Turns differ by 15 %; callers that wait for each other get less than half.
        assert share >= 0.75, f"{name}: {MANY} callers get {share:.2f} of the images a second of {CPUS} callers"


@NETWORKS
@pytest.mark.parametrize("busy", [0, 1])  # 0 first: for a while after a busy process calls use one thread
def test_latency(benchmark, width, resolution, busy, seconds):
    """Median and 99th percentile of a call on two threads, alone and beside a process that keeps a processor busy.
    Eager is left out: beside a busy process one call takes a second.
    """
    benchmark.group = "latency"
    engines, missing = build(Case(width, resolution, threads=CPUS), ENGINES)
    with measure.threads(CPUS), torch.no_grad(), busy_process() if busy else contextlib.nullcontext():
        times = measure.interleaved(engines, seconds=seconds, burst=10, minimum=10 if seconds < 0.5 else CALLS)
        benchmark.pedantic(engines[LIVE], rounds=3)
    percentiles = {name: quantiles(values, n=100) for name, values in times.items()}
    benchmark.extra_info.update(
        width=width,
        resolution=resolution,
        threads=CPUS,
        busy=busy,
        missing=missing,
        milliseconds={name: 1e3 * values[49] for name, values in percentiles.items()},
        p99={name: 1e3 * values[98] for name, values in percentiles.items()},
    )
