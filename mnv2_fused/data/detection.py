"""Photographs with boxes, in COCO's format.

A folder holds `instances.json` and `images/`. Or it holds `annotations/instances_train*.json` and
`annotations/instances_val*.json`, with the photographs in `train*/` and `val*/` or in the same folders below `images/`.
"""

from __future__ import annotations

import json
import math
import os
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from mnv2_fused import extras
from mnv2_fused.data import images
from mnv2_fused.data.datasets import Data, DataError, Pictures, torch_seed

BACKGROUND = "background"
# Annotators' coordinates are rounded: boxes may end this many pixels outside and are clipped.
SLACK = 1.0
MOST_PIXELS = 2**31  # of a side
LEAST = 0.01  # pixels of a side: a narrower box could vanish in float32


@dataclass(frozen=True)
class Photograph:
    """A photograph and its objects.

    `boxes` (n, 4) in float32 are x1, y1, x2, y2 in pixels, `labels` (n) in int64 from 1. Crowd regions are not here.
    """

    path: Path
    id: int
    width: int
    height: int
    boxes: torch.Tensor
    labels: torch.Tensor


class DetectionSet(Pictures):
    """Photographs with boxes: a tensor (3, height, width) in float32 from 0 to 1, resized to `size`, and a target.

    The target has `boxes` and `labels` as `Photograph` has them, but in pixels of the resized image, and `image_id`
    and `scale` (4), which boxes are multiplied by to be in pixels of the photograph. For training with `augment`, a
    random part of the photograph is kept, in which boxes have a minimal overlap, and half of the photographs are
    mirrored.

    Attributes:
        photographs: in the order of the file.
        categories: id and name of each category; label 1 stands for the first.
        truth: the file's content in COCO's format, crowd regions included, for `evaluation.DetectionScores`.
    """

    def __init__(
        self,
        photographs: list[Photograph],
        categories: list[tuple[int, str]],
        truth: dict,
        size: tuple[int, int],
        augment: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__(seed)
        self.photographs, self.categories, self.truth = photographs, categories, truth
        self._size, self._augment = size, augment

    def __len__(self) -> int:
        return len(self.photographs)

    @property
    def label_ids(self) -> dict[int, int]:
        """The category id of each label."""
        return {label: identity for label, (identity, _) in enumerate(self.categories, 1)}

    def item(self, index: int, rng: random.Random | None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        photograph = self.photographs[index]
        image = images.read_annotated(photograph.path)
        if image.size != (photograph.width, photograph.height):
            raise images.ImageError(
                f"{photograph.path} has {image.width}x{image.height} pixels, "
                f"but its annotations are for {photograph.width}x{photograph.height}"
            )
        boxes, labels = photograph.boxes, photograph.labels
        if rng is not None and self._augment:
            image, boxes, labels = _augmented(image, boxes, labels, rng)
        pixels, scale = fit(image, self._size)
        most = torch.tensor(self._size * 2)
        target = {"boxes": (boxes / scale).clamp(max=most), "labels": labels}
        return pixels, {**target, "image_id": torch.tensor(photograph.id), "scale": scale}


def fit(image: Image.Image, size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """`image` as the network's input, resized whole to `size` (width, height), and the scale of its boxes.

    Returns:
        (3, height, width) in float32 from 0 to 1; (4) in float32, which boxes that the network finds are multiplied by.
    """
    resized = image.resize(size, Image.Resampling.BILINEAR)
    scale = torch.tensor([image.width / size[0], image.height / size[1]] * 2)
    return images.pixels(resized).float().div(255), scale


def load(path: str | os.PathLike, size: tuple[int, int], augment: bool = True, seed: int = 0) -> Data:
    """The photographs in the folder `path`. If it has one list of them, both parts are that list.

    `size` is the width and height of the network's input. `labels` of the result begin with the background.

    Raises:
        DataError: as `read`; no list in the folder; categories of the two lists differ.
        extras.MissingExtraError: `augment`, and torchvision is missing.
    """
    if augment:
        extras.use("torchvision", "detection")
    lists = {part: read(*found, size, augment, seed) for part, found in _lists(Path(path)).items()}
    held_out = lists.get("val") or lists["train"]
    train = lists.get("train") or held_out
    if train.categories != held_out.categories:
        raise DataError(f"{path}: expected the same categories to train on and to validate on, got different ones")
    return Data(train, held_out, [BACKGROUND, *(name for _, name in train.categories)])


def read(file: Path, folder: Path, size: tuple[int, int], augment: bool = True, seed: int = 0) -> DetectionSet:
    """The photographs in `folder` that the COCO file `file` lists. Labels 1, 2, ... follow the order of category ids.

    Raises:
        DataError: a file that cannot be read, or a field that breaks a rule. The message names the file and the id of
            the annotation or the image.
    """
    content = _json(file)
    categories = _categories(file, content)
    photographs = _images(file, folder, content)
    labels = {identity: label for label, (identity, _) in enumerate(categories, 1)}
    annotations, numbers = [], set()
    objects: dict[int, list[tuple[list[float], int]]] = {identity: [] for identity in photographs}
    for entry in _entries(file, content, "annotations"):
        where = f"{file}: annotation {_id(file, 'annotations', entry)}"
        if entry["id"] in numbers:
            raise DataError(f"{where}: expected an id of its own, got that of another annotation")
        numbers.add(entry["id"])
        image_id, category_id = entry.get("image_id"), entry.get("category_id")
        if not _is_whole(image_id) or image_id not in photographs:
            raise DataError(f"{where}: expected the id of an image, got image_id {image_id!r:.60}")
        image = photographs[image_id]
        if not _is_whole(category_id) or category_id not in labels:
            raise DataError(f"{where}: expected the id of a category, got category_id {category_id!r:.60}")
        box = _box(where, entry.get("bbox"), image)
        crowd = entry.get("iscrowd", 0)
        if crowd not in (0, 1):
            raise DataError(f"{where}: iscrowd: expected 0 or 1, got {crowd!r}")
        x, y, w, h = entry["bbox"]
        # pycocotools takes an annotation with id 0 for none, so ids are counted anew.
        annotations.append(
            {
                "id": len(annotations) + 1,
                "image_id": image["id"],
                "category_id": category_id,
                "bbox": [x, y, w, h],
                "area": _area(where, entry.get("area", w * h)),
                "iscrowd": int(crowd),
            }
        )
        if not crowd:
            objects[image["id"]].append((box, labels[category_id]))
    if not any(objects.values()):
        raise DataError(f"{file}: expected at least one annotation that is no crowd region, got none")
    truth = {
        "images": list(photographs.values()),
        "categories": [{"id": identity, "name": name} for identity, name in categories],
        "annotations": annotations,
    }
    found = [
        Photograph(
            folder / image["file_name"],
            image["id"],
            image["width"],
            image["height"],
            torch.tensor([box for box, _ in objects[image["id"]]], dtype=torch.float32).reshape(-1, 4),
            torch.tensor([label for _, label in objects[image["id"]]], dtype=torch.int64),
        )
        for image in truth["images"]
    ]
    return DetectionSet(found, categories, truth, size, augment, seed)


def _augmented(
    image: Image.Image, boxes: torch.Tensor, labels: torch.Tensor, rng: random.Random
) -> tuple[Image.Image, torch.Tensor, torch.Tensor]:
    """torchvision's recipe for SSDLite. Boxes under a pixel are dropped."""
    v2 = extras.use("torchvision.transforms.v2", "detection")
    tv_tensors = extras.use("torchvision.tv_tensors", "detection")
    transform = v2.Compose([v2.RandomIoUCrop(), v2.RandomHorizontalFlip(), v2.SanitizeBoundingBoxes(min_size=1)])
    wrapped = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(image.height, image.width))
    with torch_seed(rng):
        image, target = transform(image, {"boxes": wrapped, "labels": labels})
    return image, target["boxes"].as_subclass(torch.Tensor), target["labels"]


def _lists(root: Path) -> dict[str, tuple[Path, Path]]:
    """File and folder of the photographs of each part: `train` and `val`, or the one that there is."""
    if not root.is_dir():
        raise DataError(f"{root}: expected a folder with instances.json or annotations/instances_*.json, got no folder")
    if (root / "instances.json").exists():
        return {"val": (root / "instances.json", root / "images")}
    result = {}
    for part in ("train", "val"):
        files = sorted((root / "annotations").glob(f"instances_{part}*.json"))
        if len(files) > 1:
            names = " and ".join(file.name for file in files[:2])
            raise DataError(f"{root / 'annotations'}: expected one instances_{part}*.json, got {names}")
        if files:
            name = files[0].stem.removeprefix("instances_")
            result[part] = (files[0], root / name if (root / name).is_dir() else root / "images" / name)
    if not result:
        raise DataError(
            f"{root}: expected instances.json or annotations/instances_train*.json and _val*.json, got none"
        )
    return result


def _json(file: Path) -> dict:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"no such file: {file}") from None
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise DataError(f"{file}: expected COCO's dictionary of images, annotations and categories, got another value")
    return content


def _entries(file: Path, content: dict, name: str) -> list[dict]:
    entries = content.get(name)
    if not isinstance(entries, list) or not entries:
        got = "an empty list" if entries == [] else "none" if entries is None else "another value"
        raise DataError(f"{file}: expected a list of {name}, got {got}")
    for entry in entries:
        if not isinstance(entry, dict):
            raise DataError(f"{file}: {name}: expected dictionaries, got {entry!r:.60}")
    return entries


def _id(file: Path, name: str, entry: dict) -> int:
    identity = entry.get("id")
    if not _is_whole(identity) or abs(identity) >= 2**63:  # it becomes a tensor
        raise DataError(f"{file}: {name}: id: expected a whole number of 64 bits, got {identity!r:.60}")
    return identity


def _categories(file: Path, content: dict) -> list[tuple[int, str]]:
    found: dict[int, str] = {}
    for entry in _entries(file, content, "categories"):
        identity, name = _id(file, "categories", entry), entry.get("name")
        if identity in found:
            raise DataError(f"{file}: categories: expected an id of its own, got {identity} twice")
        if not isinstance(name, str) or name.splitlines() != [name]:
            raise DataError(f"{file}: category {identity}: name: expected a line of text, got {name!r:.60}")
        found[identity] = name
    return sorted(found.items())


def _images(file: Path, folder: Path, content: dict) -> dict[int, dict]:
    found: dict[int, dict] = {}
    for entry in _entries(file, content, "images"):
        identity = _id(file, "images", entry)
        if identity in found:
            raise DataError(f"{file}: images: expected an id of its own, got {identity} twice")
        name = entry.get("file_name")
        if not isinstance(name, str) or not name:
            raise DataError(f"{file}: image {identity}: file_name: expected the name of a file, got {name!r:.60}")
        for side in ("width", "height"):
            if not _is_whole(entry.get(side)) or not 1 <= entry[side] <= MOST_PIXELS:
                raise DataError(f"{file}: image {identity}: {side}: expected pixels, got {entry.get(side)!r:.60}")
        if not (folder / name).is_file():
            raise DataError(f"{file}: image {identity}: no such image: {folder / name}")
        found[identity] = {
            "id": identity,
            "file_name": name,
            "width": entry["width"],
            "height": entry["height"],
        }
    return found


def _box(where: str, box: object, image: dict) -> list[float]:
    """x1, y1, x2, y2 of COCO's x, y, width, height, inside the image."""
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
        raise DataError(f"{where}: bbox: expected x, y, width and height, got {box!r:.80}")
    x, y, w, h = box
    if min(w, h) < LEAST:
        raise DataError(f"{where}: bbox: expected a width and a height of at least {LEAST} pixels, got {box}")
    if x < -SLACK or y < -SLACK or x + w > image["width"] + SLACK or y + h > image["height"] + SLACK:
        raise DataError(
            f"{where}: bbox: expected a box inside {image['file_name']} of {image['width']}x{image['height']} pixels, "
            f"got {box}"
        )
    inside = [max(0.0, x), max(0.0, y), min(x + w, float(image["width"])), min(y + h, float(image["height"]))]
    if min(inside[2] - inside[0], inside[3] - inside[1]) < LEAST:
        raise DataError(f"{where}: bbox: expected a box inside {image['file_name']}, got {box} at its border")
    return inside


def _area(where: str, area: object) -> float:
    if not _is_number(area) or area < 0:
        raise DataError(f"{where}: area: expected a number from 0, got {area!r:.60}")
    return area


def _is_number(value: object) -> bool:
    if _is_whole(value):
        return abs(value) < 2**63  # others may be too large for a float
    return isinstance(value, float) and math.isfinite(value)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
