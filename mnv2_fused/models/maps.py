"""Mixins for other libraries' modules that pass an image through units in a loop and return maps on the way."""

# No `from __future__ import annotations`: TorchScript reads these classes' annotations and does not parse strings.

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mnv2_fused._core import call
from mnv2_fused._core.run import run
from mnv2_fused.models.fused import NETWORK, Entry, FusedModel, Walk, chain, features_reason

__all__ = ["FusedEncoder", "FusedLayerGetter", "FusedTaps"]


class FusedTaps(FusedModel):
    """A chain of units, some of which are outputs. It runs as one operator, or unit by unit with a map that stays
    channels_last. Each output has the memory format of the plain output.
    """

    @torch.jit.unused
    def _maps(self, x: Tensor, units: Sequence[torch.nn.Module], taps: Sequence[int]) -> list[Tensor]:
        """The outputs of the units `taps`, in their order."""
        outputs = run(NETWORK, self, x)
        if outputs is not None:
            return outputs
        walk, maps = Walk(x), []
        for index, unit in enumerate(units):
            walk.step(unit)
            if index in taps:
                maps.append(walk.plain())
        return maps

    @torch.jit.unused
    def _runs_plain(self, x: Tensor) -> bool:
        """Whether the plain forward has to call the units."""
        return not self.fused or call.call_reason(x) is not None or x.dim() != 4

    @torch.jit.unused
    def _tapped(self, units: Sequence[torch.nn.Module], taps: Sequence[int]) -> list[Entry] | str:
        if not taps:
            return "it has no outputs"
        return [entry._replace(tap=i in taps) for i, entry in enumerate(chain(units))][: max(taps) + 1]


class FusedLayerGetter(FusedTaps):
    """torchvision's ``IntermediateLayerGetter``: a dict of units, and the names of its outputs by units' names."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        if torch.jit.is_scripting():
            return self._forward_plain(x)
        else:
            return self._forward_fused(x)

    @torch.jit.unused
    def _forward_fused(self, x: Tensor) -> dict[str, Tensor]:
        if self._runs_plain(x):
            return self._forward_plain(x)
        taps = self._taps()
        outputs = self._maps(x, list(self.values()), list(taps))
        return OrderedDict(zip(taps.values(), outputs, strict=True))

    @torch.jit.unused
    def _taps(self) -> dict[int, str]:
        return {i: self.return_layers[name] for i, name in enumerate(self) if name in self.return_layers}

    @torch.jit.unused
    def _entries(self) -> list[Entry] | str:
        return self._tapped(list(self.values()), list(self._taps()))

    @torch.jit.unused
    def _network_key(self) -> tuple[Any, ...]:
        children = self.__dict__["_modules"]
        return *children.values(), *children, tuple(self.return_layers.items()), self.__dict__["training"]


class FusedEncoder(FusedTaps):
    """segmentation_models_pytorch's ``MobileNetV2Encoder``: the maps of the units ``_out_indexes`` up to ``_depth``."""

    def forward(self, x: Tensor) -> list[Tensor]:
        if torch.jit.is_scripting():
            return self._forward_plain(x)
        else:
            return self._forward_fused(x)

    @torch.jit.unused
    def _forward_fused(self, x: Tensor) -> list[Tensor]:
        if self._runs_plain(x) or features_reason(self) is not None:
            return self._forward_plain(x)
        taps = self._taps()
        outputs = self._maps(x, list(self.features)[: taps[-1] + 1], taps)
        return [x, *outputs][: self._depth + 1]

    @torch.jit.unused
    def _taps(self) -> list[int]:
        # The plain forward stops behind the first output that it does not return.
        return [i for i in sorted(self._out_indexes) if i < len(self.features)][: self._depth + 1]

    @torch.jit.unused
    def _entries(self) -> list[Entry] | str:
        return features_reason(self) or self._tapped(list(self.features), self._taps())

    @torch.jit.unused
    def _network_key(self) -> tuple[Any, ...]:
        d = self.__dict__
        return d["_modules"]["features"], tuple(d["_out_indexes"]), d["_depth"], d["training"]
