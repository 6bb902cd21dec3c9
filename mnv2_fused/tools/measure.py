"""Measures latency and peak activation memory, the same way for `compare` and for the benchmarks."""

from __future__ import annotations

import contextlib
import datetime
import itertools
import json
import os
import platform
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import torch

from mnv2_fused import _C


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Runs the body with `torch.set_num_threads(count)`."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def settle() -> None:
    """Waits until all other threads of this process rest, 0.2 s at most.

    A thread pool keeps its threads spinning for the next call, OpenMP for 10 ms and ONNX Runtime for 50 ms. They take
    a core from whatever runs next: on two cores OpenVINO took 8 ms instead of 5. This thread does not sleep meanwhile,
    so that its core keeps its clock.
    """

    def others() -> float:
        return time.process_time() - time.thread_time()

    for _ in range(20):
        before, end = others(), time.perf_counter() + 0.01  # the clock of other threads can step by 10 ms
        while time.perf_counter() < end:
            pass
        if others() - before < 0.001:
            return


def interleaved(
    functions: dict[str, Callable[[], object]],
    *,
    seconds: float = 1.0,
    minimum: int = 5,
    burst: int = 3,
    progress: Callable[[float], None] = lambda share: None,
) -> dict[str, list[float]]:
    """Seconds a call of every function. They take turns, so that a change of the machine's clock meets all of them.

    A turn waits until other threads rest and makes one call that is not timed, which brings the function's weights
    back into the caches. Then it times `burst` calls. Turns go on for about `seconds` a function and for at least
    `minimum` calls of each. `progress` gets the share that is done, 0 to 1.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    budget = seconds * len(functions)
    start = time.perf_counter()
    for turns in itertools.count(1):
        for name, function in functions.items():
            settle()
            function()
            for _ in range(burst):
                before = time.perf_counter()
                function()
                times[name].append(time.perf_counter() - before)
        elapsed = time.perf_counter() - start
        share = min(turns * burst / minimum, elapsed / budget)
        progress(min(1.0, share))
        if share >= 1.0:
            return times


def medians(times: dict[str, list[float]]) -> dict[str, float]:
    """The median of every function's times."""
    return {name: statistics.median(values) for name, values in times.items()}


def peak_memory(function: Callable[[], object]) -> int:
    """The most bytes that one call of `function` holds beyond what was allocated before it, its result included.

    torch.profiler records every allocation and release of PyTorch's CPU allocator, and the result is the highest
    running sum. The scratch arenas of this package's kernels, which live on between calls, are added in full. Buffers
    inside other libraries (oneDNN) do not count. Call `function` once before: what it caches is no activation.
    """
    # Otherwise the profiler writes two lines to stderr each time. It reads this when it first starts.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    from torch.profiler import ProfilerActivity, profile

    _C.reset_scratch_high_water()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = function()
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "trace.json")
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    del result
    steps = [event for event in events if event.get("name") == "[memory]" and event["args"].get("Device Type") == 0]
    steps.sort(key=lambda event: event["args"]["Ev Idx"])
    held = itertools.accumulate(event["args"]["Bytes"] for event in steps)
    return max(held, default=0) + _C.scratch_high_water()


def difference(got: torch.Tensor, expected: torch.Tensor) -> tuple[float, float]:
    """The largest absolute difference, and its ratio to the largest absolute value of `expected`.

    Both are NaN if one tensor has NaN. Raises ValueError if the shapes differ.
    """
    if got.shape != expected.shape:
        raise ValueError(f"difference: shapes differ: {tuple(got.shape)} and {tuple(expected.shape)}")
    if expected.numel() == 0:
        return 0.0, 0.0
    got, expected = got.double(), expected.double()
    largest = (got - expected).abs().max().item()
    scale = expected.abs().max().item()
    return largest, largest / scale if scale > 0 else (0.0 if largest == 0 else float("inf"))


def cpu_model() -> str:
    """The processor's name, from the system."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def usable_cpus() -> int:
    """Logical processors that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1


def version_of(package: str) -> str | None:
    """The installed version of `package`, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def environment() -> dict:
    """Date, machine, versions and command, for every stored measurement."""
    peers = {package: version_of(package) for package in ("ai-edge-litert", "onnxruntime", "openvino")}
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": {
            "cpu": cpu_model(),
            "cpus": usable_cpus(),
            "architecture": platform.machine(),
            "system": platform.platform(),
            "isa": _C.cpu_isa(),
        },
        "versions": {
            "mnv2_fused": _C.build_info()["version"],
            "torch": torch.__version__,
            "python": platform.python_version(),
            **{package: version for package, version in peers.items() if version is not None},
        },
        "command": _command(),
    }


def _command() -> str:
    program = Path(sys.argv[0])
    run = ["python", "-m", program.parent.name] if program.name == "__main__.py" else [program.name]
    return shlex.join([*run, *sys.argv[1:]])
