"""Whole networks by the CUDA kernels on the host, against the specification in float64."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from oracle import assert_close
from test_cuda_ends import image, plain_tf32_head, plain_tf32_stem
from test_cuda_kernels import (
    A100,
    DTYPES,
    H200,
    RELU6,
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
from mnv2_fused._core.geometry import NO_BOUNDS, BlockShape, DenseShape, HeadShape, same_padding

IMAGES = -1


class Dense(NamedTuple):
    """`source`: index of the unit that it reads, or IMAGES; None: the unit before, of the first one the images."""

    c_out: int
    kernel: int = 1
    stride: int = 1
    source: int | None = None
    tap: bool = False


class Block(NamedTuple):
    """`expansion` 1: without an expansion."""

    expansion: int
    c_out: int
    stride: int = 1
    kernel: int = 3
    dilation: int = 1
    source: int | None = None
    tap: bool = False
    output: tuple[float, float] = NO_BOUNDS


class Head(NamedTuple):
    c_last: int
    classes: int
    source: int | None = None


Network = list[Dense | Block | Head]

STEM = Dense(16, 3, 2)
NETWORKS = {
    "joined": [Dense(32, 3, 2), Block(1, 16), Block(6, 24, 2), Block(8, 24), Block(8, 40, 2), Head(160, 100)],
    "joined, with a stride": [Dense(40, 3, 2), Block(1, 24, 2), Block(4, 33), Head(70, 129)],
    "first block expands": [STEM, Block(3, 16), Block(6, 24, 2), Block(8, 24), Block(1, 20), Head(130, 64)],
    "first block has a shortcut": [Dense(24, 3, 2), Block(1, 24), Block(4, 17, 2), Head(65, 100)],
    "joined, other filters": [
        Dense(9, 5), Block(1, 11, 1, 5), Block(5, 20, 1, 3, 2), Block(3, 20, 2, 5, 2), Head(48, 80),
    ],
    "no blocks": [Dense(32, 3, 2), Head(96, 100)],
    "joined, taps": [
        Dense(32, 3, 2), Block(1, 16), Block(6, 24, tap=True), Block(8, 24, output=RELU6),
        Dense(40, tap=True), Block(4, 24, 2, output=RELU6), Block(1, 20, source=4, tap=True), Head(70, 33, 5),
    ],
    "branches": [  # maps that live long beside others that do not, of more sizes than one
        STEM, Block(3, 16), Block(4, 24, 2), Block(8, 24, output=(-1.0, 1.0)), Dense(48), Block(1, 12, source=1),
        Block(2, 12, tap=True), Block(2, 20, source=1, tap=True), Block(2, 8, source=2, tap=True),
        Dense(21, source=4, tap=True),
    ],
    "joined, no head": [Dense(32, 3, 2), Block(1, 16), Block(8, 16, 2), Dense(13), Dense(9, tap=True)],
    "several heads": [
        STEM, Block(4, 16, output=RELU6), Head(70, 33), Block(8, 24, 2, source=1), Head(130, 40), Head(33, 9, 1),
    ],
    "the stem is an output": [Dense(24, 3, 2, tap=True), Block(1, 16), Head(40, 9)],
    "the stem is read twice": [
        Dense(24, 3, 2), Block(1, 16), Block(1, 24, source=0), Head(40, 9), Dense(8, source=1, tap=True),
    ],
    "two stems": [STEM, Block(4, 16), Dense(8, 5, 3, IMAGES, tap=True), Block(4, 24, 2, source=1, tap=True)],
    "a convolution alone": [Dense(19, 3, 2, tap=True)],
    "convolutions with windows": [STEM, Dense(24, 3, 2), Dense(11, 5), Block(4, 16, tap=True)],
}  # fmt: skip
# Multiprocessors: hidden channels are split if there are some, and add up in clusters or in memory.
ONE, SOME, MEMORY = (1, *H200[1:]), (8, *H200[1:]), (8, *A100[1:])


class Step(NamedTuple):
    """A unit as the operator is told, and as plain PyTorch computes it."""

    kind: int
    source: int
    tap: bool
    fields: list[int]
    weights: list[Tensor | None]
    options: dict
    bounds: tuple[float, ...]
    size: tuple[int, ...] = ()  # c, h, w of its output; of a head its classes

    def run(self, x: Tensor, dtype: torch.dtype, tf32: bool) -> Tensor:
        functions = (
            (plain_tf32_stem, plain_tf32_block, plain_tf32_head)
            if tf32
            else (reference.dense, reference.inverted_residual, reference.head)
        )
        return functions[self.kind](x, *cast(self.weights, dtype), **self.options)


def steps_of(network: Network, x: Tensor, same: bool) -> list[Step]:
    """`same`: TensorFlow's padding. Bounds differ from unit to unit."""
    steps: list[Step] = []
    for i, unit in enumerate(network):
        source = i - 1 if unit.source is None else unit.source
        c, *size = x.shape[1:] if source == IMAGES else steps[source].size
        activation = RELU6 if source == IMAGES else (-0.5 - i, 4.0 + i)
        if isinstance(unit, Head):
            weights = [torch.randn(unit.c_last, c, 1, 1) * 2 / c**0.5, torch.randn(unit.c_last)]
            weights += [torch.randn(unit.classes, unit.c_last) / unit.c_last**0.5, torch.randn(unit.classes)]
            fields, options = HeadShape(c, unit.c_last, unit.classes).fields(), dict(activation=activation)
            step = Step(2, source, True, fields, weights, options, activation)
        else:
            kernel, stride, dilation = unit.kernel, unit.stride, getattr(unit, "dilation", 1)
            pads = same_padding(*size, kernel, stride, dilation) if same else ((kernel - 1) // 2 * dilation,) * 4
            options, given = dict(stride=stride, padding=pads, activation=activation), None if same else pads
            if isinstance(unit, Dense):
                weights = [torch.randn(unit.c_out, c, kernel, kernel) / c**0.5, torch.randn(unit.c_out)]
                fields, bounds = DenseShape(c, unit.c_out, kernel, stride, given).fields(), activation
            else:
                hidden, adds = c * unit.expansion, stride == 1 and c == unit.c_out
                weights = block_weights(c, hidden, unit.c_out, kernel, unit.expansion > 1)
                weights[4] = weights[4] / 2
                shape = BlockShape(c, hidden, unit.c_out, kernel, stride, dilation, given, unit.expansion > 1, adds)
                options.update(dilation=dilation, residual=adds, project_activation=unit.output)
                fields, bounds = shape.fields(), (*activation, *unit.output)
            step = Step(int(isinstance(unit, Block)), source, unit.tap, fields, weights, options, bounds)
        size = step.run(torch.zeros(1, c, *size), torch.float32, False).shape[1:]
        steps.append(step._replace(weights=cast(step.weights, x.dtype), size=tuple(size)))
    return steps


def run_network(
    emulator, steps: list[Step], x: Tensor, dtype: torch.dtype | str, device: tuple[int, ...], schedule: int
) -> tuple[dict[int, Tensor], list[int]]:
    """The outputs by the units that compute them, and what emulate_network() writes about the plan."""
    units = [i for step in steps for i in (step.kind, step.source, int(step.tap), *step.fields)]
    bounds = [b for step in steps for b in step.bounds]
    given, planned = Weights([w for step in steps for w in step.weights]), torch.zeros(3).long()
    y = torch.empty(sum(math.prod(step.size) for step in steps if step.tap) * len(x), dtype=x.dtype)
    emulator(
        "emulate_network", schedule, integers(device), integers(x.permute(0, 2, 3, 1).shape), integers(x.stride()),
        " ".join(map(str, units)), " ".join(map(str, bounds)),
        DTYPES.index(dtype), given.pointers, x, y, planned,
    )  # fmt: skip
    taps = {i: step.size for i, step in enumerate(steps) if step.tap}
    outputs = {}
    for (i, (c, *size)), flat in zip(
        taps.items(), y.split([len(x) * math.prod(s) for s in taps.values()]), strict=True
    ):
        outputs[i] = flat.view(-1, *size, c).permute(0, 3, 1, 2) if size else flat.view(-1, c)
    return outputs, planned.tolist()


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
    least and the most splits of a block's hidden channels.

    With all maps as outputs, each unit is right for the map that it reads, and the network's own outputs are the same.
    """
    x = x.to(storage(dtype))
    steps = steps_of(network, x, same)
    results = [run_network(emulator, steps, x, dtype, device, schedule) for schedule in schedules]
    joined, least, most = results[0][1]
    every = [step._replace(tap=i > 0 or not joined) for i, step in enumerate(steps)]
    maps, planned = run_network(emulator, every, x, dtype, device, schedules[0])
    assert planned == results[0][1]
    for i, y in maps.items():
        units = steps[:2] if joined and i == 1 else steps[i : i + 1]
        exact = plain = x if units[0].source == IMAGES else maps[units[0].source]
        exact = exact.double()
        for unit in units:
            exact, plain = unit.run(exact, torch.float64, False), unit.run(plain, x.dtype, dtype == TF32)
        assert_close(y, plain, exact)
    for outputs, _ in results:
        assert all(torch.equal(y, maps[i]) for i, y in outputs.items())
    return bool(joined), least, most


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("same", [False, True], ids=["PyTorch", "TensorFlow"])
@pytest.mark.parametrize("name", NETWORKS)
def test_network(cuda_emulator, name, same, dtype):
    layouts, i = ["NCHW", "NHWC", "view"], same + DTYPES.index(dtype)
    for device, n in ((SOME, 1), (MEMORY, 1), (ONE, 3)):
        x = image(n, 3, 14, 13, layouts[(i + n) % 3])
        joined, _, most = check_network(
            cuda_emulator, NETWORKS[name], x, dtype, same=same, device=device, schedules=((i + 3 * n) % 12,)
        )
        assert joined == name.startswith("joined")
        # At most two thread blocks for each multiprocessor.
        assert most <= 2 if device == ONE else most > 2 or name not in ("joined, no head", "several heads")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["NCHW", "NHWC", "view"])
def test_layouts_of_a_network(cuda_emulator, layout, dtype):
    for name in ("joined", "first block expands", "two stems"):
        check_network(cuda_emulator, NETWORKS[name], image(2, 3, 9, 11, layout), dtype, same=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("device", [SOME, MEMORY], ids=["cluster", "memory"])
@pytest.mark.parametrize("name", ["joined", "first block expands", "joined, taps", "branches"])
def test_every_schedule_of_a_network(cuda_emulator, name, device, dtype):
    """Blocks whose hidden channels are split, and some that are not; several tiles of an image, and several images."""
    x = image(2, 3, 15, 12, "NHWC")
    _, least, most = check_network(cuda_emulator, NETWORKS[name], x, dtype, device=device, schedules=SCHEDULES)
    assert least == 1 and most > 1


def test_a_network_of_random_units(cuda_emulator):
    """Every unit reads any map before it."""
    generator = torch.Generator().manual_seed(1)

    def pick(*values):
        return values[int(torch.randint(len(values), (1,), generator=generator))]

    for case in range(24):
        units: Network = [Dense(pick(8, 9, 32), 3, pick(1, 2))]
        for i in range(pick(2, 4, 7)):
            source, tap = pick(*range(i + 1), i, i), pick(False, False, True)
            if pick(0, 1, 2) == 0:
                units.append(Dense(pick(8, 13, 40), pick(1, 3), pick(1, 2), source, tap))
            else:
                kinds = dict(source=source, tap=tap, output=pick(NO_BOUNDS, RELU6))
                units.append(Block(pick(1, 2, 6), pick(8, 9, 24), pick(1, 2), **kinds))
        read = {i - 1 if unit.source is None else unit.source for i, unit in enumerate(units)}
        units = [u if i in read else u._replace(tap=True) for i, u in enumerate(units)]
        x = image(pick(1, 2), 3, pick(7, 12), 10, pick("NCHW", "NHWC"))
        check_network(cuda_emulator, units, x, DTYPES[case % 4], device=pick(ONE, SOME, MEMORY), schedules=(case % 12,))
