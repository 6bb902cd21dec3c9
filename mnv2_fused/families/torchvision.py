"""torchvision's MobileNetV2: the network, its blocks, and the convolutions before and after the blocks."""

from __future__ import annotations

from itertools import pairwise

from torch import nn

from mnv2_fused.families import Kind, find_kinds, kind_of
from mnv2_fused.models.fused import FusedBlock, FusedDense, FusedNetwork, FusedUnit

NAME = "torchvision's MobileNetV2 or its InvertedResidual blocks (torchvision.models.mobilenetv2)"

KINDS = {
    ("torchvision.models.mobilenetv2", "MobileNetV2"): Kind(FusedNetwork),
    ("torchvision.models.mobilenetv2", "InvertedResidual"): Kind(FusedBlock),
}


def _is_dense(module: nn.Module) -> bool:
    kind = type(module)
    return (
        kind.__module__ == "torchvision.ops.misc"
        and isinstance(module, nn.Sequential)
        and kind.forward is nn.Sequential.forward
    )


def find(model: nn.Module) -> list[tuple[nn.Module, type[FusedUnit]]]:
    """The modules in `model` that can be converted, each with its mixin."""
    found = find_kinds(model, KINDS)

    # A dense convolution is found by its place: the stem stands before a block, the last convolution after one.
    def is_block(module: nn.Module) -> bool:
        kind = kind_of(module, KINDS)
        return isinstance(module, FusedBlock) or (kind is not None and issubclass(kind.mixin, FusedBlock))

    dense: dict[nn.Module, type[FusedUnit]] = {}
    for parent in model.modules():
        for one, following in pairwise(parent.children()):
            for module, neighbour in ((one, following), (following, one)):
                if _is_dense(module) and is_block(neighbour):
                    dense[module] = FusedDense
    return [*found, *dense.items()]
