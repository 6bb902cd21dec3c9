"""Containers whose children are units: they can keep a map channels_last from one unit to the next."""

from __future__ import annotations

from itertools import pairwise

from torch import nn

from mnv2_fused.models.fused import FusedSequential, FusedUnit, is_unit
from mnv2_fused.models.maps import FusedLayerGetter

_GETTER = ("torchvision.models._utils", "IntermediateLayerGetter")


def find_chains(model: nn.Module) -> list[tuple[nn.Module, type[FusedUnit]]]:
    """The containers in `model` with two units or chains in a row, each with its mixin. Units must be converted."""
    found: dict[nn.Module, type[FusedUnit]] = {}

    def fits(module: nn.Module) -> bool:
        return is_unit(module) or isinstance(module, FusedSequential) or module in found

    for module in reversed(list(model.modules())):  # children first
        kind = type(module)
        if kind is nn.Sequential:
            mixin: type[FusedUnit] = FusedSequential
        elif (kind.__module__, kind.__qualname__) == _GETTER:
            mixin = FusedLayerGetter
        else:
            continue
        if any(fits(one) and fits(following) for one, following in pairwise(module.children())):
            found[module] = mixin
    return list(found.items())
