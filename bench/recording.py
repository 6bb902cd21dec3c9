"""How a benchmark measures its engines, and the limit that it records beside the figures."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mnv2_fused import _C, measure

RESOLUTION = 224


def images(batch: int) -> Tensor:
    """(batch, 3, 224, 224) fp32, channels_last."""
    generator = torch.Generator().manual_seed(batch)
    x = torch.randn(batch, 3, RESOLUTION, RESOLUTION, generator=generator)
    return x.contiguous(memory_format=torch.channels_last)


def multiply_adds(model: nn.Module, x: Tensor) -> int:
    """Multiply-adds of one forward pass, as PyTorch counts them for the plain model."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    return counter.get_total_flops() // 2


def record(benchmark, engines: dict[str, Callable[[], object]], *, macs: int, threads: int, seconds: float) -> None:
    """Measures all engines in turns, then the first once more as pytest-benchmark's own row.

    extra_info gets every engine's median, its ratio to the first one's, and the share that the first reaches of the
    FMA peak, which is measured before and after.
    """
    with measure.threads(threads), torch.no_grad():
        peak = _C.cpu_fma_peak()
        medians = measure.medians(measure.interleaved(engines, seconds=seconds))
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
