"""How fast a block runs alone: as a simple rule predicts it, and as it is measured. Both in seconds a call; and what
shapes the blocks of a network have.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from mnv2_fused._core.geometry import BlockShape
from mnv2_fused._core.specs import NetworkSpec
from mnv2_fused._core.unit import execute, prepare
from mnv2_fused.models.fused import BLOCK, NETWORK
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

# Shares of the FMA peak that the three parts of such kernels reach, measured one by one (csrc/cpu/NOTES.md). A matrix
# product loses a tenth to loading its operands. Expansion has few products for each output, whose clamp and store take
# as long as _CLAMP_AND_STORE more of them. The depthwise part has one load for each product.
_MATRIX_SHARE = 0.9
_CLAMP_AND_STORE = 3
_DEPTHWISE_SHARE = 0.45


def block_shapes(model: MobileNetV2, resolution: int) -> list[dict]:
    """Name, input size and shape of every block of a MobileNetV2 for one `resolution` x `resolution` image."""
    spec = network_spec(model)
    h, w = spec.stem.shape.size_out(resolution, resolution)
    rows = []
    for i, block in enumerate(spec.blocks):
        shape = block.shape.resolved(h, w)
        rows.append({"block": f"features.{i + 1}", "h": h, "w": w, **shape._asdict()})
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
    """Multiply-adds of one image in the expand, depthwise and project part; arguments as `_C.cpu_plan` has them."""
    outputs = shape["c_hidden"] * plan["h_out"] * plan["w_out"]
    expand = shape["c_in"] * shape["c_hidden"] * shape["h"] * shape["w"] if shape["has_expand"] else 0
    return expand, shape["kernel"] ** 2 * outputs, shape["c_out"] * outputs


def predicted_seconds(shape: Mapping, plan: Mapping, batch: int, peak: float) -> float:
    """Time of a block at `peak` multiply-adds a second, all threads together: the sum of what its parts take."""
    expand, depthwise, project = macs_by_part(shape, plan)
    expand_share = _MATRIX_SHARE * shape["c_in"] / (shape["c_in"] + _CLAMP_AND_STORE)
    return batch * (expand / expand_share + depthwise / _DEPTHWISE_SHARE + project / _MATRIX_SHARE) / peak


def operator(block: InvertedResidual, x: Tensor) -> Callable[[], Tensor | None]:
    """The block's fused operator on `x` and nothing else: its weights are packed, and not checked any more."""
    found = prepare(BLOCK, block)
    if found is None:
        raise ValueError("operator: expected a block that runs fused here; mnv2_fused.explain tells why it does not")
    return partial(execute, BLOCK, x, *found)


def measured_seconds(block: InvertedResidual, x: Tensor, seconds: float = 0.2) -> float:
    """Median time of the block's operator alone on a channels_last `x`, called over and over for about `seconds`."""
    times = measure.interleaved({"operator": operator(block, x)}, seconds=seconds, burst=50)
    return measure.medians(times)["operator"]
