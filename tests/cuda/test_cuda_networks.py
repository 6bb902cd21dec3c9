"""Whole networks by the CUDA kernels on the host, against the specification in float64."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import pytest
import torch
from oracle import assert_close
from test_cuda_ends import image, plain_tf32_head, plain_tf32_stem
from test_cuda_kernels import (
    DTYPES,
    H200,
    SCHEDULES,
    TF32,
    Weights,
    integers,
    plain_tf32_block,
    storage,
)
from test_kernels import block_weights, cast
from torch import Tensor

from mnv2_fused import reference
from mnv2_fused._core.geometry import BlockShape, DenseShape, HeadShape, same_padding


class Unit(NamedTuple):
    """A block; `expansion` 1: without an expansion."""

    expansion: int
    c_out: int
    stride: int = 1
    kernel: int = 3
    dilation: int = 1


class Network(NamedTuple):
    c_stem: int
    blocks: list[Unit]
    c_last: int
    classes: int
    stem_kernel: int = 3
    stem_stride: int = 2


NETWORKS = {
    "joined": Network(32, [Unit(1, 16), Unit(6, 24, 2), Unit(8, 24), Unit(8, 40, 2)], 160, 100),
    "joined, with a stride": Network(40, [Unit(1, 24, 2), Unit(4, 33)], 70, 129),
    "first block expands": Network(16, [Unit(3, 16), Unit(6, 24, 2), Unit(8, 24)], 130, 64),
    "first block has a shortcut": Network(24, [Unit(1, 24), Unit(4, 17, 2)], 65, 100),
    "other filters": Network(9, [Unit(1, 11, 1, 5), Unit(5, 20, 1, 3, 2), Unit(3, 20, 2, 5, 2)], 48, 80, 5, 1),
    "no blocks": Network(32, [], 96, 100),
}  # fmt: skip
ONE, SOME = ((n, *H200[1:]) for n in (1, 8))  # multiprocessors: hidden channels are split if there are some


def check_network(
    emulator,
    network: Network,
    x: Tensor,
    dtype: torch.dtype | str,
    *,
    same: bool = False,
    device: tuple[int, ...] = SOME,
    schedules: tuple[int, ...] = (8,),
) -> tuple[bool, int, int]:
    """Every schedule gives the same bits and is right. Returns whether the stem is one with the first block, and the
    least and the most splits of a block's hidden channels."""
    x = x.to(storage(dtype))

    def padding(size: tuple[int, int], kernel: int, stride: int, dilation: int = 1) -> tuple[int, ...]:
        return same_padding(*size, kernel, stride, dilation) if same else ((kernel - 1) // 2 * dilation,) * 4

    c, size, kernel, stride = network.c_stem, tuple(x.shape[2:]), network.stem_kernel, network.stem_stride
    bounds = [(0.0, 6.0), *((-0.5 - i, 4.0 + i) for i in range(len(network.blocks))), (0.0, 3.0)]
    stem = cast([torch.randn(c, x.shape[1], kernel, kernel) / 3, torch.randn(c)], x.dtype)
    stem_options = dict(stride=stride, padding=padding(size, kernel, stride), activation=bounds[0])
    lists = [DenseShape(x.shape[1], c, kernel, stride, None if same else stem_options["padding"]).fields()]
    size = reference.dense(x[:1], *stem, **stem_options).shape[2:]
    blocks, given, fields = [], list(stem), []
    for unit, activation in zip(network.blocks, bounds[1:], strict=False):
        pads = padding(size, unit.kernel, unit.stride, unit.dilation)
        options = dict(stride=unit.stride, dilation=unit.dilation, padding=pads, activation=activation)
        options["residual"] = unit.stride == 1 and c == unit.c_out
        weights = cast(block_weights(c, c * unit.expansion, unit.c_out, unit.kernel, unit.expansion > 1), x.dtype)
        weights[4] = weights[4] / 2
        shape = BlockShape(
            c, c * unit.expansion, unit.c_out, unit.kernel, unit.stride, unit.dilation, None if same else pads,
            unit.expansion > 1, options["residual"],
        )  # fmt: skip
        fields += shape.fields()
        blocks.append((weights, options))
        given += weights
        c, size = unit.c_out, tuple(-(-s // unit.stride) for s in size)
    head = [torch.randn(network.c_last, c, 1, 1) * 2 / c**0.5, torch.randn(network.c_last)]
    head += [torch.randn(network.classes, network.c_last) / network.c_last**0.5, torch.randn(network.classes)]
    head = cast(head, x.dtype)
    lists += [fields, HeadShape(c, network.c_last, network.classes).fields(), sum(bounds, ())]

    def run(run_stem, run_block, run_head, dtype):
        y = run_stem(x.to(dtype), *cast(stem, dtype), **stem_options)
        for weights, options in blocks:
            y = run_block(y, *cast(weights, dtype), **options)
        return run_head(y, *cast(head, dtype), activation=bounds[-1])

    plainly = reference.dense, reference.inverted_residual, reference.head
    exact = run(*plainly, torch.float64)
    plain = run(*((plain_tf32_stem, plain_tf32_block, plain_tf32_head) if dtype == TF32 else plainly), x.dtype)
    pointers, planned, results = Weights([*given, *head]), torch.zeros(3).long(), []
    for schedule in schedules:
        results.append(torch.empty_like(plain))
        emulator(
            "emulate_network", schedule, integers(device), integers(x.permute(0, 2, 3, 1).shape), integers(x.stride()),
            integers(itertools.chain(*lists[:3])), integers(map(len, lists)),
            torch.tensor(lists[3], dtype=torch.float64), DTYPES.index(dtype), pointers.pointers, x, results[-1],
            planned,
        )  # fmt: skip
    assert_close(results[0], plain, exact)
    for other in results[1:]:
        assert torch.equal(other, results[0])
    joined, least, most = planned.tolist()
    return bool(joined), least, most


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("same", [False, True], ids=["PyTorch", "TensorFlow"])
@pytest.mark.parametrize("name", NETWORKS)
def test_network(cuda_emulator, name, same, dtype):
    layouts, i = ["NCHW", "NHWC", "view"], same + DTYPES.index(dtype)
    for device, n in ((SOME, 1), (ONE, 3)):
        x = image(n, 3, 14, 13, layouts[(i + n) % 3])
        joined, _, most = check_network(
            cuda_emulator, NETWORKS[name], x, dtype, same=same, device=device, schedules=((i + 3 * n) % 12,)
        )
        assert joined == ("joined" in name or name == "other filters")
        assert most <= 1 if device == ONE else most > 1 or name not in ("joined", "first block expands")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["NCHW", "NHWC", "view"])
def test_layouts_of_a_network(cuda_emulator, layout, dtype):
    for name in ("joined", "first block expands"):
        check_network(cuda_emulator, NETWORKS[name], image(2, 3, 9, 11, layout), dtype, same=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_every_schedule_of_a_network(cuda_emulator, dtype):
    """Blocks whose hidden channels are split, and some that are not; several tiles of an image, and several images."""
    for name in ("joined", "first block expands"):
        x = image(2, 3, 15, 12, "NHWC")
        _, least, most = check_network(cuda_emulator, NETWORKS[name], x, dtype, schedules=SCHEDULES)
        assert least == 1 and most > 1
