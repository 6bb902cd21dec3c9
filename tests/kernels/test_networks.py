"""The operator `network` on programs of units: branches, taps, several outputs, against the units one by one."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from mnv2_fused._core import operators
from mnv2_fused._core.geometry import NO_BOUNDS, BlockShape, DenseShape, HeadShape
from mnv2_fused._core.specs import IMAGES, BlockSpec, ConvNorm, DenseSpec, HeadSpec, NetworkSpec, Step
from mnv2_fused.tools import measure

RELU6 = (0.0, 6.0)
OPERATOR = {DenseSpec: operators.DENSE, BlockSpec: operators.INVERTED_RESIDUAL, HeadSpec: operators.HEAD}


def conv(*shape: int) -> ConvNorm:
    fan_in = shape[1] * (shape[2] * shape[3] if len(shape) == 4 else 1)
    return ConvNorm(torch.randn(shape) * 2 / fan_in**0.5, torch.randn(shape[0]), None, None, None, None, 0.0)


def dense(c_in: int, c_out: int, kernel: int = 1, stride: int = 1) -> DenseSpec:
    shape = DenseShape(c_in, c_out, kernel, stride, (kernel // 2,) * 4)
    return DenseSpec(conv(c_out, c_in, kernel, kernel), shape, RELU6, False, {})


def block(c_in: int, t: int, c_out: int, stride: int = 1, clamps: bool = False) -> BlockSpec:
    hidden = c_in * t
    shape = BlockShape(c_in, hidden, c_out, 3, stride, 1, (1,) * 4, t > 1, stride == 1 and c_in == c_out)
    expand = conv(hidden, c_in, 1, 1) if t > 1 else None
    output = RELU6 if clamps else NO_BOUNDS
    return BlockSpec(expand, conv(hidden, 1, 3, 3), conv(c_out, hidden, 1, 1), shape, RELU6, output, False, {})


def head(c_in: int, c_last: int, classes: int) -> HeadSpec:
    return HeadSpec(conv(c_last, c_in, 1, 1), conv(classes, c_last), HeadShape(c_in, c_last, classes), RELU6, {})


def random_network(seed: int) -> NetworkSpec:
    rng = random.Random(seed)
    steps, channels = [Step(dense(3, 16, 3, 2), IMAGES, False)], [16]
    for _ in range(rng.randint(1, 8)):
        source = rng.choice([len(steps) - 1, len(steps) - 1, rng.randrange(len(steps))])
        c_in, c_out = channels[source], rng.choice([8, 16, 24, 30])
        if rng.random() < 0.3:
            spec = dense(c_in, c_out)
        else:
            c_out = rng.choice([c_out, c_in])
            spec = block(c_in, rng.choice([1, 3, 6]), c_out, rng.choice([1, 2]), rng.random() < 0.3)
        steps.append(Step(spec, source, rng.random() < 0.3))
        channels.append(c_out)
    if rng.random() < 0.5:
        steps.append(Step(head(channels[-1], 40, 7), len(steps) - 1, True))
    read = {step.source for step in steps}
    return NetworkSpec(tuple(s._replace(tap=s.tap or i not in read) for i, s in enumerate(steps)), {})


def run_network(spec: NetworkSpec, x: Tensor) -> list[Tensor]:
    tensors, eps, arguments = spec.flat()
    packed = operators.NETWORK.pack(tensors, eps, x.dtype)
    return operators.NETWORK.run(x, packed, *arguments)


def one_by_one(spec: NetworkSpec, x: Tensor) -> list[Tensor]:
    maps: list[Tensor] = []
    for unit, source, _ in spec.steps:
        given = x if source == IMAGES else maps[source]
        tensors, eps, arguments = unit.flat()
        operator = OPERATOR[type(unit)]
        maps.append(operator.run(given, operator.pack(tensors, eps, x.dtype), *arguments))
    return [y for y, step in zip(maps, spec.steps, strict=True) if step.tap]


@pytest.mark.parametrize("seed", range(25))
def test_network_is_its_units(seed):
    torch.manual_seed(seed)
    spec, x = random_network(seed), torch.randn([1, 2, 11][seed % 3], 3, 33, 30)
    expected = one_by_one(spec, x)
    for threads in (1, 2, 5):
        with measure.threads(threads):
            got = run_network(spec, x)
        assert len(got) == len(expected)
        for ours, theirs in zip(got, expected, strict=True):
            assert torch.equal(ours, theirs) and ours.stride() == theirs.stride()


@pytest.mark.parametrize("taps", [(True, True, False, True), (False,) * 4, (False, True, True, False)], ids=str)
def test_large_maps_a_few_images_at_a_time(taps):
    """A batch passes the first steps in slices. Taps are among these steps, or not."""
    spec = NetworkSpec(
        (
            Step(dense(3, 16, 3, 2), IMAGES, taps[0]),
            Step(block(16, 6, 16), 0, taps[1]),
            Step(block(16, 6, 16), 1, taps[2]),
            Step(block(16, 6, 24, 2), 2, taps[3]),
            Step(block(24, 6, 24), 3, True),
        ),
        {},
    )
    x = torch.randn(7, 3, 160, 160)
    with measure.threads(1):
        for ours, theirs in zip(run_network(spec, x), one_by_one(spec, x), strict=True):
            assert torch.equal(ours, theirs)


def test_packed_weights_do_not_depend_on_taps():
    spec = random_network(3)
    bare = NetworkSpec(tuple(step._replace(tap=False) for step in spec.steps), {})
    pack = operators.NETWORK.pack
    assert torch.equal(*(pack(*s.flat()[:2], torch.float32) for s in (spec, bare)))


def test_fake_kernel_knows_the_outputs():
    spec, x = random_network(5), torch.randn(2, 3, 33, 30)
    tensors, eps, arguments = spec.flat()
    packed = operators.NETWORK.pack(tensors, eps, x.dtype)
    torch.library.opcheck(torch.ops.mnv2_fused.network.default, (x, packed, *arguments, False))
