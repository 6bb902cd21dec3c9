"""Peak activation memory of one forward pass, 1.0 at 224x224 in fp32."""

from __future__ import annotations

import pytest
import torch
from recording import images

from mnv2_fused import measure


@pytest.mark.parametrize("batch", [1, 32])
def test_peak_memory(benchmark, fused, plain, batch):
    benchmark.group = "memory"
    x = images(batch)
    with torch.no_grad():
        for model in (fused, plain):  # what they cache is no activation
            model(x)
        peaks = {
            "fused": measure.peak_memory(lambda: fused(x)),
            "eager channels_last": measure.peak_memory(lambda: plain(x)),
        }
        benchmark.extra_info.update(
            batch=batch,
            bytes=peaks,
            share={name: peak / peaks["eager channels_last"] for name, peak in peaks.items()},
        )
        benchmark.pedantic(lambda: fused(x), rounds=3)
