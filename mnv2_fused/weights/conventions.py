"""What weights expect of their images, of the padding and of batch norm."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

from torch import nn


@dataclasses.dataclass(frozen=True)
class Convention:
    """What weights expect of their images, of the padding and of batch norm.

    The shorter side of an image is resized to `resize`, then the centre is cropped to `crop` x `crop`. If `resize` is
    None, the whole image is resized to `crop` x `crop`. Pixels in 0..1 become `(pixel - mean) / std`.
    """

    name: str
    tf_padding: bool
    crop: int
    resize: int | None
    interpolation: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    eps: float = 1e-5
    momentum: float = 0.1  # in PyTorch's sense: the share of the batch

    def network(self) -> dict[str, Any]:
        """The arguments of `MobileNetV2` that follow."""
        norm_layer = partial(nn.BatchNorm2d, eps=self.eps, momentum=self.momentum)
        return {"tf_padding": self.tf_padding, "norm_layer": norm_layer}


TORCHVISION = Convention(
    name="torchvision",
    tf_padding=False,
    crop=224,
    resize=256,
    interpolation="bilinear",
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
)
TENSORFLOW = Convention(
    name="tensorflow",
    tf_padding=True,
    crop=224,
    resize=None,
    interpolation="bicubic",
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
)
TIMM = dataclasses.replace(TORCHVISION, name="timm", interpolation="bicubic")
# MobileNetV2ImageProcessor's images. Its networks state momentum 0.997, TensorFlow's share of the past.
TRANSFORMERS = dataclasses.replace(
    TENSORFLOW, name="transformers", resize=256, interpolation="bilinear", eps=1e-3, momentum=0.997
)
KERAS = dataclasses.replace(TENSORFLOW, name="keras", eps=1e-3, momentum=1 - 0.999)
CONVENTIONS = {c.name: c for c in (TORCHVISION, TENSORFLOW, TIMM, TRANSFORMERS, KERAS)}


def at_resolution(convention: Convention, resolution: int) -> Convention:
    """`convention` for inputs of `resolution` x `resolution`; the resize before the crop keeps its proportion."""
    resize = None if convention.resize is None else round(convention.resize * resolution / convention.crop)
    return dataclasses.replace(convention, crop=resolution, resize=resize)


def pads_as_tensorflow(name: str | None) -> bool:
    """Whether the convention of that name pads as TensorFlow does. None, no convention, does not."""
    return name is not None and CONVENTIONS[name].tf_padding
