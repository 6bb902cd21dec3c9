"""Each of the 17 blocks alone, batch 1 at 224x224 in fp32, one thread: fused against plain PyTorch."""

from __future__ import annotations

import pytest
import torch
from recording import images, multiply_adds, record


@pytest.mark.parametrize("block", range(1, 18))
def test_block(benchmark, fused, plain, block, seconds):
    benchmark.group = "blocks"
    with torch.no_grad():
        x = plain.features[:block](images(1))
    engines = {
        "fused": lambda: fused.features[block](x),
        "eager channels_last": lambda: plain.features[block](x),
    }
    benchmark.extra_info.update(block=block, shape=list(x.shape))
    macs = multiply_adds(plain.features[block], x)
    record(benchmark, engines, macs=macs, threads=1, seconds=seconds / 4)
