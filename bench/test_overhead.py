"""The cost of a call of the fused network besides its kernels, 1.0 at 224x224, batch 1 in fp32, one thread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from engines import FROZEN, LIVE, Case, frozen, network
from recording import multiply_adds, record

from mnv2_fused._core.run import execute
from mnv2_fused.models.fused import NETWORK


def _microseconds(function: Callable[[], object], before: Callable[[], object] = lambda: None) -> float:
    """Median of 200 calls of `function`, each right after one of `before`."""
    times = []
    for _ in range(200):
        before()
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return 1e6 * statistics.median(times)


def test_overhead(benchmark, seconds):
    """Two figures. check: the check that no weight has changed, after a forward that has evicted its data from the
    caches. call: everything else between the call and the first kernel, measured as a call on no images minus check.
    """
    benchmark.group = "overhead"
    model, x = network(fused=True), Case().images_channels_last()
    with torch.no_grad():
        model(x)
        reading = model._cache.readings[None]

        def check() -> bool:
            return reading.guard.same.holds() and reading.packed.holds()

        def operator() -> torch.Tensor:
            return execute(NETWORK, x, reading.arguments, reading.packed.data)

        engines = {LIVE: lambda: model(x), "operator alone": operator}
        record(benchmark, engines, macs=multiply_adds(network(), x), threads=1, seconds=seconds)
        microseconds = {
            "check": _microseconds(check, before=operator),
            "check in the caches": _microseconds(check),
            "call": _microseconds(lambda: model(x[:0])) - _microseconds(check),
        }
    forward = 1e3 * benchmark.extra_info["milliseconds"][LIVE]
    benchmark.extra_info.update(
        microseconds=microseconds, share={part: t / forward for part, t in microseconds.items()}
    )


def test_graphs(benchmark, seconds, tmp_path):
    """The network eager, and in a graph: under torch.compile, exported, and in a package of AOTInductor."""
    benchmark.group = "graphs"
    model, x = network(fused=True), Case().images_channels_last()
    with torch.no_grad():
        program, path = torch.export.export(model, (x,)), str(tmp_path / "model.pt2")
        still = frozen()
        graphs = {
            LIVE: model,
            FROZEN: still,
            "torch.compile": torch.compile(model, fullgraph=True),
            "torch.compile, frozen": torch.compile(still, fullgraph=True),
            "exported": program.module(),
            "AOTInductor": torch._inductor.aoti_load_package(
                torch._inductor.aoti_compile_and_package(program, package_path=path)
            ),
        }
        engines = {name: (lambda g=graph: g(x)) for name, graph in graphs.items()}
        for call in engines.values():
            call()
        record(benchmark, engines, macs=multiply_adds(network(), x), threads=1, seconds=seconds)
