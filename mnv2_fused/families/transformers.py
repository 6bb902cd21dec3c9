"""transformers' MobileNetV2: the model, its classification and segmentation networks, and single blocks."""

from typing import Any

import torch
from torch import Tensor, nn

from mnv2_fused._core import operators
from mnv2_fused._core.decide import Unit
from mnv2_fused._core.read import BlockParts, ConvParts, child_reason, read_head, runs_as_module
from mnv2_fused._core.run import run
from mnv2_fused._core.specs import HeadSpec
from mnv2_fused.families import Kind, find_kinds, is_converted, kind_of
from mnv2_fused.families.chain import Chain, Maps, Part, entries
from mnv2_fused.models.fused import BLOCK, NETWORK, Asked, Entry, FusedBlock, FusedDense, FusedModel, FusedUnit

NAME = "transformers' MobileNetV2 or one of its blocks (transformers.models.mobilenet_v2)"


class _StandIn:
    """What a plain forward takes for its model, with results in place of modules."""

    def __init__(self, **attributes: Any) -> None:
        self.__dict__.update(attributes)


def _layer(layer: nn.Module, name: str) -> ConvParts | str:
    """The parts of a MobileNetV2ConvLayer that is called `name`."""
    if kind_of(layer, LAYERS) is None:
        return f"{name} is a {type(layer).__name__}, not transformers' MobileNetV2ConvLayer"
    return child_reason(layer, name) or _conv(layer, f"{name}.")


def _conv(layer: nn.Module, prefix: str = "") -> ConvParts | str:
    conv, activation, same = layer.convolution, layer.activation, bool(layer.config.tf_padding)
    if activation is not None and not isinstance(activation, nn.Module):
        return f"{prefix}activation is a {type(activation).__name__}, not an nn.ReLU6"
    # The layer multiplies the padding for no dilation by the dilation. That is "SAME" if one of the two is 1.
    if same and max(conv.stride) > 1 and max(conv.dilation) > 1:
        return f"{prefix}convolution has a stride and a dilation"
    names = (f"{prefix}convolution", f"{prefix}normalization", f"{prefix}activation")
    return ConvParts(conv, layer.normalization, activation, names, same)


def _block(owner: nn.Module, expand: nn.Module | None, shortcut: bool) -> BlockParts | str:
    convs: list[ConvParts | None] = [None]
    for name in ("expand_1x1", "conv_3x3", "reduce_1x1"):
        if name == "expand_1x1" and expand is None:
            continue
        parts = _layer(getattr(owner, name), name)
        if isinstance(parts, str):
            return parts
        convs.append(parts)
    return BlockParts(*convs[-3:], shortcut)


def _paddings(*owners: nn.Module) -> tuple[Any, ...]:
    """The switches for padding of all layers inside. They are in objects that are no modules."""
    children = (child for owner in owners for child in owner.__dict__["_modules"].values() if child is not None)
    configs = {id(config): config for child in children if (config := child.__dict__.get("config")) is not None}
    return tuple(getattr(config, "tf_padding", None) for config in configs.values())


class Layer(FusedDense):
    """MobileNetV2ConvLayer, as a dense convolution."""

    @torch.jit.unused
    def _key(self) -> tuple[Any, ...]:
        d = self.__dict__
        return *d["_modules"].values(), d.get("normalization"), d.get("activation"), bool(d["config"].tf_padding)

    @torch.jit.unused
    def _parts(self) -> ConvParts | str:
        return _conv(self)


class Block(FusedBlock):
    """MobileNetV2InvertedResidual."""

    @torch.jit.unused
    def _key(self) -> tuple[Any, ...]:
        d = self.__dict__
        return *d["_modules"].values(), d["use_residual"], *_paddings(self)

    @torch.jit.unused
    def _parts(self) -> BlockParts | str:
        return _block(self, self.expand_1x1, bool(self.use_residual))


class _Block(Part):
    """The stem's block, as a part."""

    def _key(self) -> tuple[Any, ...]:
        return *super()._key(), *_paddings(self.owner)


class Stem(Chain):
    """MobileNetV2Stem: a dense convolution, then a block without a shortcut that is no module of its own."""

    _part_names = ("maps", "conv_3x3")

    def forward(self, features: Tensor) -> Tensor:
        maps = self._maps(features)
        return self._forward_plain(features) if maps is None else maps[0]

    @torch.jit.unused
    def _part(self) -> Part:
        modules = tuple(m for m in (self.expand_1x1, self.conv_3x3, self.reduce_1x1) if m is not None)
        return _Block(self, "conv_3x3", modules, _block(self, self.expand_1x1, False), BLOCK)

    @torch.jit.unused
    def _links(self) -> list[Any] | str:
        return [self.first_conv, self._part()]

    @torch.jit.unused
    def _links_key(self) -> tuple[Any, ...]:
        return *self.__dict__["_modules"].values(), *_paddings(self)

    @torch.jit.unused
    def _asked(self) -> list[Asked]:
        return [self._part().asked()]


# ---------------------------------------------------------------------------------------------------------- networks


class Named(FusedModel):
    """A PreTrainedModel. The name of its class goes into configurations, and tells pipelines and losses what it is."""

    _keeps_name = True


class Model(Named, Chain):
    """MobileNetV2Model: stem, blocks and a last convolution."""

    def forward(
        self,
        pixel_values: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        arguments = {"output_hidden_states": output_hidden_states, "return_dict": return_dict, **kwargs}
        hidden = _asks_for_hidden(self, output_hidden_states)
        last = len(self.layer)
        first = len(self._stem()) - 1
        taps = tuple(range(first + 1, first + last + 2)) if hidden else None
        maps = None if pixel_values is None else self._maps(pixel_values, taps)
        if maps is None:
            return self._forward_plain(pixel_values, **arguments)
        *layers, features = maps if hidden else [None] * last + maps
        found = _StandIn(
            config=self.config,
            conv_stem=lambda x: None,
            layer=[lambda x, y=y: y for y in layers],
            conv_1x1=lambda x: features,
            pooler=self.pooler,
        )
        return type(self)._forward_plain(found, pixel_values, **arguments)

    @torch.jit.unused
    def _stem(self) -> list[Any]:
        """The links of the stem, or the stem as one if it has to be called."""
        stem = self.conv_stem
        inside = isinstance(stem, Stem) and stem.fused and not runs_as_module(stem)
        return stem._links() if inside else [stem]

    @torch.jit.unused
    def _links(self) -> list[Any] | str:
        return [*self._stem(), *self.layer, self.conv_1x1]

    @torch.jit.unused
    def _links_key(self) -> tuple[Any, ...]:
        return *self.__dict__["_modules"].values(), *self._paddings()

    @torch.jit.unused
    def _paddings(self) -> tuple[Any, ...]:
        children = self.__dict__["_modules"]
        return _paddings(self, children["conv_stem"], *children["layer"])


class Classification(Named):
    """MobileNetV2ForImageClassification: the model, dropout and a linear layer."""

    def forward(
        self,
        pixel_values: Tensor | None = None,
        output_hidden_states: bool | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        arguments = {
            "output_hidden_states": output_hidden_states,
            "labels": labels,
            "return_dict": return_dict,
            **kwargs,
        }
        if pixel_values is None or _asks_for_hidden(self.mobilenet_v2, output_hidden_states):
            return self._forward_plain(pixel_values, **arguments)
        outputs = run(NETWORK, self, pixel_values)
        if outputs is None:
            return self._forward_plain(pixel_values, **arguments)
        found = _StandIn(
            config=self.config,
            mobilenet_v2=_returns(pooler_output=None, hidden_states=None),
            dropout=lambda x: x,
            classifier=lambda x: outputs[0],
        )
        if labels is not None:
            found.loss_function = self.loss_function
        return type(self)._forward_plain(found, pixel_values, **arguments)

    @torch.jit.unused
    def _wholes(self) -> list[tuple[Unit, Any]]:
        return [(NETWORK, self)]

    @torch.jit.unused
    def _entries(self) -> list[Entry] | str:
        reason = _model_reason(self.mobilenet_v2)
        if reason is not None:
            return reason
        links = self.mobilenet_v2._links()
        return [*entries(links[:-1]), Entry(HEAD, self, len(links) - 2, tap=True)]

    @torch.jit.unused
    def _network_key(self) -> tuple[Any, ...]:
        children = self.__dict__["_modules"]
        model = children["mobilenet_v2"]
        paddings = model._paddings() if isinstance(model, Model) else ()
        return model, children["dropout"], children["classifier"], self.training, *paddings


class Segmentation(Named):
    """MobileNetV2ForSemanticSegmentation, whose head takes the output of the last block."""

    def forward(
        self,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        arguments = {
            "labels": labels,
            "output_hidden_states": output_hidden_states,
            "return_dict": return_dict,
            **kwargs,
        }
        model = self.mobilenet_v2
        maps = None
        whole = pixel_values is None or _asks_for_hidden(self, output_hidden_states)
        if not whole and self.fused and _model_reason(model) is None:
            maps = model._maps(pixel_values, self._taps())
        if maps is None:
            return self._forward_plain(pixel_values, **arguments)
        found = _StandIn(
            config=self.config,
            mobilenet_v2=_returns(last_hidden_state=None, hidden_states=maps),
            segmentation_head=self.segmentation_head,
        )
        return type(self)._forward_plain(found, pixel_values, **arguments)

    @torch.jit.unused
    def _taps(self) -> tuple[int, ...]:
        return (len(self.mobilenet_v2._links()) - 2,)

    @torch.jit.unused
    def _wholes(self) -> list[tuple[Unit, Any]]:
        return [] if _model_reason(self.mobilenet_v2) else [(NETWORK, Maps(self.mobilenet_v2, self._taps()))]


def _returns(**outputs: Any) -> Any:
    """A model that returns `outputs`: a tuple of them if it is asked for no dictionary."""

    def model(pixel_values: Tensor, output_hidden_states: bool | None, return_dict: bool) -> Any:
        return _StandIn(**outputs) if return_dict else tuple(outputs.values())

    return model


def _asks_for_hidden(model: nn.Module, output_hidden_states: bool | None) -> bool:
    return bool(model.config.output_hidden_states if output_hidden_states is None else output_hidden_states)


def _model_reason(model: nn.Module) -> str | None:
    """Why `model` has to be called as a module."""
    if not isinstance(model, Model) or not model.fused or runs_as_module(model):
        return "mobilenet_v2 is of another class, switched off or hooked"
    return None


def _read_head(network: nn.Module) -> HeadSpec | str:
    last, pooler, dropout = network.mobilenet_v2.conv_1x1, network.mobilenet_v2.pooler, network.dropout
    if not isinstance(last, Layer) or not last.fused:
        return "mobilenet_v2.conv_1x1 is of another class or switched off"
    if type(pooler) is not nn.AdaptiveAvgPool2d or pooler.output_size not in (1, (1, 1)):
        return "mobilenet_v2.pooler is not nn.AdaptiveAvgPool2d(1)"
    if type(dropout) is not nn.Dropout or (dropout.training and dropout.p > 0):
        return "dropout drops out, or is no nn.Dropout"
    return (
        child_reason(last, "mobilenet_v2.conv_1x1")
        or child_reason(pooler, "mobilenet_v2.pooler")
        or child_reason(dropout, "dropout")
        or read_head(_conv(last, "mobilenet_v2.conv_1x1."), network.classifier)
    )


HEAD = Unit(operators.HEAD, lambda network, train: _read_head(network), lambda network: network._network_key())

_MODULE = "transformers.models.mobilenet_v2.modeling_mobilenet_v2"


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


LAYERS = {
    (_MODULE, "MobileNetV2ConvLayer"): Kind(
        Layer, {"forward": _names("config tf_padding apply_tf_padding convolution normalization activation")}
    )
}


def _kinds(returns: str) -> dict[tuple[str, str], Kind]:
    """The classes of a version whose configuration has the attribute `returns`."""
    return {
        (_MODULE, "MobileNetV2InvertedResidual"): Kind(
            Block, {"forward": _names("expand_1x1 conv_3x3 reduce_1x1 use_residual")}
        ),
        (_MODULE, "MobileNetV2Stem"): Kind(Stem, {"forward": _names("first_conv expand_1x1 conv_3x3 reduce_1x1")}),
        (_MODULE, "MobileNetV2Model"): Kind(
            Model,
            {
                "forward": _names(
                    f"config output_hidden_states {returns} ValueError conv_stem enumerate layer conv_1x1 pooler torch "
                    "flatten tuple BaseModelOutputWithPoolingAndNoAttention"
                )
            },
        ),
        (_MODULE, "MobileNetV2ForImageClassification"): Kind(
            Classification,
            {
                "forward": _names(
                    f"config {returns} mobilenet_v2 pooler_output classifier dropout loss_function hidden_states "
                    "ImageClassifierOutputWithNoAttention"
                )
            },
        ),
        (_MODULE, "MobileNetV2ForSemanticSegmentation"): Kind(
            Segmentation,
            {
                "forward": _names(
                    f"config output_hidden_states {returns} num_labels ValueError mobilenet_v2 hidden_states "
                    "segmentation_head nn functional interpolate shape CrossEntropyLoss semantic_loss_ignore_index "
                    "SemanticSegmenterOutput"
                )
            },
        ),
    }


VERSIONS = (_kinds("return_dict"), _kinds("use_return_dict"))  # transformers 5, and 4
# Layers that are no part of a block, by the class that calls them.
_DENSE = {
    "MobileNetV2Stem": ("first_conv",),
    "MobileNetV2Model": ("conv_1x1",),
    "MobileNetV2DeepLabV3Plus": ("conv_pool", "conv_aspp", "conv_projection"),
}


def find(model: nn.Module) -> list[tuple[nn.Module, type[FusedUnit]]]:
    """The modules in `model` that can be converted, each with its mixin."""
    found = {module: mixin for kinds in VERSIONS for module, mixin in find_kinds(model, kinds)}
    for owner in model.modules():
        kind = type(owner)._kind if is_converted(owner) else type(owner)
        for child in _DENSE.get(kind.__qualname__, ()) if kind.__module__ == _MODULE else ():
            layer = getattr(owner, child, None)
            if isinstance(layer, nn.Module) and kind_of(layer, LAYERS) is not None:
                found[layer] = Layer
    return list(found.items())
