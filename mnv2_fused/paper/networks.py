"""The networks of the paper's tables, from this package or from another library. Nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from mnv2_fused import builders, extras
from mnv2_fused.models.mobilenet_v2 import MobileNetV2
from mnv2_fused.paper import printed


class Network(NamedTuple):
    """`build` makes a network with new weights, in training mode. `source` names the library and its network.

    `extra` is this package's optional dependency that installs the library, or None.
    """

    source: str
    build: Callable[..., nn.Module]
    extra: str | None = None

    def make(self, device: str = "cpu", **options: object) -> nn.Module:
        """The network in eval mode on `device`. `options` go to `build`. Raises extras.MissingExtraError."""
        with torch.device(device):
            return self.build(**options).eval()

    @property
    def needs(self) -> str:
        """What to say if `make` misses its library."""
        return f'needs pip install "mnv2_fused[{self.extra}]"'


def _mobilenet_v1() -> nn.Module:
    return extras.use("timm", "tables").create_model("mobilenetv1_100", pretrained=False)


def _shufflenet(width: float) -> nn.Module:
    module = extras.use("pytorchcv.models.shufflenet", "tables")
    return module.get_shufflenet(groups=3, width_scale=width)


def _nasnet() -> nn.Module:
    return extras.use("pytorchcv.models.nasnet", "tables").nasnet_4a1056()


def _ssd300() -> nn.Module:
    module = extras.use("torchvision.models.detection", "detection")
    return module.ssd300_vgg16(weights=None, weights_backbone=None, num_classes=81)


def _resnet(output_stride: int, aspp: bool) -> nn.Module:
    module = extras.use("torchvision.models.segmentation", "segmentation")
    return module.deeplabv3_resnet101(weights=None, weights_backbone=None, num_classes=21, aux_loss=False)


def _deeplab(output_stride: int, aspp: bool) -> nn.Module:
    return builders.deeplabv3_mobilenet_v2(output_stride=output_stride, aspp=aspp, fused=False)


CLASSIFIERS = {
    "MobileNetV1": Network("timm mobilenetv1_100", _mobilenet_v1, "tables"),
    "ShuffleNet (1.5)": Network("pytorchcv ShuffleNet, g 3", lambda: _shufflenet(1.5), "tables"),
    "ShuffleNet (x2)": Network("pytorchcv ShuffleNet, g 3", lambda: _shufflenet(2.0), "tables"),
    "NasNet-A": Network("pytorchcv nasnet_4a1056", _nasnet, "tables"),
    "MobileNetV2": Network("here", MobileNetV2),
    "MobileNetV2 (1.4)": Network("here", lambda **options: MobileNetV2(width_mult=1.4, **options)),
}

DETECTORS = {
    "SSD300": Network("torchvision ssd300_vgg16", _ssd300, "detection"),
    "MNet V2 + SSDLite": Network(
        "here", lambda: builders.ssdlite320_mobilenet_v2(num_classes=81, fused=False), "detection"
    ),
}


def segmenter(inference: printed.Inference) -> Network | None:
    """The network of a line of Table 7; None if no library has it."""
    if inference.backbone == "MNet V2":
        return Network("here", _deeplab)
    if inference.backbone == "ResNet-101" and inference.output_stride == 8:
        return Network("torchvision deeplabv3_resnet101", _resnet, "segmentation")
    return None
