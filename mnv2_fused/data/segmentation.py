"""Photographs with masks, in the layout of PASCAL VOC.

A folder holds `SegmentationClass/NAME.png`, `JPEGImages/NAME.jpg` (or `images/NAME.jpg`), and lists of names in
`ImageSets/Segmentation/{train,val}.txt` (or `{train,val}.txt`). A mask's values are class numbers; 255 is ignored.
`labels.txt`, a class a line beginning with the background, replaces VOC's 21 classes.
"""

from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mnv2_fused import extras
from mnv2_fused.data import images
from mnv2_fused.data.datasets import Data, DataError, Pictures, text_lines, torch_seed
from mnv2_fused.weights import Convention

IGNORED = 255
VOC_LABELS = (
    "background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person "
    "pottedplant sheep sofa train tvmonitor"
).split()


class SegmentationSet(Pictures):
    """Photographs with masks.

    For validation: the whole photograph resized to (3, crop, crop) as the convention asks, in float32, and the mask of
    the photograph's own size, (height, width) in int64. For training both have crop x crop pixels. With `augment` the
    resized photograph is scaled by 0.5 to 2, a random part of the size is kept, with the mean colour and 255 around a
    smaller one, and half of them are mirrored.
    """

    def __init__(
        self,
        pairs: list[tuple[Path, Path]],
        classes: int,
        convention: Convention,
        augment: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__(seed)
        self.pairs, self.classes, self._augment = pairs, classes, augment
        self._convention = convention

    def __len__(self) -> int:
        return len(self.pairs)

    def item(self, index: int, rng: random.Random | None) -> tuple[torch.Tensor, torch.Tensor]:
        path, mask_path = self.pairs[index]
        image = images.read_annotated(path)
        mask = read_mask(mask_path, self.classes)
        if mask.size != image.size:
            raise images.ImageError(
                f"{mask_path} has {mask.width}x{mask.height} pixels, expected {image.width}x{image.height} as {path}"
            )
        image = images.fit(image, self._convention)
        if rng is not None:
            mask = mask.resize(image.size, Image.Resampling.NEAREST)
            if self._augment:
                return _augmented(image, mask, self._convention, rng)
        return images.normalize(image, self._convention), torch.from_numpy(np.array(mask, dtype=np.int64))


def read_mask(path: str | os.PathLike, classes: int) -> Image.Image:
    """The mask at `path` as a grey image of class numbers.

    Raises:
        images.ImageError: as `images.read`; neither a palette nor a grey image; a value that is no class and not 255.
    """
    mask = images.decode(path, _numbers)
    if mask is None:
        raise images.ImageError(f"{path}: expected a mask with a palette or of 8-bit grey, got colours")
    values = np.unique(np.asarray(mask))
    wrong = values[(values >= classes) & (values != IGNORED)]
    if len(wrong):
        raise images.ImageError(f"{path}: expected classes from 0 to {classes - 1}, or {IGNORED}, got {wrong[0]}")
    return mask


def load(path: str | os.PathLike, convention: Convention, augment: bool = True, seed: int = 0) -> Data:
    """The photographs and masks in the folder `path`. If it has one list of them, both parts are that list.

    `convention` has the size and the normalisation; the whole photograph is resized, whatever its proportions.

    Raises:
        DataError: no folder, no list, an empty one, an image or a mask that a list names and that is not there, or
            labels that cannot be read.
        extras.MissingExtraError: `augment`, and torchvision is missing.
    """
    root = Path(path)
    if augment:
        extras.use("torchvision", "segmentation")
    labels = read_labels(root / "labels.txt") if (root / "labels.txt").exists() else list(VOC_LABELS)
    sets = {
        part: SegmentationSet(_pairs(root, file), len(labels), convention, augment, seed)
        for part, file in _lists(root).items()
    }
    held_out = sets.get("val") or sets["train"]
    return Data(sets.get("train") or held_out, held_out, labels)


def read_labels(path: Path) -> list[str]:
    """The class names in a text file, a line each, the background first. Raises DataError."""
    try:
        labels = text_lines(path)
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read labels from {path}: {error}") from None
    if not 2 <= len(labels) <= IGNORED:
        raise DataError(f"{path}: expected 2 to {IGNORED} classes, a line each, got {len(labels)}")
    return labels


def _augmented(
    image: Image.Image, mask: Image.Image, convention: Convention, rng: random.Random
) -> tuple[torch.Tensor, torch.Tensor]:
    v2 = extras.use("torchvision.transforms.v2", "segmentation")
    tv_tensors = extras.use("torchvision.tv_tensors", "segmentation")
    size = (convention.crop, convention.crop)
    fill = {tv_tensors.Image: [round(255 * mean) for mean in convention.mean], tv_tensors.Mask: IGNORED}
    transform = v2.Compose(
        [
            v2.ScaleJitter(size, scale_range=(0.5, 2.0)),
            v2.RandomCrop(size, pad_if_needed=True, fill=fill),
            v2.RandomHorizontalFlip(),
        ]
    )
    with torch_seed(rng):
        pixels, numbers = transform(
            tv_tensors.Image(images.pixels(image)), tv_tensors.Mask(torch.from_numpy(np.array(mask)))
        )
    return images.normalize(pixels.as_subclass(torch.Tensor), convention), numbers.as_subclass(torch.Tensor).long()


def _numbers(image: Image.Image) -> Image.Image | None:
    """The mask's values: palette indices or grey; None for an image in colours."""
    if image.mode == "P":
        return Image.fromarray(np.asarray(image))
    return image if image.mode == "L" else None


def _lists(root: Path) -> dict[str, Path]:
    if not root.is_dir():
        raise DataError(f"{root}: expected a folder with SegmentationClass, photographs and val.txt, got no folder")
    for folder in (root / "ImageSets" / "Segmentation", root):
        found = {part: folder / f"{part}.txt" for part in ("train", "val") if (folder / f"{part}.txt").exists()}
        if found:
            return found
    raise DataError(f"{root}: expected train.txt or val.txt in it or in ImageSets/Segmentation, got neither")


def _pairs(root: Path, file: Path) -> list[tuple[Path, Path]]:
    try:
        names = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {file}: {error}") from None
    names = [name for name in names if name]
    if not names:
        raise DataError(f"{file}: expected the name of a photograph in each line, got an empty list")
    folder = next((root / name for name in ("JPEGImages", "images") if (root / name).is_dir()), None)
    if folder is None:
        raise DataError(f"{root}: expected photographs in JPEGImages or images, got neither folder")
    pairs = []
    for name in names:
        path = next((p for p in (folder / f"{name}{end}" for end in (".jpg", ".jpeg", ".png")) if p.is_file()), None)
        if path is None:
            raise DataError(f"{file}: {name}: no such image: {folder / name}.jpg")
        mask = root / "SegmentationClass" / f"{name}.png"
        if not mask.is_file():
            raise DataError(f"{file}: {name}: no such mask: {mask}")
        pairs.append((path, mask))
    return pairs
