"""torchvision's MobileNetV2, with stem, blocks and head run fused if that gives the same answer."""

# No `from __future__ import annotations`: TorchScript reads these classes' annotations and does not parse strings.

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from mnv2_fused._core.geometry import make_divisible
from mnv2_fused.models.layers import Conv2dSame
from mnv2_fused.models.network import FusedNetwork
from mnv2_fused.models.units import (
    ExpansionFeatures,
    ExpansionResidual,
    Features,
    FusedConv2dNormActivation,
    InvertedResidual,
    check_shortcut,
    make_activation,
)

__all__ = ["SETTING", "MobileNetV2"]

# Expansion, channels, repeats and stride of each stage.
SETTING = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


class MobileNetV2(FusedNetwork):
    """MobileNetV2 with torchvision's arguments, state-dict keys, module tree and initialisation.

    Args:
        num_classes: outputs of the classifier.
        width_mult: multiplies the channel counts.
        inverted_residual_setting: (expansion, channels, repeats, stride) of each stage; the paper's by default.
        round_nearest: channel counts become multiples of this.
        block: makes a block, called as ``block(inp, oup, stride, expand_ratio=..., norm_layer=...)``, with
            ``dilation=``, ``tf_padding=``, ``project_activation=`` and ``shortcut=`` added if they are asked for;
            `InvertedResidual` by default.
        norm_layer: makes a norm from a channel count, ``nn.BatchNorm2d`` by default.
        dropout: probability of the dropout before the classifier.
        fused: False always runs plain PyTorch. Assigning to ``model.fused`` later switches the whole network.
        output_stride: 32, 16 or 8: strides beyond it become dilations. The first block that loses its stride keeps
            the dilation so far; later blocks take the new one.
        tf_padding: pad strided convolutions as TensorFlow's "SAME" does, for weights trained there.
        project_activation, shortcut: of the blocks, as for `InvertedResidual`; the paper's by default. With
            ``shortcut="expansion"`` stem and last convolution run fused, and everything else plain.
        recompute: how much training recomputes instead of saving it: ``"most"`` (least memory), ``"balanced"`` or
            ``"least"`` (most speed). Assigning to ``model.recompute`` later changes the whole network.

    Shapes: (n, 3, h, w) to (n, num_classes).

    Raises:
        ValueError: ``inverted_residual_setting``, ``output_stride``, ``project_activation``, ``shortcut`` or
            ``recompute`` has another form or value, or ``block`` makes blocks without a shortcut between expansions.

    Runs fused in float32, bfloat16 and float16: on the CPU in inference and training, on CUDA GPUs of compute
    capability 8.0 or later in inference. Everything else takes the plain path; `mnv2_fused.explain` tells which unit,
    and why.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        width_mult: float = 1.0,
        inverted_residual_setting: Sequence[Sequence[int]] | None = None,
        round_nearest: int = 8,
        block: Callable[..., nn.Module] | None = None,
        norm_layer: Callable[..., nn.Module] | None = None,
        dropout: float = 0.2,
        *,
        fused: bool = True,
        output_stride: int = 32,
        tf_padding: bool = False,
        project_activation: Callable[..., nn.Module] | None = None,
        shortcut: str = "bottleneck",
        recompute: str = "balanced",
    ) -> None:
        super().__init__()
        if block is None:
            block = InvertedResidual
        if norm_layer is None:
            norm_layer = nn.BatchNorm2d
        if inverted_residual_setting is None:
            inverted_residual_setting = SETTING
        if len(inverted_residual_setting) == 0 or any(len(row) != 4 for row in inverted_residual_setting):
            raise ValueError(
                "inverted_residual_setting should be non-empty, with 4 elements (expansion, channels, repeats, stride) "
                f"in each row, got {inverted_residual_setting}"
            )
        if output_stride not in (8, 16, 32):
            raise ValueError(f"output_stride should be 8, 16 or 32, got {output_stride}")
        check_shortcut(shortcut)
        make_activation(project_activation)  # a block of another kind may not check it
        variant: dict[str, Any] = {}
        if project_activation is not None:
            variant["project_activation"] = project_activation
        if shortcut != "bottleneck":
            variant["shortcut"] = shortcut

        channels = make_divisible(32 * width_mult, round_nearest)
        self.last_channel = make_divisible(1280 * max(1.0, width_mult), round_nearest)
        options = {"norm_layer": norm_layer, "activation_layer": nn.ReLU6}
        conv_layer = Conv2dSame if tf_padding else nn.Conv2d
        features: list[nn.Module] = [FusedConv2dNormActivation(3, channels, stride=2, conv_layer=conv_layer, **options)]
        reached, rate = 2, 1
        for expand_ratio, stage_channels, repeats, stage_stride in inverted_residual_setting:
            out_channels = make_divisible(stage_channels * width_mult, round_nearest)
            for i in range(repeats):
                stride = stage_stride if i == 0 else 1
                arguments: dict[str, Any] = dict(variant)
                if rate > 1:
                    arguments["dilation"] = rate
                if stride > 1 and reached >= output_stride:
                    rate *= stride
                    stride = 1
                reached *= stride
                if tf_padding and stride > 1:
                    arguments["tf_padding"] = True
                features.append(
                    block(channels, out_channels, stride, expand_ratio=expand_ratio, norm_layer=norm_layer, **arguments)
                )
                channels = out_channels
        features.append(FusedConv2dNormActivation(channels, self.last_channel, kernel_size=1, **options))
        if shortcut == "expansion":
            for unit in features[1:-1]:
                if not isinstance(unit, ExpansionResidual):
                    raise ValueError(
                        "block should make blocks that pass their expansion on, as InvertedResidual does with "
                        f"shortcut='expansion', got {type(unit).__name__}"
                    )
        self.features = (ExpansionFeatures if shortcut == "expansion" else Features)(*features)
        self.classifier = nn.Sequential(nn.Dropout(p=dropout), nn.Linear(self.last_channel, num_classes))

        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out")
                if m.bias is not None:
                    nn.init.zeros_(m.bias)
            elif isinstance(m, (nn.BatchNorm2d, nn.GroupNorm)):
                nn.init.ones_(m.weight)
                nn.init.zeros_(m.bias)
            elif isinstance(m, nn.Linear):
                nn.init.normal_(m.weight, 0, 0.01)
                nn.init.zeros_(m.bias)
        if not fused:
            self.fused = False
        if recompute != type(self).recompute:
            self.recompute = recompute

    def _forward_plain(self, x: Tensor) -> Tensor:
        return self._tail_plain(self.features(x))
