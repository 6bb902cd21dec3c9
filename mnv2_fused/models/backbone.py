"""MobileNetV2's feature maps, for networks that put a head of their own on them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mnv2_fused._core.decide import Unit
from mnv2_fused._core.layout import as_input, is_channels_last, to_contiguous
from mnv2_fused._core.run import run
from mnv2_fused.models.fused import NETWORK, Entry, FusedModel, chain
from mnv2_fused.models.mobilenet_v2 import MobileNetV2
from mnv2_fused.models.network import features_reason

__all__ = ["Backbone"]

LAST_BLOCK = 17


class Backbone(FusedModel):
    """The stem and the 17 blocks of a `MobileNetV2` as ``features``, without its last 1x1 convolution.

    Args:
        taps: the maps that a call returns: a unit's index in ``features`` by the map's name.
        **options: arguments of `MobileNetV2`. Its ``inverted_residual_setting`` stays the paper's.

    Shapes: (n, 3, h, w) to an OrderedDict of (n, ``channels(index)``, h_i, w_i), in the order of the units.

    Assigning to ``fused`` or ``recompute`` sets it in all units. Assigning to ``taps`` changes the maps of later calls.

    Raises:
        ValueError: ``taps`` is empty, or an index is not from 0 to 17, or ``shortcut`` is ``"expansion"``.
    """

    def __init__(self, taps: Mapping[str, int], *, fused: bool = True, **options: Any) -> None:
        super().__init__()
        if options.get("shortcut") == "expansion":
            raise ValueError(
                "Backbone: shortcut should be bottleneck or none, got 'expansion': its units run one by one, and such "
                "a shortcut leads from inside one block into another"
            )
        self.features = MobileNetV2(**options).features[: LAST_BLOCK + 1]
        self.taps = taps
        if not fused:
            self.fused = False

    @property
    def taps(self) -> dict[str, int]:
        """The maps that a call returns, in the order of the units."""
        return self._taps

    @taps.setter
    def taps(self, taps: Mapping[str, int]) -> None:
        if not taps or not all(index in range(LAST_BLOCK + 1) for index in taps.values()):
            raise ValueError(f"Backbone: taps must name units from 0 to {LAST_BLOCK}, at least one; got {dict(taps)}")
        self._taps = dict(sorted(taps.items(), key=lambda tap: tap[1]))

    def channels(self, index: int) -> int:
        """Channels of the map that ``features[index]`` returns."""
        return self.features[index].out_channels

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        indices = sorted(set(self.taps.values()))
        found = run(NETWORK, self, x, inside=True)
        if found is None:
            found = self._one_by_one(x, indices)
        elif not is_channels_last(x):
            found = [to_contiguous(y) for y in found]
        maps = dict(zip(indices, found, strict=True))
        return OrderedDict((name, maps[index]) for name, index in self.taps.items())

    def _one_by_one(self, x: Tensor, indices: list[int]) -> list[Tensor]:
        """The outputs of the units `indices`, in the memory format of x."""
        maps, y = [], x
        if self.fused and x.dim() == 4:
            # Here once: each fused unit would convert its output back to the input's format.
            y = x.contiguous(memory_format=torch.channels_last)
        for index, unit in enumerate(self.features):
            y = unit(y)
            if index in indices:
                maps.append(as_input(y, x) if self.fused and y.dim() == 4 else y)
        return maps

    def _wholes(self) -> list[tuple[Unit, Any]]:
        return [(NETWORK, self)]

    def _entries(self) -> list[Entry] | str:
        reason = features_reason(self)
        if reason is not None:
            return reason
        taps = set(self.taps.values())
        entries = [entry._replace(tap=i in taps) for i, entry in enumerate(chain(self.features))]
        return entries[: max(taps) + 1]

    def _network_key(self) -> tuple[Any, ...]:
        return self.features, self.training, tuple(self.taps.items())


def initialise_head(head: nn.Module) -> None:
    """Initialises a head's convolutions as `MobileNetV2` does its own; those with a bias predict, and start small."""
    for module in head.modules():
        if isinstance(module, nn.Conv2d):
            if module.bias is None:
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
            else:
                nn.init.normal_(module.weight, 0, 0.01)
                nn.init.zeros_(module.bias)
