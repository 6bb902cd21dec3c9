"""Containers of units: they keep a map channels_last from one unit to the next. They hold units of any family."""

# No `from __future__ import annotations`: TorchScript reads these classes' annotations and does not parse strings.

from collections import OrderedDict
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from mnv2_fused._core.decide import Unit
from mnv2_fused.families import Kind, kind_of
from mnv2_fused.families.chain import Chain, Maps
from mnv2_fused.models.fused import NETWORK, FusedSequential, FusedUnit, is_unit


class LayerGetter(Chain):
    """torchvision's IntermediateLayerGetter: modules by name that follow one another, and the names of its outputs."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        if torch.jit.is_scripting():
            return self._forward_plain(x)
        else:
            return self._forward_fused(x)

    @torch.jit.unused
    def _forward_fused(self, x: Tensor) -> dict[str, Tensor]:
        taps = self._taps()
        maps = self._maps(x, taps) if taps else None
        if maps is None:
            return self._forward_plain(x)
        names = list(self)
        return OrderedDict((self.return_layers[names[i]], y) for i, y in zip(taps, maps, strict=True))

    @torch.jit.unused
    def _taps(self) -> tuple[int, ...]:
        return tuple(i for i, name in enumerate(self) if name in self.return_layers)

    @torch.jit.unused
    def _wholes(self) -> list[tuple[Unit, Any]]:
        taps = self._taps()
        return [(NETWORK, Maps(self, taps))] if taps else []

    @torch.jit.unused
    def _links(self) -> list[Any] | str:
        return list(self.values())

    @torch.jit.unused
    def _links_key(self) -> tuple[Any, ...]:
        return tuple(self.__dict__["_modules"].values())


_GETTER = {
    ("torchvision.models._utils", "IntermediateLayerGetter"): Kind(
        LayerGetter, {"forward": frozenset(("OrderedDict", "items", "return_layers"))}
    )
}


def find_containers(model: nn.Module) -> list[tuple[nn.Module, type[FusedUnit]]]:
    """The containers in `model` with two units, or containers of units, in a row, each with its mixin. The units must
    have been converted.
    """
    found: dict[nn.Module, type[FusedUnit]] = {}

    def fits(module: nn.Module) -> bool:
        return is_unit(module) or isinstance(module, FusedSequential) or found.get(module) is FusedSequential

    for module in reversed(list(model.modules())):  # children first
        kind = kind_of(module, _GETTER)
        mixin = FusedSequential if type(module) is nn.Sequential else kind and kind.mixin
        if mixin is not None and any(fits(one) and fits(other) for one, other in pairwise(module.children())):
            found[module] = mixin
    return list(found.items())
