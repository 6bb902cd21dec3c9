"""Training, 1.0 at 224x224 in fp32 on two threads: a step, a step of fine-tuning, and the forward pass of either."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
from engines import Case, network
from recording import multiply_adds, record
from training_engines import ALL, COMPILED, FUSED, PLAIN, build, memory_kept

from mnv2_fused import measure

THREADS = min(2, measure.usable_cpus())


def _record(
    benchmark, group: str, batch: int, names: Sequence[str], seconds: float, quick: bool, *, passes: int, frozen=False
) -> None:
    """`passes` over the network, of a forward's multiply-adds each: 3 are a step, 1 is the forward pass alone."""
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
        # What is in the caches matters little where a call goes through gigabytes.
        burst=1 if quick else 2,
        minimum=1 if quick else 5,
    )


@pytest.fixture(scope="module", autouse=True)
def kept() -> Iterator[None]:
    with memory_kept():
        yield


def test_training_step(benchmark, training_batch, seconds, quick, compile_training):
    names = (*ALL, COMPILED) if compile_training else ALL
    _record(benchmark, "training step", training_batch, names, seconds, quick, passes=3)


def test_training_with_frozen_batch_norm(benchmark, training_batch, seconds, quick, compile_training):
    names = (*FUSED, PLAIN, COMPILED) if compile_training else (*FUSED, PLAIN)
    _record(benchmark, "training frozen", training_batch, names, seconds, quick, passes=3, frozen=True)


def test_training_forward(benchmark, training_batch, seconds, quick):
    with torch.no_grad():
        _record(benchmark, "training forward", training_batch, (*FUSED, PLAIN), seconds, quick, passes=1)
