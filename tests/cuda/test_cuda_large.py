"""The CUDA kernels on the host, on maps of more than 2^31 values."""

from __future__ import annotations

import os

import pytest
import torch
from test_cuda_ends import check_head, check_joined, check_stem, image
from test_cuda_kernels import DTYPES, check_block, storage
from test_kernels import block_weights

SPARSE = pytest.mark.skipif(
    bool(os.environ.get("MNV2_FUSED_SANITIZE")), reason="the sanitizer keeps a note of every byte, also of those unused"
)


def images_before(values: int) -> int:
    """Images of so many values that hold more than 2^31 together, rounded up to a multiple of sixteen."""
    return ((1 << 31) // values // 16 + 1) * 16


@SPARSE
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("c_in", "c_hidden", "c_out", "splits"), [(32, 64, 32, 1), (32, 64, 32, 2), (31, 40, 7, 1), (40, 40, 40, 1)]
)
def test_a_block_beyond_32_bits(cuda_emulator, c_in, c_hidden, c_out, splits, dtype):
    """Runs only the last of so many images; even the smaller of both maps has more values than 32 bits count."""
    before = images_before(9 * 8 * min(c_in, c_out))
    weights = block_weights(c_in, c_hidden, c_out, expand=c_in != c_hidden)
    for tile in ((3, 4, 1, splits), (0, 0, 0, 0)):
        check_block(cuda_emulator, torch.randn(2, c_in, 9, 8), weights, dtype, tile=tile, before=before)


@SPARSE
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_stems_beyond_32_bits(cuda_emulator, layout, dtype):
    x, before = image(2, 3, 30, 31, layout), images_before(3 * 30 * 31)
    check_stem(cuda_emulator, x, 12, dtype, before=before)
    check_joined(cuda_emulator, x, 24, 12, dtype, tile=(5, 5, 1, 1), before=before)


def far_apart(dtype: torch.dtype | str) -> torch.Tensor:
    """An image whose channels lie further apart than 32 bits count."""
    n, c, h, w, far = 1, 3, 9, 14, (1 << 30) + 8
    x = torch.empty_strided((n, c, h, w), (c * far, far, w, 1), dtype=storage(dtype))
    return x.copy_(torch.randn(n, c, h, w))


@SPARSE
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_stems_of_values_that_are_far_apart(cuda_emulator, dtype):
    check_stem(cuda_emulator, far_apart(dtype), 12, dtype)
    check_joined(cuda_emulator, far_apart(dtype), 24, 12, dtype, tile=(3, 4, 1, 1))


@SPARSE
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_head_beyond_32_bits(cuda_emulator, dtype):
    check_head(cuda_emulator, 2, (3, 5), 17, 40, 33, dtype, before=images_before(33))
