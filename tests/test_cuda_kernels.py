"""The CUDA kernels themselves, run on the host by tests/cuda_emulator, against the specification in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_close
from test_kernels import block_weights, cast, network_blocks
from torch import Tensor

from mnv2_fused import reference

TF32 = "tf32"
DTYPES = [torch.float32, torch.bfloat16, torch.float16, TF32]  # as kernels.cpp numbers them
# Multiprocessors, shared memory of a thread block and of all: with one, tiles are as large as fits; with many they are
# small and hidden channels are split.
ONE, H200, A100 = (1, 232448, 233472), (132, 232448, 233472), (108, 166912, 167936)
CHANNELS_LAST = torch.channels_last
RELU6 = (0.0, 6.0)


def storage(dtype: torch.dtype | str) -> torch.dtype:
    return torch.float32 if dtype == TF32 else dtype


def integers(values) -> Tensor:
    return torch.tensor([int(v) for v in values])


class Weights:
    """fp32 weights as an array of pointers."""

    def __init__(self, tensors: list[Tensor | None]) -> None:
        self.tensors = [None if t is None else t.float().contiguous() for t in tensors]
        self.pointers = torch.tensor([0 if t is None else t.data_ptr() for t in self.tensors])


def to_tf32(x: Tensor) -> Tensor:
    bits = x.float().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


def plain_tf32(x, w1, b1, w2, b2, w3, b3, *, stride, dilation, padding, residual, activation):
    """The block in float64 but for what tf32 rounds: the operands of both 1x1 convolutions."""
    y = x.double()
    if w1 is not None:
        y = F.conv2d(to_tf32(x).double(), to_tf32(w1).double(), b1.double()).clamp(*activation)
    top, left, bottom, right = padding
    y = F.conv2d(
        F.pad(y, (left, right, top, bottom)), w2.double(), b2.double(), stride, dilation=dilation, groups=w2.shape[0]
    )
    y = F.conv2d(to_tf32(y.clamp(*activation)).double(), to_tf32(w3).double(), b3.double())
    return (y + x.double() if residual else y).float()


def check_block(
    emulator,
    x: Tensor,
    weights: list[Tensor | None],
    dtype: torch.dtype | str = torch.float16,
    *,
    stride: int = 1,
    dilation: int = 1,
    padding: tuple[int, ...] | None = None,
    activation: tuple[float, float] = RELU6,
    device: tuple[int, ...] = ONE,
    schedules: tuple[int, ...] = (1, 8),
) -> list[int]:
    """Every schedule gives the same bits and is right. Returns what was planned: tile height, width and images, threads,
    splits of the hidden channels, parts of the output channels, tiles of eight of them."""
    x, weights = x.to(storage(dtype)), cast(weights, storage(dtype))
    kernel, (c_out, c_hidden) = weights[2].shape[-1], weights[4].shape[:2]
    if padding is None:
        padding = ((kernel - 1) // 2 * dilation,) * 4
    keeps = padding[0] + padding[2] == padding[1] + padding[3] == (kernel - 1) * dilation
    residual = stride == 1 and keeps and x.shape[1] == c_out
    n, c_in, h, w = x.shape
    shape = (n, h, w, c_in, c_hidden, c_out, kernel, stride, dilation, *padding, weights[0] is not None, residual)
    options = dict(stride=stride, dilation=dilation, padding=padding, residual=residual, activation=activation)
    exact = reference.inverted_residual(x.double(), *cast(weights, torch.float64), **options)
    given, pixels, planned = Weights(weights), x.contiguous(memory_format=CHANNELS_LAST), torch.zeros(7).long()
    results = []
    for schedule in schedules:
        y = torch.empty_like(exact, dtype=x.dtype, memory_format=CHANNELS_LAST)
        emulator(
            "emulate_block", schedule, integers(device), integers(shape), *activation, DTYPES.index(dtype),
            given.pointers, pixels, y, planned,
        )  # fmt: skip
        results.append(y)
    plain = (plain_tf32 if dtype == TF32 else reference.inverted_residual)(x, *weights, **options)
    assert_close(results[0], plain, exact)
    for other in results[1:]:
        assert torch.equal(other.nan_to_num(), results[0].nan_to_num())
    return planned.tolist()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", network_blocks(), ids=str)
def test_blocks_of_the_network(cuda_emulator, shape, dtype):
    h, c_in, c_hidden, c_out, stride, has_expand = shape
    h = min(h, 12)
    check_block(
        cuda_emulator,
        torch.randn(2, c_in, h, h),
        block_weights(c_in, c_hidden, c_out, expand=has_expand),
        dtype,
        stride=stride,
        device=H200,
        schedules=(hash(shape) % 12,),
    )
