"""segmentation_models_pytorch's own MobileNetV2 encoder."""

# No `from __future__ import annotations`: TorchScript reads these classes' annotations and does not parse strings.

from typing import Any

import torch
from torch import Tensor, nn

from mnv2_fused.families import Kind, find_kinds
from mnv2_fused.families.chain import Chain
from mnv2_fused.models.fused import FusedUnit, features_reason

NAME = "segmentation_models_pytorch's MobileNetV2 encoder"


class Encoder(Chain):
    """MobileNetV2Encoder: the images, and the maps behind the features `_out_indexes`, `_depth` of them."""

    def forward(self, x: Tensor) -> list[Tensor]:
        if torch.jit.is_scripting():
            return self._forward_plain(x)
        else:
            return self._forward_fused(x)

    @torch.jit.unused
    def _forward_fused(self, x: Tensor) -> list[Tensor]:
        taps = self._taps()
        maps = self._maps(x, taps) if taps else None
        return self._forward_plain(x) if maps is None else [x, *maps][: self._depth + 1]

    @torch.jit.unused
    def _taps(self) -> tuple[int, ...]:
        # The plain forward stops behind the first map that it does not return, and its norms have seen that one, too.
        return tuple(i for i in range(len(self.features)) if i in self._out_indexes)[: self._depth + 1]

    @torch.jit.unused
    def _links(self) -> list[Any] | str:
        return features_reason(self) or list(self.features)[: self._taps()[-1] + 1]

    @torch.jit.unused
    def _links_key(self) -> tuple[Any, ...]:
        return self.features, self._taps()


KINDS = {
    ("segmentation_models_pytorch.encoders.mobilenet", "MobileNetV2Encoder"): Kind(
        Encoder, {"forward": frozenset("enumerate features _out_indexes append _depth torch jit is_scripting".split())}
    )
}


def find(model: nn.Module) -> list[tuple[nn.Module, type[FusedUnit]]]:
    """The modules in `model` that can be converted, each with its mixin."""
    return find_kinds(model, KINDS)
