"""The shapes of a network's blocks, and how fast a block runs alone: predicted and measured, in seconds a call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from mnv2_fused._core.geometry import BlockShape
from mnv2_fused._core.run import execute, prepare
from mnv2_fused._core.specs import NetworkSpec
from mnv2_fused.models.fused import BLOCK, NETWORK, FusedBlock, FusedDense
from mnv2_fused.models.mobilenet_v2 import MobileNetV2
from mnv2_fused.models.units import InvertedResidual
from mnv2_fused.tools import measure

__all__ = [
    "block_shapes",
    "macs_by_part",
    "measured_seconds",
    "network_spec",
    "operator",
    "plan_arguments",
    "predicted_seconds",
]

# Shares of the FMA peak that the three parts of a block reach, measured one by one (csrc/cpu/NOTES.md). A matrix
# product loses a tenth to loading its operands. The expand part has few products for each output; clamping and storing
# an output takes as long as _CLAMP_AND_STORE products. The depthwise part has a load for each product.
_MATRIX_SHARE = 0.9
_CLAMP_AND_STORE = 3
_DEPTHWISE_SHARE = 0.45


def block_shapes(model: MobileNetV2, resolution: int) -> list[dict]:
    """Name, input size and shape of every block of a MobileNetV2 for one `resolution` x `resolution` image."""
    stem, *blocks = ((m, m._unit.read(m, True)) for m in model.features if isinstance(m, (FusedBlock, FusedDense)))
    names = {module: name for name, module in model.named_modules()}
    h, w = stem[1].shape.size_out(resolution, resolution)
    rows = []
    for module, spec in blocks:
        if isinstance(module, FusedBlock):
            shape = spec.shape.resolved(h, w)
            rows.append({"block": names[module], "h": h, "w": w, **shape._asdict()})
            h, w = shape.size_out(h, w)
    return rows


def plan_arguments(row: Mapping, batch: int) -> tuple[tuple[int, int, int, int], list[int]]:
    """Input size and block of a row of `block_shapes`, as `_C.cpu_plan` and `_C.cuda_plan` take them."""
    shape = BlockShape(*(row[name] for name in BlockShape._fields))
    return (batch, row["h"], row["w"], shape.c_in), shape.fields()


def network_spec(model: MobileNetV2) -> NetworkSpec:
    """What a MobileNetV2 in eval mode computes, as its operator is told.

    Raises:
        ValueError: not all of it runs in one operator.
    """
    with torch.no_grad():
        spec = NETWORK.read(model, False)
    if isinstance(spec, str):
        raise ValueError(f"network_spec: expected a network that runs in one operator; got one in which {spec}")
    return spec


def macs_by_part(shape: Mapping, plan: Mapping) -> tuple[int, int, int]:
    """Multiply-adds of one image in the expand, depthwise and project part.

    `shape` is an item of `block_shapes`, `plan` is the result of `_C.cpu_plan` for it.
    """
    outputs = shape["c_hidden"] * plan["h_out"] * plan["w_out"]
    expand = shape["c_in"] * shape["c_hidden"] * shape["h"] * shape["w"] if shape["has_expand"] else 0
    return expand, shape["kernel"] ** 2 * outputs, shape["c_out"] * outputs


def predicted_seconds(shape: Mapping, plan: Mapping, batch: int, peak: float) -> float:
    """Seconds that a block takes for `batch` images: the sum of its parts' times.

    `peak` is the multiply-adds a second that all threads together reach on registers.
    """
    expand, depthwise, project = macs_by_part(shape, plan)
    expand_share = _MATRIX_SHARE * shape["c_in"] / (shape["c_in"] + _CLAMP_AND_STORE)
    return batch * (expand / expand_share + depthwise / _DEPTHWISE_SHARE + project / _MATRIX_SHARE) / peak


def operator(block: InvertedResidual, x: Tensor) -> Callable[[], Tensor | None]:
    """A function that calls the block's fused operator on `x` (n, c, h, w). It neither packs nor checks the weights.

    Raises ValueError if the block does not run fused.
    """
    found = prepare(BLOCK, block)
    if found is None:
        raise ValueError("operator: expected a block that runs fused here; mnv2_fused.explain tells why it does not")
    return partial(execute, BLOCK, x, *found)


def measured_seconds(block: InvertedResidual, x: Tensor, seconds: float = 0.2) -> float:
    """Median seconds a call of the block's operator alone, on a channels_last `x`. Measures for about `seconds`."""
    times = measure.interleaved({"operator": operator(block, x)}, seconds=seconds, burst=50)
    return measure.medians(times)["operator"]
