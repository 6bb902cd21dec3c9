"""The shapes of a network's blocks, and how fast a block runs alone: predicted and measured, in seconds a call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from mnv2_fused.models.mobilenet_v2 import MobileNetV2, _read_network
from mnv2_fused.models.units import InvertedResidual
from mnv2_fused.tools import measure

__all__ = ["block_shapes", "macs_by_part", "measured_seconds", "network_sizes", "operator", "predicted_seconds"]

# Shares of the FMA peak that the three parts of a block reach, measured one by one (csrc/cpu/NOTES.md). A matrix
# product loses a tenth to loading its operands. The expand part has few products for each output; clamping and storing
# an output takes as long as _CLAMP_AND_STORE products. The depthwise part has a load for each product.
_MATRIX_SHARE = 0.9
_CLAMP_AND_STORE = 3
_DEPTHWISE_SHARE = 0.45


def block_shapes(model: nn.Module, resolution: int) -> list[dict]:
    """The shape of every block of a MobileNetV2 for a `resolution` x `resolution` image.

    Keys are the arguments of `_C.cpu_plan`, and `block`, the block's name.
    """
    size = _out_size(model.features[0][0], resolution)
    shapes = []
    for index, block in enumerate(model.features):
        if not hasattr(block, "use_res_connect"):
            continue
        convs = [module for module in block.modules() if isinstance(module, nn.Conv2d)]
        depthwise, project = convs[-2:]
        shapes.append(
            {
                "block": f"features.{index}",
                "h": size,
                "w": size,
                "c_in": convs[0].in_channels,
                "c_hidden": depthwise.out_channels,
                "c_out": project.out_channels,
                "kernel": depthwise.kernel_size[0],
                "stride": depthwise.stride[0],
                "dilation": depthwise.dilation[0],
                "padding": (depthwise.padding[0], depthwise.padding[1]) * 2,
                "has_expand": len(convs) > 2,
                "residual": block.use_res_connect,
            }
        )
        size = _out_size(depthwise, size)
    return shapes


def network_sizes(model: MobileNetV2) -> tuple[list, ...]:
    """Sizes of stem, blocks and head, and the bounds of the activations, as `_C.cpu_network_plan` takes them."""
    with torch.no_grad():
        spec = _read_network(model.features, model.classifier)
    return spec.stem_sizes, spec.block_sizes, spec.head_sizes, spec.bounds


def _out_size(conv: nn.Conv2d, size: int) -> int:
    return (size + 2 * conv.padding[0] - conv.dilation[0] * (conv.kernel_size[0] - 1) - 1) // conv.stride[0] + 1


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
    found = block._current()
    if found is None:
        raise ValueError("operator: expected a block that runs fused here; mnv2_fused.explain tells why it does not")
    return partial(block._execute, x, *found)


def measured_seconds(block: InvertedResidual, x: Tensor, seconds: float = 0.2) -> float:
    """Median seconds a call of the block's operator alone, on a channels_last `x`. Measures for about `seconds`."""
    times = measure.interleaved({"operator": operator(block, x)}, seconds=seconds, burst=50)
    return measure.medians(times)["operator"]
