"""torchvision's MobileNetV2: the network, its blocks, and the convolutions before and after the blocks."""

from __future__ import annotations

from itertools import pairwise

from torch import nn

from mnv2_fused.models.fused import FusedBlock, FusedDense, FusedNetwork, FusedUnit
from mnv2_fused.models.maps import FusedEncoder

NAME = "torchvision's MobileNetV2 or its InvertedResidual blocks (torchvision.models.mobilenetv2)"

_KINDS: dict[tuple[str, str], type[FusedUnit]] = {
    ("torchvision.models.mobilenetv2", "MobileNetV2"): FusedNetwork,
    ("torchvision.models.mobilenetv2", "InvertedResidual"): FusedBlock,
    ("segmentation_models_pytorch.encoders.mobilenet", "MobileNetV2Encoder"): FusedEncoder,
}


def _kind_of(module: nn.Module) -> type[FusedUnit] | None:
    # No subclasses: they may have another forward.
    return _KINDS.get((type(module).__module__, type(module).__qualname__))


def _is_dense(module: nn.Module) -> bool:
    kind = type(module)
    return (
        kind.__module__ == "torchvision.ops.misc"
        and isinstance(module, nn.Sequential)
        and kind.forward is nn.Sequential.forward
    )


def find(model: nn.Module) -> list[tuple[nn.Module, type[FusedUnit]]]:
    """The modules in `model` that can be converted, each with its mixin."""
    found = [(module, kind) for module in model.modules() if (kind := _kind_of(module)) is not None]

    # A dense convolution is found by its place: the stem stands before a block, the last convolution after one.
    def is_block(module: nn.Module) -> bool:
        return isinstance(module, FusedBlock) or _kind_of(module) is FusedBlock

    dense: dict[nn.Module, type[FusedUnit]] = {}
    for parent in model.modules():
        for one, following in pairwise(parent.children()):
            for module, neighbour in ((one, following), (following, one)):
                if _is_dense(module) and is_block(neighbour):
                    dense[module] = FusedDense
    return [*found, *dense.items()]
