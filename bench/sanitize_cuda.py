"""Runs every path through the CUDA kernels once, on small inputs: ``compute-sanitizer python bench/sanitize_cuda.py``.

Arguments choose arithmetics: float16, bfloat16, float32, tf32; without any, all. With PYTORCH_NO_CUDA_MEMORY_CACHING=1
each tensor has an allocation of its own, so that overruns are seen. Results are not checked here;
tests/cuda/test_gpu_operators.py checks them.
"""

from __future__ import annotations

import itertools
import sys
import time
from functools import partial

import torch

import mnv2_fused
from mnv2_fused import functional as ops
from mnv2_fused._core import operators
from mnv2_fused._core.geometry import BlockShape, DenseShape
from mnv2_fused._core.specs import IMAGES, BlockSpec, ConvNorm, DenseSpec, NetworkSpec, Step

ARITHMETICS = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "tf32": torch.float32,
}
RELU6 = (0.0, 6.0)
SMALL = [[1, 16, 1, 1], [6, 24, 2, 2], [6, 32, 1, 2]]
# n, h, w, c_in, c_hidden (None: no expansion), c_out, kernel, stride, dilation
BLOCKS = [
    (2, 18, 21, 32, None, 16, 3, 1, 1),
    (1, 20, 20, 16, 96, 24, 3, 2, 1),
    (1, 17, 30, 24, 144, 24, 3, 1, 1),
    (2, 14, 14, 64, 384, 64, 3, 1, 1),
    (5, 7, 7, 160, 960, 160, 3, 1, 1),
    (3, 7, 7, 160, 960, 320, 3, 1, 1),
    (2, 9, 10, 7, 33, 5, 3, 2, 1),
    (1, 12, 12, 16, 48, 16, 5, 1, 2),
    (1, 1, 1, 8, 16, 8, 3, 1, 1),
    (1, 5, 6, 700, 1100, 24, 3, 1, 1),  # in float32 shared memory has no room for the weights of two chunks
]
# n, h, w, c_in, c_out, kernel, stride. The windows of the last one do not fit into shared memory together.
STEMS = [(2, 33, 47, 3, 32, 3, 2), (1, 20, 23, 5, 9, 5, 1), (1, 12, 11, 64, 40, 7, 2)]
# n, h, w, c_in, c_last, classes. The pixels of the last one do not fit into shared memory together.
HEADS = [(3, 7, 7, 320, 1280, 1000), (2, 9, 8, 7, 33, 5), (1, 3, 3, 1900, 64, 10)]


def run_stem(n, h, w, c_in, c_out, kernel, stride, dtype) -> None:
    randn = partial(torch.randn, device="cuda", dtype=dtype)
    packed = ops.pack_dense(randn(c_out, c_in, kernel, kernel), randn(c_out))
    for x in (randn(n, c_in, h, w), randn(n, h, w, c_in).permute(0, 3, 1, 2), randn(n, c_in, h, 2 * w)[..., ::2]):
        ops.run_dense(x, packed, stride=stride)
    ops.run_dense(x, packed, stride=stride, image_bias=torch.randn(n, c_out, device="cuda"))


def run_head(n, h, w, c_in, c_last, classes, dtype) -> None:
    randn = partial(torch.randn, device="cuda", dtype=dtype)
    packed = ops.pack_head(randn(c_last, c_in, 1, 1), randn(c_last), randn(classes, c_last), randn(classes))
    ops.run_head(randn(n, c_in, h, w), packed)


def run_block(n, h, w, c_in, c_hidden, c_out, kernel, stride, dilation, dtype) -> None:
    randn = partial(torch.randn, device="cuda", dtype=dtype)
    hidden = c_hidden or c_in
    expand = (randn(hidden, c_in, 1, 1), randn(hidden)) if c_hidden else (None, None)
    weights = (*expand, randn(hidden, 1, kernel, kernel), randn(hidden), randn(c_out, hidden, 1, 1), randn(c_out))
    x = randn(n, c_in, h, w).contiguous(memory_format=torch.channels_last)
    for output in (None, (0.0, 6.0)):
        ops.inverted_residual(x, *weights, stride=stride, dilation=dilation, project_activation=output)


def run_branches(dtype) -> None:
    """A network whose maps are read by several units, and which has several outputs."""

    def conv(c_out: int, c_in: int, kernel: int = 1) -> ConvNorm:
        weight = torch.randn(c_out, c_in, kernel, kernel, device="cuda", dtype=dtype)
        return ConvNorm(weight, weight[:, 0, 0, 0].clone(), None, None, None, None, 0.0)

    def dense(c_in: int, c_out: int, kernel: int, stride: int) -> DenseSpec:
        shape = DenseShape(c_in, c_out, kernel, stride, (kernel // 2,) * 4)
        return DenseSpec(conv(c_out, c_in, kernel), shape, RELU6, False, {})

    def block(c_in: int, c_out: int, stride: int) -> BlockSpec:
        shape = BlockShape(c_in, 4 * c_in, c_out, 3, stride, 1, (1,) * 4, True, stride == 1 and c_in == c_out)
        convs = conv(4 * c_in, c_in), conv(4 * c_in, 1, 3), conv(c_out, 4 * c_in)
        return BlockSpec(*convs, shape, RELU6, RELU6, False, {})

    units = dense(3, 16, 3, 2), block(16, 16, 1), block(16, 24, 2), dense(24, 40, 1, 1), block(16, 12, 1)
    sources, taps = (IMAGES, 0, 1, 2, 1), (False, False, True, True, True)
    tensors, eps, arguments = NetworkSpec(tuple(map(Step, units, sources, taps)), {}).flat()
    packed = operators.NETWORK.pack(tensors, eps, dtype)
    operators.NETWORK.run(torch.randn(2, 3, 33, 47, device="cuda", dtype=dtype), packed, *arguments)


@torch.no_grad()
def main(arithmetics: list[str]) -> None:
    began = time.perf_counter()
    torch.manual_seed(0)
    for arithmetic in arithmetics or ARITHMETICS:
        dtype = ARITHMETICS[arithmetic]
        torch.backends.cudnn.allow_tf32 = arithmetic == "tf32"
        for block in BLOCKS:
            run_block(*block, dtype)
        for stem in STEMS:
            run_stem(*stem, dtype)
        for head in HEADS:
            run_head(*head, dtype)
        run_branches(dtype)
        model = mnv2_fused.MobileNetV2(10, 1.0, SMALL).eval().to("cuda", dtype)
        for batch, size in itertools.product((1, 3), ((33, 47), (64, 64))):
            model(torch.randn(batch, 3, *size, device="cuda", dtype=dtype))
        torch.cuda.synchronize()
        print(f"{arithmetic}: done after {time.perf_counter() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
