"""What weights expect of their images and of the padding."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Convention:
    """What weights expect of their images and of the padding.

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
CONVENTIONS = {c.name: c for c in (TORCHVISION, TENSORFLOW)}


def at_resolution(convention: Convention, resolution: int) -> Convention:
    """`convention` for inputs of `resolution` x `resolution`; the resize before the crop keeps its proportion."""
    resize = None if convention.resize is None else round(convention.resize * resolution / convention.crop)
    return dataclasses.replace(convention, crop=resolution, resize=resize)
