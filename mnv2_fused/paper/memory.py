"""Memory of activations by the paper's rule (section 5.1): the largest sum of an operation's inputs and outputs."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mnv2_fused import _C
from mnv2_fused._core.operators import network_units
from mnv2_fused.models.mobilenet_v2 import MobileNetV2
from mnv2_fused.tools import measure, rates

BYTES = 2  # of a number: the paper counts in 16 bits
# What works on its input in place, or is folded into the convolution before it.
_NO_OPERATION = (nn.Identity, nn.Dropout, nn.ReLU, nn.ReLU6, nn.modules.batchnorm._BatchNorm)


class Operation(NamedTuple):
    """One call of a module on one image. Shapes are (c, h, w), or (c) behind the pooling."""

    name: str
    inputs: tuple[tuple[int, ...], ...]
    output: tuple[int, ...]
    scratch: int = 0  # bytes

    @property
    def bytes(self) -> int:
        return BYTES * sum(torch.Size(shape).numel() for shape in (*self.inputs, self.output))


def convolutions(model: nn.Module, x: Tensor) -> list[Operation]:
    """The operations of `model(x)` if each leaf module is one. Norms, activations and dropout belong to the operation
    before them. Sums and concatenations that are no modules are left out.
    """
    found: list[Operation] = []

    def hook(name: str, module: nn.Module, inputs: tuple, output: Tensor) -> None:
        shapes = tuple(tuple(t.shape[1:]) for t in inputs if isinstance(t, Tensor))
        found.append(Operation(name, shapes, tuple(output.shape[1:])))

    handles = [
        module.register_forward_hook(functools.partial(hook, name))
        for name, module in model.named_modules()
        if not any(module.children()) and not isinstance(module, _NO_OPERATION)
    ]
    try:
        with torch.no_grad():
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    return found


def blocks(model: MobileNetV2, resolution: int, threads: int) -> list[Operation]:
    """The operations of a MobileNetV2 on one image if each unit is one: stem, blocks, and 1x1 convolution, pooling and
    classifier together. Stem and first block are one if the plan of the network fuses them.

    `scratch` is what the plan of a block takes with `threads` threads. The kernels compute in float32, so it has 4
    bytes a number.
    """
    units, bounds = rates.network_spec(model).flat().arguments
    size = (1, 3, resolution, resolution)
    found = [Operation("", (unit.x[1:],), tuple(unit.y[1:])) for unit in network_units(size, units)]
    stem, *middle, head = found
    plans = [
        _C.cpu_plan(*rates.plan_arguments(shape, 1), threads=threads, dtype="float16")
        for shape in rates.block_shapes(model, resolution)
    ]
    middle = [
        block._replace(name=f"block {i}", scratch=min(threads, p["tasks"]) * p["scratch_bytes"] + p["shared_bytes"])
        for i, (block, p) in enumerate(zip(middle, plans, strict=True), start=1)
    ]
    network = _C.cpu_network_plan((1, resolution, resolution, 3), units, bounds, threads=threads, dtype="float16")
    first = [stem._replace(name="stem")]
    if network["fused_stem"]:
        first = [middle.pop(0)._replace(name="stem and block 1", inputs=stem.inputs)]
    return [*first, *middle, head._replace(name="head")]


def largest(operations: list[Operation]) -> Operation:
    """The operation with the most bytes of inputs, outputs and scratch."""
    return max(operations, key=lambda operation: operation.bytes + operation.scratch)


def channels_by_resolution(operations: list[Operation], resolutions: list[int]) -> dict[int, int]:
    """The most channels of an input or output, by its height. Behind the pooling the height is 1."""
    shapes = [(*shape, 1, 1)[:3] for operation in operations for shape in (*operation.inputs, operation.output)]
    return {r: max((c for c, h, _ in shapes if h == r), default=0) for r in resolutions}


def kilobytes(channels: int, resolution: int) -> float:
    """Thousands of bytes of a square map in 16 bits."""
    return BYTES * channels * resolution**2 / 1000


def measured(model: nn.Module, x: Tensor, threads: int) -> tuple[int, int]:
    """Bytes that `model(x)` takes on this machine: the peak of activations, and the kernels' scratch memory in it."""
    with measure.threads(threads), torch.inference_mode():
        model(x)
        peak = measure.peak_memory(lambda: model(x))
        return peak, _C.scratch_high_water()
