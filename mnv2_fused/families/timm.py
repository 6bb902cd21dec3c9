"""timm's EfficientNet family: MobileNetV2, EfficientNet-Lite, MnasNet, FBNet and others, and single blocks."""

# No `from __future__ import annotations`: TorchScript reads these classes' annotations and does not parse strings.

from typing import Any

import torch
from torch import Tensor, nn

from mnv2_fused._core import call, operators
from mnv2_fused._core.decide import Unit
from mnv2_fused._core.kinds import class_name
from mnv2_fused._core.read import BlockParts, ConvParts, child_reason, identity_reason, read_head
from mnv2_fused._core.run import run
from mnv2_fused.families import Kind, find_kinds
from mnv2_fused.families.chain import Chain, Part, ReturnsMaps, ReturnsTensor, entries, inside
from mnv2_fused.models.fused import NETWORK, Asked, Entry, FusedBlock, FusedDense, FusedUnit, Walk

NAME = "a network of timm's EfficientNet family or one of its blocks (timm.models)"


def _parts(block: nn.Module, conv: str, norm: str) -> ConvParts:
    return ConvParts(getattr(block, conv), getattr(block, norm), None, (conv, norm, f"{norm}.act"))


def _more(block: nn.Module) -> str | None:
    """Why a block does more than its convolutions and norms."""
    if getattr(block, "conv_s2d", None) is not None:
        return "conv_s2d moves pixels to channels"
    return (
        identity_reason(getattr(block, "aa", None), "aa")
        or identity_reason(block.se, "se")
        or (_drop_path_reason(block.drop_path) if block.has_skip else None)
    )


def _drop_path_reason(drop_path: nn.Module) -> str | None:
    if class_name(drop_path) == ("timm.layers.drop", "DropPath"):
        return (
            "drop_path is active"
            if drop_path.training and drop_path.drop_prob
            else child_reason(drop_path, "drop_path")
        )
    return identity_reason(drop_path, "drop_path")


class Block(FusedBlock):
    """timm's InvertedResidual: expansion, depthwise, projection, each with a norm that may have an activation."""

    @torch.jit.unused
    def _key(self) -> tuple[Any, ...]:
        d = self.__dict__
        return *d["_modules"].values(), d["has_skip"]

    @torch.jit.unused
    def _parts(self) -> BlockParts | str:
        return _more(self) or BlockParts(
            _parts(self, "conv_pw", "bn1"),
            _parts(self, "conv_dw", "bn2"),
            _parts(self, "conv_pwl", "bn3"),
            bool(self.has_skip),
        )


class SeparableBlock(Block):
    """timm's DepthwiseSeparableConv: depthwise and projection."""

    @torch.jit.unused
    def _parts(self) -> BlockParts | str:
        return _more(self) or BlockParts(
            None, _parts(self, "conv_dw", "bn1"), _parts(self, "conv_pw", "bn2"), bool(self.has_skip)
        )


class Dense(FusedDense):
    """timm's ConvBnAct: a convolution and its norm."""

    @torch.jit.unused
    def _key(self) -> tuple[Any, ...]:
        d = self.__dict__
        return *d["_modules"].values(), d["has_skip"]

    @torch.jit.unused
    def _parts(self) -> ConvParts | str:
        if self.has_skip:
            return "it has a shortcut"
        return identity_reason(getattr(self, "aa", None), "aa") or _parts(self, "conv", "bn1")


# ---------------------------------------------------------------------------------------------------------- networks


class _WithParts:
    """A network for its own plain methods, with parts that run fused in place of a convolution and its norm."""

    def __init__(self, network: "Stages", parts: dict[str, Part]) -> None:
        self._network = network
        for norm, part in parts.items():
            setattr(self, part.name, _Runs(part))
            setattr(self, norm, nn.Identity())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._network, name)


class _Runs:
    def __init__(self, part: Part) -> None:
        self._part = part

    def __call__(self, x: Tensor) -> Tensor:
        walk = Walk(x)
        walk.step(self._part)
        return walk.plain()


class Stages(Chain):
    """A network with the children conv_stem, bn1 and blocks, which is a sequence of stages."""

    _part_names = ("maps", "conv_stem")
    _methods: tuple[str, ...] = ()  # that the fused forward does not call, and their code counts

    @torch.jit.unused
    def _stem(self) -> Part:
        return Part(self, "conv_stem", (self.conv_stem, self.bn1), self._opened() or _parts(self, "conv_stem", "bn1"))

    @torch.jit.unused
    def _called(self) -> str | None:
        """Why the plain forward has to call the network's links."""
        return self._overrides() or ("grad_checkpointing is on" if self._checkpoints() else None)

    @torch.jit.unused
    def _opened(self) -> str | None:
        """Why the plain forward has to call the modules of the parts."""
        return self._called()

    @torch.jit.unused
    def _overrides(self) -> str | None:
        for method in self._methods:
            if method in self.__dict__:
                return f"the network overrides {method}"
        return None

    @torch.jit.unused
    def _links(self) -> list[Any] | str:
        return self._called() or [self._stem(), *inside(self.blocks, depth=2)]

    @torch.jit.unused
    def _links_key(self) -> tuple[Any, ...]:
        d = self.__dict__
        return *d["_modules"].values(), *map(d.get, self._methods), self._checkpoints()

    @torch.jit.unused
    def _asked(self) -> list[Asked]:
        return [self._stem().asked()]


class MobileNetV3(Stages):
    """timm's MobileNetV3, whose head pools before its last convolution."""

    _plain_methods = (("forward_features", "_features_plain"), ("forward_intermediates", "_intermediates_plain"))

    def forward_features(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return self._features_plain(x)
        else:
            return self._features_fused(x)

    @torch.jit.unused
    def _features_fused(self, x: Tensor) -> Tensor:
        maps = self._maps(x)
        if maps is not None:
            return maps[0]
        # The plain method checkpoints the blocks. Stem and last convolution run fused in it, too.
        network = self._with_parts() if self._checkpoints() and call.call_reason(x) is None else self
        return type(self)._features_plain(network, x)

    @torch.jit.unused
    def forward_intermediates(self, x: Tensor, *arguments: Any, **keywords: Any) -> Any:
        network = self._with_parts() if call.call_reason(x) is None else self
        return type(self)._intermediates_plain(network, x, *arguments, **keywords)

    @torch.jit.unused
    def _with_parts(self) -> Any:
        return _WithParts(self, {"bn1": self._stem()})

    @torch.jit.unused
    def _opened(self) -> str | None:
        return self._overrides()


class EfficientNet(MobileNetV3, ReturnsTensor):
    """timm's EfficientNet: stages, a last convolution, pooling over all pixels, and a classifier."""

    _plain_methods = (("forward", "_forward_plain"), *MobileNetV3._plain_methods)
    _part_names = ("maps", "conv_stem", "conv_head")
    _methods = ("forward_features", "forward_head")

    @torch.jit.unused
    def _forward_fused(self, x: Tensor) -> Tensor:
        outputs = run(NETWORK, self, x)
        return self._forward_plain(x) if outputs is None else outputs[0]

    @torch.jit.unused
    def _has_last(self) -> bool:
        return not (type(self.conv_head) is nn.Identity and type(self.bn2) is nn.Identity)

    @torch.jit.unused
    def _last(self) -> Part:
        return Part(self, "conv_head", (self.conv_head, self.bn2), self._opened() or _parts(self, "conv_head", "bn2"))

    @torch.jit.unused
    def _with_parts(self) -> Any:
        return _WithParts(self, {"bn1": self._stem(), **({"bn2": self._last()} if self._has_last() else {})})

    @torch.jit.unused
    def _links(self) -> list[Any] | str:
        links = super()._links()
        return links if isinstance(links, str) or not self._has_last() else [*links, self._last()]

    @torch.jit.unused
    def _asked(self) -> list[Asked]:
        return [*super()._asked(), *([self._last().asked()] if self._has_last() else [])]

    @torch.jit.unused
    def _entries(self) -> list[Entry] | str:
        links = self._links()
        if isinstance(links, str):
            return links
        if not self._has_last():
            return "there is no convolution before the pooling"
        if self.training and self.drop_rate > 0:
            return "drop_rate is active"
        reason = _pool_reason(self.global_pool)
        if reason is not None:
            return reason
        return [*entries(links[:-1]), Entry(HEAD, self, len(links) - 2, tap=True)]

    @torch.jit.unused
    def _network_key(self) -> tuple[Any, ...]:
        return *self._links_key(), self.training, self.drop_rate


def _pool_reason(pool: nn.Module) -> str | None:
    """Why `pool` is not the mean over all pixels, as (n, channels)."""
    if class_name(pool) != ("timm.layers.adaptive_avgmax_pool", "SelectAdaptivePool2d"):
        return f"global_pool is a {type(pool).__name__}"
    mean, flatten = pool.pool, pool.flatten
    if type(mean) is nn.AdaptiveAvgPool2d and mean.output_size in (1, (1, 1)):
        flat = type(flatten) is nn.Flatten and (flatten.start_dim, flatten.end_dim) == (1, -1)
    elif class_name(mean) == ("timm.layers.adaptive_avgmax_pool", "FastAdaptiveAvgPool"):
        flat = mean.flatten and tuple(mean.dim) == (2, 3) and type(flatten) is nn.Identity
    else:
        return f"global_pool.pool is a {type(mean).__name__}"
    if not flat:
        return "global_pool does not flatten"
    return (
        child_reason(pool, "global_pool") or child_reason(mean, "global_pool") or child_reason(flatten, "global_pool")
    )


HEAD = Unit(
    operators.HEAD,
    lambda network, train: read_head(_parts(network, "conv_head", "bn2"), network.classifier),
    lambda network: network._network_key(),
)


class Features(Stages, ReturnsMaps):
    """timm's EfficientNetFeatures: the maps behind stem and stages."""

    @torch.jit.unused
    def _called(self) -> str | None:
        if self.feature_hooks is not None:
            return "the network has feature hooks"
        if inside(self.blocks) == [self.blocks]:
            return "blocks has hooks, or a forward of its own"
        taps = self._taps()
        return super()._called() if 0 < len(taps) == len(set(taps)) else "the network returns no map, or one twice"

    @torch.jit.unused
    def _taps(self) -> tuple[int, ...]:
        # The last link of the stem and of each stage.
        ends = [0]
        for stage in self.blocks:
            ends.append(ends[-1] + len(inside(stage)))
        return tuple(end for i, end in enumerate(ends) if i in self._stage_out_idx)


class MobileNetV3Features(Features):
    """timm's MobileNetV3Features: its stem has the activation apart."""

    @torch.jit.unused
    def _stem(self) -> Part:
        modules = (self.conv_stem, self.bn1, self.act1)
        return Part(self, "conv_stem", modules, self._called() or ConvParts(*modules, ("conv_stem", "bn1", "act1")))


_BLOCKS, _NETWORK, _NETWORK_V3 = (
    "timm.models._efficientnet_blocks",
    "timm.models.efficientnet",
    "timm.models.mobilenetv3",
)
_FEATURES = frozenset("conv_stem bn1 grad_checkpointing torch jit is_scripting checkpoint_seq blocks".split())
_MAPS = frozenset(
    "conv_stem bn1 feature_hooks _stage_out_idx append enumerate blocks grad_checkpointing torch jit is_scripting "
    "checkpoint get_output device list values".split()
)
_NEWER = frozenset(("conv_s2d", "bn_s2d", "aa"))  # timm 1.0.3 has none of these
_FORWARD = frozenset(("forward_features", "forward_head"))

KINDS = {
    (_BLOCKS, "InvertedResidual"): Kind(
        Block,
        {"forward": frozenset("conv_s2d bn_s2d conv_pw bn1 conv_dw bn2 aa se conv_pwl bn3 has_skip drop_path".split())},
        _NEWER,
    ),
    (_BLOCKS, "DepthwiseSeparableConv"): Kind(
        SeparableBlock,
        {"forward": frozenset("conv_s2d bn_s2d conv_dw bn1 aa se conv_pw bn2 has_skip drop_path".split())},
        _NEWER,
    ),
    (_BLOCKS, "ConvBnAct"): Kind(Dense, {"forward": frozenset("conv bn1 aa has_skip drop_path".split())}, _NEWER),
    (_NETWORK, "EfficientNet"): Kind(
        EfficientNet,
        {
            "forward": _FORWARD,
            "forward_features": _FEATURES | {"conv_head", "bn2"},
            "forward_head": frozenset("global_pool drop_rate F dropout training classifier".split()),
        },
    ),
    (_NETWORK, "EfficientNetFeatures"): Kind(Features, {"forward": _MAPS}),
    (_NETWORK_V3, "MobileNetV3"): Kind(MobileNetV3, {"forward": _FORWARD, "forward_features": _FEATURES}),
    (_NETWORK_V3, "MobileNetV3Features"): Kind(MobileNetV3Features, {"forward": _MAPS | {"act1"}}),
}


def find(model: nn.Module) -> list[tuple[nn.Module, type[FusedUnit]]]:
    """The modules in `model` that can be converted, each with its mixin."""
    return find_kinds(model, KINDS)
