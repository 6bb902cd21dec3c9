"""Every way through the CUDA kernels once, on small inputs: for ``compute-sanitizer python bench/sanitize_cuda.py``.

With PYTORCH_NO_CUDA_MEMORY_CACHING=1 a tensor's end is the end of its memory. Results are not looked at:
tests/test_cuda.py does that.
"""

from __future__ import annotations

import itertools
import time

import torch

import mnv2_fused
from mnv2_fused import ops

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
]


def run_block(n, h, w, c_in, c_hidden, c_out, kernel, stride, dilation, dtype) -> None:
    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device="cuda", dtype=dtype)

    hidden = c_hidden or c_in
    expand = (randn(hidden, c_in, 1, 1), randn(hidden)) if c_hidden else (None, None)
    weights = (*expand, randn(hidden, 1, kernel, kernel), randn(hidden), randn(c_out, hidden, 1, 1), randn(c_out))
    x = randn(n, c_in, h, w).contiguous(memory_format=torch.channels_last)
    residual = stride == 1 and c_in == c_out
    ops.run_block(x, ops.pack_block(*weights), stride=stride, dilation=dilation, residual=residual)


@torch.no_grad()
def main() -> None:
    began = time.perf_counter()
    torch.manual_seed(0)
    for dtype, tf32 in (
        (torch.float16, False),
        (torch.bfloat16, False),
        (torch.float32, False),
        (torch.float32, True),
    ):
        torch.backends.cudnn.allow_tf32 = tf32
        for block in BLOCKS:
            run_block(*block, dtype)
        model = mnv2_fused.MobileNetV2(10, 1.0, SMALL).eval().to("cuda", dtype)
        for batch, size in itertools.product((1, 3), ((33, 47), (64, 64))):
            model(torch.randn(batch, 3, *size, device="cuda", dtype=dtype))
        torch.cuda.synchronize()
        print(f"{dtype}, TF32 {tf32}: done after {time.perf_counter() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
