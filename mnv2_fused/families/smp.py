"""segmentation_models_pytorch's own encoders. Those that it takes from timm as they are belong to timm's family."""

# No `from __future__ import annotations`: TorchScript reads these classes' annotations and does not parse strings.

from typing import Any

import torch
from torch import Tensor, nn

from mnv2_fused.families import Kind, find_kinds
from mnv2_fused.families.chain import ReturnsMaps, inside
from mnv2_fused.families.timm import Stages
from mnv2_fused.models.fused import FusedUnit
from mnv2_fused.models.network import features_reason

NAME = "segmentation_models_pytorch's MobileNetV2 or EfficientNet encoder"


class Encoder(ReturnsMaps):
    """MobileNetV2Encoder: the images, and the maps behind the features `_out_indexes`, `_depth` of them."""

    @torch.jit.unused
    def _called(self) -> str | None:
        return features_reason(self) or (None if self._taps() else "it returns no map")

    @torch.jit.unused
    def _outputs(self, x: Tensor, maps: list[Tensor]) -> list[Tensor]:
        return [x, *maps][: self._depth + 1]

    @torch.jit.unused
    def _taps(self) -> tuple[int, ...]:
        # The plain forward stops behind the first map that it does not return, and its norms have seen that one, too.
        return tuple(i for i in range(len(self.features)) if i in self._out_indexes)[: self._depth + 1]

    @torch.jit.unused
    def _links(self) -> list[Any] | str:
        return self._called() or list(self.features)[: self._taps()[-1] + 1]

    @torch.jit.unused
    def _links_key(self) -> tuple[Any, ...]:
        return self.features, self._taps()


class StagesEncoder(Stages, ReturnsMaps):
    """EfficientNetEncoder and its like: the images, and the maps behind the stem and some stages, `_depth` of them."""

    _STAGES = (0, 2, 3, 5, 7)  # how many have run before each map

    @torch.jit.unused
    def _outputs(self, x: Tensor, maps: list[Tensor]) -> list[Tensor]:
        return [x, *maps]

    @torch.jit.unused
    def _stages(self) -> list[nn.Module]:
        """The stages that run."""
        return list(self.blocks)[: self._STAGES[self._depth - 1]]

    @torch.jit.unused
    def _called(self) -> str | None:
        return super()._called() if len(self.blocks) == self._STAGES[-1] else f"blocks has {len(self.blocks)} children"

    @torch.jit.unused
    def _taps(self) -> tuple[int, ...]:
        lengths = [len(inside(stage)) for stage in self._stages()]
        return tuple(sum(lengths[:count]) for count in self._STAGES[: self._depth])

    @torch.jit.unused
    def _links(self) -> list[Any] | str:
        return self._called() or [self._stem(), *(link for stage in self._stages() for link in inside(stage))]

    @torch.jit.unused
    def _links_key(self) -> tuple[Any, ...]:
        return *super()._links_key(), self._depth


_STAGES_FORWARD = {"forward": frozenset("_depth conv_stem bn1 append blocks".split())}
_STAGES_FILE = "segmentation_models_pytorch.encoders.timm_efficientnet"
KINDS = {
    ("segmentation_models_pytorch.encoders.mobilenet", "MobileNetV2Encoder"): Kind(
        Encoder, {"forward": frozenset("enumerate features _out_indexes append _depth torch jit is_scripting".split())}
    ),
    **{
        (_STAGES_FILE, name): Kind(StagesEncoder, _STAGES_FORWARD)
        for name in ("EfficientNetBaseEncoder", "EfficientNetEncoder", "EfficientNetLiteEncoder")
    },
}


def find(model: nn.Module) -> list[tuple[nn.Module, type[FusedUnit]]]:
    """The modules in `model` that can be converted, each with its mixin."""
    return find_kinds(model, KINDS)
