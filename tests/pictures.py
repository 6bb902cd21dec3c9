"""Small folders of images to train on."""

from __future__ import annotations

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
