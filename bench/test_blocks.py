"""Each of the 17 blocks alone, 1.0 at 224x224, batch 1 in fp32, one thread."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from engines import PLAIN, Case, network
from recording import multiply_adds, record

from mnv2_fused import _C
from mnv2_fused.tools import rates


@pytest.mark.parametrize("block", range(1, 18))
def test_block(benchmark, block, seconds):
    """The fused operator against the block in plain PyTorch."""
    benchmark.group = "blocks"
    plain = network(memory_format=torch.channels_last).features
    with torch.no_grad():
        x = plain[:block](Case().images_channels_last())
        engines = {
            "fused": rates.operator(network(fused=True).features[block], x),
            PLAIN: lambda: plain[block](x),
        }
        torch.testing.assert_close(*(engine() for engine in engines.values()), rtol=1e-4, atol=1e-4)
    benchmark.extra_info.update(block=block, shape=list(x.shape))
    record(benchmark, engines, macs=multiply_adds(plain[block], x), threads=1, seconds=seconds / 4, burst=20)


@pytest.mark.skipif("avx512" not in _C.cpu_supported_isas(), reason="without AVX-512 the blocks above ran on AVX2")
def test_blocks_with_avx2(benchmark):
    """The figures of `plan --measure` for the AVX2 kernels."""
    benchmark.group = "blocks avx2"
    command = [sys.executable, "-m", "mnv2_fused", "plan", "--measure", "--threads", "1", "--json", "-"]
    environment = {**os.environ, "MNV2_FUSED_CPU_ISA": "avx2"}

    def measured() -> dict:
        run = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True)
        return json.loads(run.stdout)

    content = benchmark.pedantic(measured, rounds=1)
    benchmark.extra_info.update(
        isa=content["machine"]["isa"],
        threads=1,
        share_of_peak=[block["share_of_peak"] for block in content["blocks"]],
        total=content["total"],
    )
