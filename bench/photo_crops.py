"""Makes a data set for `ablate` from a few photographs: crops of real scenes, the photograph being the class.

    python bench/photo_crops.py PHOTOGRAPHS FOLDER

The left two thirds of a photograph give the crops to train on, the right third gives the held-out ones. A strip as wide
as half a crop between the two belongs to neither.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

from PIL import Image

from mnv2_fused.data import images


def cut(
    photograph: Image.Image, count: int, size: int, part: tuple[float, float], rng: random.Random
) -> list[Image.Image]:
    """`count` squares of `size` pixels at random places between the shares `part` of the width."""
    width, height = photograph.size
    low, high = (round(share * width) for share in part)
    found = []
    for _ in range(count):
        left, top = rng.randint(low, high - size), rng.randint(0, height - size)
        found.append(photograph.crop((left, top, left + size, top + size)))
    return found


def main() -> None:
    """Writes FOLDER/train/NAME/*.png and FOLDER/val/NAME/*.png for each photograph that is large enough."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("photographs", type=Path, help="directory of photographs")
    parser.add_argument("folder", type=Path, help="directory to make")
    parser.add_argument("--size", type=int, default=96, help="side of a crop in pixels (default: 96)")
    parser.add_argument("--train", type=int, default=60, help="crops of a photograph to train on (default: 60)")
    parser.add_argument("--val", type=int, default=30, help="held-out crops of a photograph (default: 30)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for path in sorted(arguments.photographs.glob("*.jpg")):
        photograph = images.read(path)
        width, height = photograph.size
        gap = arguments.size / 4 / width
        if min(width / 3 - arguments.size / 4, height) < arguments.size:
            print(f"left out, too small: {path}")
            continue
        rng = random.Random(f"{arguments.seed}/{path.name}")
        parts = {"train": (arguments.train, (0, 2 / 3 - gap)), "val": (arguments.val, (2 / 3 + gap, 1))}
        for name, (count, part) in parts.items():
            place = arguments.folder / name / path.stem
            place.mkdir(parents=True, exist_ok=True)
            for i, crop in enumerate(cut(photograph, count, arguments.size, part, rng)):
                crop.save(place / f"{i:03}.png")


if __name__ == "__main__":
    main()
