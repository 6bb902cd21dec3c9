"""The modules of SSDLite that hold parameters: the backbone with its extra layers, and the prediction heads.

They need no torchvision.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mnv2_fused._core.read import BlockParts, ConvParts, read_block, read_dense, runs_as_module
from mnv2_fused.models.fused import (
    BLOCK,
    DENSE,
    Entry,
    FusedBlock,
    chain,
    keeps_forward,
    layer_parts,
    unit_of,
)
from mnv2_fused.models.layers import Conv2dNormActivation, Conv2dSame
from mnv2_fused.models.mobilenet_v2 import MobileNetV2
from mnv2_fused.models.network import features_reason
from mnv2_fused.models.units import AFTER_EXPANSION, TappedInvertedResidual

__all__ = ["ANCHORS", "TAP", "Backbone", "Head", "ScoringHead", "extra_channels"]

ANCHORS = (3, 6, 6, 6, 6, 6)  # for each cell of each map
TAP = 14  # the block whose expansion is the first map
_EXTRA_CHANNELS = (512, 256, 256, 128)
_FEWEST_CHANNELS = 16

NormLayer = Callable[..., nn.Module]


def extra_channels(width_mult: float) -> list[tuple[int, int]]:
    """Middle and output channels of the four extra layers.

    They follow TensorFlow's object detection API: multiplied by the width, rounded down, at least 16.
    """

    def scaled(channels: int) -> int:
        return max(_FEWEST_CHANNELS, int(channels * width_mult))

    return [(scaled(channels // 2), scaled(channels)) for channels in _EXTRA_CHANNELS]


class _Sequence(FusedBlock, nn.Sequential):
    """Layers one after the other that are an inverted-residual block without a shortcut."""

    def _forward_plain(self, x: Tensor) -> Tensor:
        return nn.Sequential.forward(self, x)

    def _key(self) -> tuple[Any, ...]:
        return tuple(self.__dict__["_modules"].values())


class ExtraLayer(_Sequence):
    """1x1, BN, ReLU6, 3x3 depthwise of stride 2, BN, ReLU6, 1x1, BN, ReLU6, as one fused operator.

    Shapes: (n, c_in, h, w) to (n, c_out, ceil(h / 2), ceil(w / 2)).
    """

    def __init__(self, c_in: int, c_middle: int, c_out: int, norm_layer: NormLayer, tf_padding: bool) -> None:
        layer = partial(Conv2dNormActivation, norm_layer=norm_layer, activation_layer=nn.ReLU6)
        conv_layer = Conv2dSame if tf_padding else nn.Conv2d
        super().__init__(
            layer(c_in, c_middle, kernel_size=1),
            layer(c_middle, c_middle, stride=2, groups=c_middle, conv_layer=conv_layer),
            layer(c_middle, c_out, kernel_size=1),
        )

    def _parts(self) -> BlockParts | str:
        layers = [layer_parts(layer, str(i)) for i, layer in enumerate(self)]
        reason = next((parts for parts in layers if isinstance(parts, str)), None)
        if reason is not None or len(layers) != 3:
            return reason or f"it has {len(layers)} layers"
        return BlockParts(*layers, shortcut=False)


def _read_part(read: Callable[[Any, bool], Any], part: Callable[[BlockParts], Any]) -> Callable[[nn.Module, bool], Any]:
    def read_part(layer: nn.Module, train: bool) -> Any:
        parts = layer._parts()
        return parts if isinstance(parts, str) else read(part(parts), train)

    return read_part


# An extra layer in two. As one block it keeps all input channels of a tile on the chip: 1280 do not fit a GPU.
_EXTRA_EXPAND = DENSE._replace(read=_read_part(read_dense, lambda parts: parts.expand))
_EXTRA_REST = BLOCK._replace(read=_read_part(read_block, lambda parts: parts._replace(expand=None)))


class Predictor(_Sequence):
    """3x3 depthwise, BN, ReLU6, 1x1 with a bias, as one fused operator. Shapes: (n, c_in, h, w) to (n, c_out, h, w)."""

    def __init__(self, c_in: int, c_out: int, norm_layer: NormLayer) -> None:
        depthwise = Conv2dNormActivation(c_in, c_in, groups=c_in, norm_layer=norm_layer, activation_layer=nn.ReLU6)
        super().__init__(depthwise, nn.Conv2d(c_in, c_out, 1))

    def _parts(self) -> BlockParts | str:
        if len(self) != 2:
            return f"it has {len(self)} layers"
        depthwise = layer_parts(self[0], "0")
        if isinstance(depthwise, str):
            return depthwise
        return BlockParts(None, depthwise, ConvParts(self[1], None, None, ("1", "", "")), shortcut=False)


class Backbone(nn.Module):
    """MobileNetV2's `features`, and four `extra` layers that halve the map further.

    Shapes: (n, 3, h, w) to six maps "0" to "5", of ceil(h / 16) x ceil(w / 16) cells and half as many each time. Map 0
    is the expansion of block 14, map 1 the output of the last convolution. ``out_channels`` lists their channels.
    """

    def __init__(self, width_mult: float, norm_layer: NormLayer, tf_padding: bool) -> None:
        super().__init__()
        self.features = MobileNetV2(width_mult=width_mult, norm_layer=norm_layer, tf_padding=tf_padding).features
        old = self.features[TAP]
        c_in = old.conv[0][0].in_channels
        hidden = old.conv[0].out_channels
        self.features[TAP] = TappedInvertedResidual(
            c_in, old.out_channels, old.stride, hidden / c_in, norm_layer=norm_layer, tf_padding=tf_padding
        )
        self.out_channels = [hidden, self.features[-1].out_channels]
        self.extra = nn.ModuleList()
        for c_middle, c_out in extra_channels(width_mult):
            self.extra.append(ExtraLayer(self.out_channels[-1], c_middle, c_out, norm_layer, tf_padding))
            self.out_channels.append(c_out)
        draw_weights(self)

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        maps = []
        for i, unit in enumerate(self.features):
            if i == TAP:
                x, expanded = unit(x, with_expansion=True)
                maps.append(expanded)
            else:
                x = unit(x)
        maps.append(x)
        for layer in self.extra:
            x = layer(x)
            maps.append(x)
        return OrderedDict((str(i), each) for i, each in enumerate(maps))

    def entries(self) -> tuple[list[Entry], list[int]] | str:
        """The units of a network's operator, and which of them give the six maps; or why they run one by one."""
        reason = features_reason(self)
        if reason is None and (runs_as_module(self) or runs_as_module(self.extra)):
            reason = "the backbone has hooks"
        if reason is not None:
            return reason
        entries = chain(self.features[:TAP])
        block = self.features[TAP]
        if type(block) is not TappedInvertedResidual:
            return f"features.{TAP} does not hand out its expansion"
        tap = len(entries)
        entries.append(Entry(unit_of(block.conv[0]), block.conv[0], tap - 1))
        entries.append(Entry(AFTER_EXPANSION, block, tap))
        for module in self.features[TAP + 1 :]:
            entries.append(Entry(unit_of(module), module, len(entries) - 1))
        maps = [tap, len(entries) - 1]
        for layer in self.extra:
            if type(layer) is not ExtraLayer:
                return "an extra layer is of another class"
            entries.append(Entry(_EXTRA_EXPAND, layer, len(entries) - 1))
            entries.append(Entry(_EXTRA_REST, layer, len(entries) - 1))
            maps.append(len(entries) - 1)
        return entries, maps

    def freeze(self, trainable_layers: int) -> None:
        """Freezes the parameters of `features` except in the last `trainable_layers` of six stages.

        A stage begins at the stem, at each strided block and at the last convolution, as in torchvision.
        """
        strided = [i for i, unit in enumerate(self.features) if getattr(unit, "_is_cn", False)]
        starts = [0, *strided, len(self.features) - 1, len(self.features)]
        for parameter in self.features[: starts[-1 - trainable_layers]].parameters():
            parameter.requires_grad_(False)


class ScoringHead(nn.Module):
    """A predictor for each map. Maps (n, c, h, w) go in; (n, anchors of all maps, `columns`) comes out."""

    def __init__(self, in_channels: Sequence[int], columns: int, norm_layer: NormLayer) -> None:
        super().__init__()
        self.columns = columns
        pairs = zip(in_channels, ANCHORS, strict=True)
        self.module_list = nn.ModuleList(Predictor(c, anchors * columns, norm_layer) for c, anchors in pairs)
        draw_weights(self)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        return self.rows([predictor(x) for predictor, x in zip(self.module_list, maps, strict=True)])

    def rows(self, outputs: Sequence[Tensor]) -> Tensor:
        """The predictors' outputs (n, anchors of a cell * columns, h, w), anchor by anchor."""
        rows = [y.permute(0, 2, 3, 1).flatten(1).unflatten(1, (-1, self.columns)) for y in outputs]
        return torch.cat(rows, dim=1)


class Head(nn.Module):
    """Class logits (n, anchors, classes) and box codes (n, anchors, 4) from the six maps."""

    def __init__(self, in_channels: Sequence[int], num_classes: int, norm_layer: NormLayer) -> None:
        super().__init__()
        self.classification_head = ScoringHead(in_channels, num_classes, norm_layer)
        self.regression_head = ScoringHead(in_channels, 4, norm_layer)

    def forward(self, maps: Sequence[Tensor]) -> dict[str, Tensor]:
        return {"bbox_regression": self.regression_head(maps), "cls_logits": self.classification_head(maps)}

    def join(self, codes: Sequence[Tensor], logits: Sequence[Tensor]) -> dict[str, Tensor]:
        """What a call returns, from the outputs of the `predictors`."""
        return {
            "bbox_regression": self.regression_head.rows(codes),
            "cls_logits": self.classification_head.rows(logits),
        }

    def predictors(self) -> list[nn.Module] | str:
        """The predictors of box codes and then of logits, or the reason why they must be called by their heads."""
        heads = (self.regression_head, self.classification_head)
        if not all(keeps_forward(head, ScoringHead) for head in heads):
            return "a head is of another class"
        if any(runs_as_module(module) for head in heads for module in (self, head, head.module_list)):
            return "the head has hooks"
        return [predictor for head in heads for predictor in head.module_list]


def draw_weights(module: nn.Module) -> None:
    """Draws the weights of all convolutions from a normal distribution of standard deviation 0.03; biases become 0."""
    for conv in module.modules():
        if isinstance(conv, nn.Conv2d):
            nn.init.normal_(conv.weight, std=0.03)
            if conv.bias is not None:
                nn.init.zeros_(conv.bias)
