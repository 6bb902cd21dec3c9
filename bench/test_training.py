"""Training, 1.0 at 224x224 in fp32 on two threads: a step, a step of fine-tuning, and the forward pass of either."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from statistics import median

import alone
import pytest
import torch
from engines import Case, network
from recording import multiply_adds, record
from training_engines import ALL, CHECKPOINTED, COMPILED, FUSED, PLAIN, build, memory_kept

from mnv2_fused import _C
from mnv2_fused.tools import measure

THREADS = min(2, measure.usable_cpus())


def _record(
    benchmark, group: str, batch: int, names: Sequence[str], seconds: float, quick: bool, *, passes: int, frozen=False
) -> None:
    """Measures `passes` over the network, each with a forward's multiply-adds: 3 for a step, 1 for a forward alone."""
    benchmark.group = group
    case = Case(batch=batch, threads=THREADS)
    training = passes == 3
    trainees, missing = build(case, names, frozen=frozen, gradients=training)
    if COMPILED not in names and training:
        missing[f"{COMPILED}, training"] = "only with --compile-training"
    benchmark.extra_info.update(batch=batch, missing=missing)
    record(
        benchmark,
        {name: trainee.step if training else trainee.forward for name, trainee in trainees.items()},
        macs=passes * multiply_adds(network(), case.images_channels_last()),
        threads=case.threads,
        seconds=seconds,
        gradients=training,
        # Short bursts: a call goes through gigabytes, so warm caches hardly matter.
        burst=1 if quick else 2,
        minimum=1 if quick else 5,
    )


@pytest.fixture(scope="module")
def kept() -> Iterator[None]:
    with memory_kept():
        yield


@pytest.mark.parametrize("kind", ["step", "frozen", "forward"])
def test_training_alone(benchmark, kind, training_batch, quick):
    """Every engine in processes of its own; the engines take turns."""
    benchmark.group = f"training {kind} alone"
    batch, steps, turns = (4, 1, 1) if quick else (training_batch, 4, 2)
    names = [*FUSED, PLAIN, CHECKPOINTED] if kind == "step" else [*FUSED, PLAIN]
    seconds: dict[str, list[float]] = {name: [] for name in names}

    def measure_one(name: str) -> None:
        command = [sys.executable, alone.__file__, kind, name, *map(str, (batch, THREADS, steps))]
        output = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout
        seconds[name] += map(float, output.split())

    peak = _C.cpu_fma_peak() * THREADS
    for _ in range(turns):
        for name in names:
            measure_one(name)
    benchmark.pedantic(measure_one, [names[0]], rounds=1)
    medians = {name: median(times) for name, times in seconds.items()}
    macs = (1 if kind == "forward" else 3) * multiply_adds(network(), Case(batch=batch).images_channels_last())
    benchmark.extra_info.update(
        batch=batch,
        threads=THREADS,
        milliseconds={name: 1e3 * time for name, time in medians.items()},
        limit_milliseconds=1e3 * macs / peak,
    )


@pytest.mark.usefixtures("kept")
def test_training_step(benchmark, step_batch, seconds, quick, compile_training):
    names = (*ALL, COMPILED) if compile_training else ALL
    _record(benchmark, "training step", step_batch, names, seconds, quick, passes=3)


@pytest.mark.usefixtures("kept")
def test_training_with_frozen_batch_norm(benchmark, training_batch, seconds, quick, compile_training):
    names = (*FUSED, PLAIN, COMPILED) if compile_training else (*FUSED, PLAIN)
    _record(benchmark, "training frozen", training_batch, names, seconds, quick, passes=3, frozen=True)


@pytest.mark.usefixtures("kept")
def test_training_forward(benchmark, training_batch, seconds, quick):
    with torch.no_grad():
        _record(benchmark, "training forward", training_batch, (*FUSED, PLAIN), seconds, quick, passes=1)
