"""Decodes photographs, and prepares them as a convention asks."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import TypeVar

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from mnv2_fused.weights import HEAD, Convention, other_kind

_T = TypeVar("_T")
_INTERPOLATION = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


class ImageError(ValueError):
    """An image that cannot be found or decoded."""


def read(path: str | os.PathLike) -> Image.Image:
    """The image at `path` as RGB, turned upright as its EXIF data says; transparency is dropped.

    Raises:
        ImageError: no such file, not an image, damaged, or so large that decoding it is not safe.
    """
    return decode(path, _upright)


def read_annotated(path: str | os.PathLike) -> Image.Image:
    """The image at `path` as RGB, for boxes or a mask that were made for its stored pixels.

    Raises:
        ImageError: as `read`; its EXIF data turn or mirror it, so that the annotations may be for either.
    """

    def upright(image: Image.Image) -> Image.Image:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        if orientation not in (0, 1):
            raise ImageError(
                f"{path}: expected an image that is stored upright, because its annotations are in pixels; got EXIF "
                f"orientation {orientation}. Save it upright, with annotations that fit"
            )
        return _upright(image)

    return decode(path, upright)


def decode(path: str | os.PathLike, convert: Callable[[Image.Image], _T]) -> _T:
    """What `convert` makes of the loaded image at `path`. Raises ImageError as `read`."""
    try:
        with Image.open(path) as image:
            image.load()
            return convert(image)
    except FileNotFoundError:
        if "://" in os.fspath(path):
            raise ImageError(f"expected the path of an image, got a URL: {path}. Download the image first") from None
        raise ImageError(f"no such image: {path}") from None
    except IsADirectoryError:
        raise ImageError(f"expected an image, got a directory: {path}") from None
    except UnidentifiedImageError:
        with open(path, "rb") as file:
            kind = other_kind(file.read(HEAD))
        if kind is not None:
            raise ImageError(f"expected an image in {path}, got {kind}") from None
        raise ImageError(f"not an image, or of a kind that Pillow does not read: {path}") from None
    except Image.DecompressionBombError as error:
        raise ImageError(f"{path} is too large to decode safely: {error}") from None
    except ImageError:
        raise
    except (OSError, SyntaxError, ValueError) as error:  # Pillow raises all three for damaged files
        raise ImageError(f"{path} is damaged or cannot be read: {error}") from None


def fit(image: Image.Image, convention: Convention, resolution: int | None = None) -> Image.Image:
    """`image` resized and cropped to the network's input size, in pixels.

    `resolution` replaces the convention's size. The resize before a central crop keeps its proportion to it.
    """
    size = convention.crop if resolution is None else resolution
    filter_ = _INTERPOLATION[convention.interpolation]
    if convention.resize is None:
        return image.resize((size, size), filter_)
    return _resize_and_crop(image, round(convention.resize * size / convention.crop), size, filter_)


def pixels(image: Image.Image) -> torch.Tensor:
    """The pixels of an RGB image: (3, height, width), uint8."""
    return torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1)


def normalize(image: Image.Image | torch.Tensor, convention: Convention) -> torch.Tensor:
    """An RGB image, or its `pixels`, as the network's input: (3, height, width), float32."""
    values = (image if isinstance(image, torch.Tensor) else pixels(image)).to(torch.float32).div_(255)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (convention.mean, convention.std))
    return ((values - mean) / std).contiguous()


def prepare(image: Image.Image, convention: Convention, resolution: int | None = None) -> torch.Tensor:
    """`fit`, then `normalize`: the network's input (3, resolution, resolution), float32."""
    return normalize(fit(image, convention, resolution), convention)


def load_batch(
    paths: Iterable[str | os.PathLike], convention: Convention, resolution: int | None = None
) -> torch.Tensor:
    """The images at `paths`, prepared: (n, 3, resolution, resolution), float32. Raises ImageError."""
    return torch.stack([prepare(read(path), convention, resolution) for path in paths])


def _resize_and_crop(image: Image.Image, shorter: int, size: int, filter_: Image.Resampling) -> Image.Image:
    width, height = image.size
    if width <= height:
        new = (shorter, max(shorter, int(shorter * height / width)))
    else:
        new = (max(shorter, int(shorter * width / height)), shorter)
    image = image.resize(new, filter_)
    left, top = round((new[0] - size) / 2), round((new[1] - size) / 2)
    return image.crop((left, top, left + size, top + size))


def _upright(image: Image.Image) -> Image.Image:
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):  # convert("RGB") would clip what exceeds 255
        return _from_wide_grey(image)
    if "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def _from_wide_grey(image: Image.Image) -> Image.Image:
    values = np.asarray(image, dtype=np.float64)
    top = 65535.0 if values.max(initial=0) > 255 else 255.0
    grey = np.clip(np.rint(values * (255.0 / top)), 0, 255).astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")
