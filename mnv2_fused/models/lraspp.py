"""torchvision's LR-ASPP, MobileNetV3's segmentation network, on MobileNetV2."""

from __future__ import annotations

from typing import Any

from torch import nn

from mnv2_fused import extras
from mnv2_fused.models.backbone import LAST_BLOCK, Backbone

__all__ = ["lraspp"]

LOW_BLOCK = 6  # the last block of stride 8


def lraspp(
    num_classes: int = 21, *, output_stride: int = 16, tf: bool = False, fused: bool = True, **options: Any
) -> nn.Module:
    """torchvision's ``LRASPP`` with `Backbone` as its backbone; see `mnv2_fused.lraspp_mobilenet_v2`.

    Raises:
        mnv2_fused.extras.MissingExtraError: torchvision is not installed.
    """
    theirs = extras.use("torchvision.models.segmentation.lraspp", "segmentation")
    options |= {"output_stride": output_stride, "tf_padding": tf, "fused": fused}
    backbone = Backbone({"low": LOW_BLOCK, "high": LAST_BLOCK}, **options)
    return theirs.LRASPP(backbone, backbone.channels(LOW_BLOCK), backbone.channels(LAST_BLOCK), num_classes)
