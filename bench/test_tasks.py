"""Detection and segmentation in fp32: SSDLite at 320 and DeepLabv3 at 513 (output stride 16), and their training."""

from __future__ import annotations

import pytest
import torch
from recording import multiply_adds, record
from task_engines import DEEPLAB, FUSED, MASK, PLAIN, SSDLITE, Trainee, build, images, network
from training_engines import memory_kept, saved_bytes

from mnv2_fused.tools import measure

BOTH = pytest.mark.parametrize("name", [SSDLITE, DEEPLAB])


@BOTH
@pytest.mark.parametrize("threads", [n for n in (1, 2) if n <= measure.usable_cpus()])
def test_task(benchmark, name, threads, seconds):
    benchmark.group = "tasks"
    engines, missing = build(name, threads)
    benchmark.extra_info.update(network=name, batch=1, missing=missing)
    record(benchmark, engines, macs=multiply_adds(network(name, False), images(name)), threads=threads, seconds=seconds)


@BOTH
def test_task_memory(benchmark, name):
    """Peak activation memory of one image by PyTorch's allocator."""
    benchmark.group = "tasks memory"
    engines, _ = build(name, 1)
    calls = {engine: engines[engine] for engine in (FUSED, PLAIN)}
    if name == DEEPLAB:
        x = images(name).contiguous(memory_format=torch.channels_last)
        calls[MASK] = lambda: network(name, True).model.predict_mask(x)
    with measure.threads(1), torch.no_grad():
        peaks = {engine: measure.peak_memory(call) for engine, call in calls.items()}
        benchmark.pedantic(calls[FUSED], rounds=3)
    share = {engine: peak / peaks[PLAIN] for engine, peak in peaks.items()}
    benchmark.extra_info.update(network=name, batch=1, threads=1, bytes=peaks, share=share)


@BOTH
def test_task_training(benchmark, name, seconds, quick):
    """A step in one process that keeps freed memory, and the bytes that a forward saves for the backward."""
    benchmark.group = "tasks training"
    batch, threads = (2 if quick else 8), min(2, measure.usable_cpus())
    trainees = {engine: Trainee(name, engine == FUSED, batch) for engine in (FUSED, PLAIN)}
    with measure.threads(threads), memory_kept():
        saved = {engine: saved_bytes(trainee) for engine, trainee in trainees.items()}
        benchmark.extra_info.update(network=name, batch=batch, missing={}, saved=saved)
        record(
            benchmark,
            {engine: trainee.step for engine, trainee in trainees.items()},
            macs=3 * batch * multiply_adds(network(name, False), images(name)),
            threads=threads,
            seconds=seconds,
            gradients=True,
            burst=1,
            minimum=1 if quick else 5,
        )
