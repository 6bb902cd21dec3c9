"""Pictures that commands write: where they go, boxes and masks."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mnv2_fused import extras
from mnv2_fused.cli.options import InputError
from mnv2_fused.data import images

MOST_CLASSES = 256  # of a mask: its values are bytes


def targets(output: str | None, paths: list[str], mode: str = "RGB") -> dict[str, Path | None]:
    """The file to write for each image, by the image's path.

    It is `output` for one image, else NAME.png in the directory `output`. Without `output` it is None.
    `mode` is Pillow's name of the pictures' pixels: "RGB", or "P" for a palette.

    Raises:
        InputError: several images have one name, or the file or directory cannot be used.
    """
    if output is None:
        return dict.fromkeys(paths)
    path = Path(output)
    if len(paths) == 1 and not path.is_dir():
        kind = Image.registered_extensions().get(path.suffix.lower())
        if kind is None:
            raise InputError(f"--output: expected the name of an image such as boxed.png, got {output}")
        if not _can_write(kind, mode):
            what = "a palette" if mode == "P" else "colours"
            raise InputError(f"--output: expected an image with {what} such as a .png, got {output}")
        if not path.absolute().parent.is_dir():
            raise InputError(f"--output: no such directory: {path.absolute().parent}")
        return {paths[0]: path}
    names = [Path(name).stem for name in paths]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"--output: expected images of different names, got {twice[0]!r} twice")
    try:
        path.mkdir(exist_ok=True)
    except OSError as error:
        raise InputError(f"--output: expected a directory for several images, got {output}: {error.strerror}") from None
    return {source: path / f"{name}.png" for source, name in zip(paths, names, strict=True)}


def _can_write(kind: str, mode: str) -> bool:
    """Whether Pillow writes files of this kind with such pixels."""
    try:
        Image.new(mode, (16, 16)).save(io.BytesIO(), kind)
    except (OSError, ValueError, KeyError):
        return False
    return True


def save(image: Image.Image, path: Path) -> None:
    """Writes a picture. Raises InputError."""
    try:
        image.save(path)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"--output: cannot write {path}: {error}") from None


def palette(classes: int) -> np.ndarray:
    """PASCAL VOC's colours: (classes, 3), uint8. The bits of a class, three a time, are the colour's highest bits."""
    index = np.arange(classes)
    colours = np.zeros((classes, 3), dtype=np.uint8)
    for bit in range(8):
        for channel in range(3):
            colours[:, channel] |= ((index >> (3 * bit + channel) & 1) << (7 - bit)).astype(np.uint8)
    return colours


def boxed(image: Image.Image, boxes: torch.Tensor, labels: torch.Tensor, captions: list[str]) -> Image.Image:
    """`image` with `boxes` (n, 4), in the colour of their `labels` (n), and a text at each, by torchvision."""
    if not len(boxes):
        return image
    utils = extras.use("torchvision.utils", "detection")
    colours = [tuple(row) for row in palette(256)[(labels % 256).numpy()].tolist()]
    width = max(2, round(max(image.size) / 300))
    drawn = utils.draw_bounding_boxes(
        images.pixels(image), boxes, labels=captions, colors=colours, width=width, fill_labels=True
    )
    return Image.fromarray(drawn.permute(1, 2, 0).numpy())


def coloured(mask: torch.Tensor) -> Image.Image:
    """A mask (height, width) of class numbers below 256 as an image with VOC's palette; its values are the classes."""
    image = Image.fromarray(mask.to(torch.uint8).numpy())
    image.putpalette(palette(MOST_CLASSES).tobytes())
    return image


def overlaid(image: Image.Image, mask: Image.Image) -> Image.Image:
    """`image` under the colours of `mask`; the background stays as it is."""
    mixed = Image.blend(image, mask.convert("RGB"), 0.5)
    objects = Image.fromarray((np.asarray(mask) != 0).astype(np.uint8) * 255)
    return Image.composite(mixed, image, objects)
