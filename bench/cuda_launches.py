"""Times each launch of the network on a GPU by torch's profiler, beside the predictions of `plan --device`.

A launch may begin while the one before it ends, so its cost is its end minus the end of the one before.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mnv2_fused.cli.gpu_plan import gpu_plan

KERNEL = "mnv2"  # in the name of each of our kernels


def profiled(call: Callable[[int], Tensor], inputs: int, calls: int = 20) -> list[dict]:
    """What the GPU did during `calls` calls, in its order: name, ts and dur in microseconds."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for i in range(calls):
            call(i % inputs)
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    device = [e for e in events if e.get("cat") in ("kernel", "gpu_memset", "gpu_memcpy")]
    return sorted(device, key=lambda e: e["ts"])


def costs(events: list[dict], launches: int) -> tuple[list[float], float]:
    """Microseconds of each of the network's launches, and of a whole call: medians over the calls."""
    ours = [e for e in events if KERNEL in e["name"]]
    if not ours or len(ours) % launches:
        raise RuntimeError(f"the profiler saw {len(ours)} kernels, which are no whole calls of {launches} launches")
    each: list[list[float]] = [[] for _ in range(launches)]
    whole = []
    for first in range(0, len(ours), launches):
        call = ours[first : first + launches]
        end = call[0]["ts"]
        for times, event in zip(each, call, strict=True):
            times.append(event["ts"] + event["dur"] - end)
            end = event["ts"] + event["dur"]
        whole.append(end - call[0]["ts"])
    return [statistics.median(times) for times in each], statistics.median(whole)


def rows_of(call: Callable[[int], Tensor], inputs: Sequence[Tensor], dtype: str, variant: str) -> list[dict]:
    """A row for each launch. `call` replays a captured graph of the fused network."""
    batch = inputs[0].shape[0]
    planned = gpu_plan(1.0, 224, batch, dtype, "sm_90")["launches"]
    measured, whole = costs(profiled(call, len(inputs)), len(planned))
    base = {"variant": variant, "dtype": dtype, "batch": batch}
    rows = [
        {
            **base,
            "launch": launch["name"],
            "predicted_us": launch["predicted_us"],
            "us": us,
            "threads": launch["threads"],
        }
        for launch, us in zip(planned, measured, strict=True)
    ]
    predicted = sum(launch["predicted_us"] for launch in planned)
    return [*rows, {**base, "launch": "all", "predicted_us": predicted, "us": whole}]
