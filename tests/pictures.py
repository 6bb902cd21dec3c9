"""Small folders of images to train on, with classes, boxes or masks."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path

from PIL import Image

COLOURS = {"blue": (30, 60, 220), "green": (40, 200, 50), "red": (220, 40, 30)}


def make_pictures(root: Path, count: int = 10, classes: Iterable[str] = COLOURS) -> str:
    """Writes `count` images, each of roughly one colour, for each class. Returns the folder's path."""
    rng = random.Random(0)
    for name in classes:
        (root / name).mkdir(parents=True)
        for i in range(count):
            colour = tuple(min(255, max(0, value + rng.randint(-25, 25))) for value in COLOURS[name])
            Image.new("RGB", (40 + i, 50 - i), colour).save(root / name / f"{i}.png")
    return str(root)


def make_objects(root: Path, count: int = 6, size: tuple[int, int] = (48, 40)) -> str:
    """Writes `count` images of a bright rectangle each, with boxes in COCO's format and masks in VOC's.

    Categories have the ids 3 and 7; the masks' classes are 1 and 2, with a border of 255. Returns the folder's path.
    """
    rng = random.Random(0)
    for name in ("images", "SegmentationClass"):
        (root / name).mkdir(parents=True)
    pictures, annotations = [], []
    for i in range(count):
        w, h = rng.randint(12, 24), rng.randint(12, 24)
        x, y = rng.randint(1, size[0] - w - 1), rng.randint(1, size[1] - h - 1)
        image, mask = Image.new("RGB", size, (30, 30, 40)), Image.new("P", size, 0)
        image.paste((220, 60, 60) if i % 2 else (60, 200, 220), (x, y, x + w, y + h))
        mask.paste(255, (x - 1, y - 1, x + w + 1, y + h + 1))
        mask.paste(1 + i % 2, (x, y, x + w, y + h))
        mask.putpalette(
            [value for i in range(256) for value in (i, 0, 255 - i)]
        )  # a short one would be saved in 2 bits
        image.save(root / "images" / f"{i}.png")
        mask.save(root / "SegmentationClass" / f"{i}.png")
        pictures.append({"id": 10 + i, "file_name": f"{i}.png", "width": size[0], "height": size[1]})
        category = 7 if i % 2 else 3
        annotations.append(
            {"id": i, "image_id": 10 + i, "category_id": category, "bbox": [x, y, w, h], "area": w * h, "iscrowd": 0}
        )
    categories = [{"id": 7, "name": "red thing"}, {"id": 3, "name": "blue thing"}]
    content = {"images": pictures, "annotations": annotations, "categories": categories}
    (root / "instances.json").write_text(json.dumps(content), encoding="utf-8")
    (root / "val.txt").write_text("".join(f"{i}\n" for i in range(count)), encoding="utf-8")
    (root / "labels.txt").write_text("background\nblue thing\nred thing\n", encoding="utf-8")
    return str(root)
