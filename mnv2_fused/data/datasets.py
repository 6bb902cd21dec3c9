"""Images to train on: scikit-learn's digits, and folders with a directory of images for each class."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch.utils.data import Dataset

from mnv2_fused.data import images
from mnv2_fused.weights import Convention

HELD_OUT = 0.2  # share of each class, if the data has no split of its own


class DataError(ValueError):
    """Data that cannot be found or trained on; the message says what was expected and what was got."""


class Pictures(Dataset):
    """Images with what is known about them.

    `self[index]` is for validation. `self[index, epoch]` is for training, and may be augmented: it depends on the
    index, the epoch and the seed alone, whichever process asks. An image that cannot be read gives its ImageError in
    place of the item: raised in a loader's worker process it would arrive as a traceback.
    """

    def __init__(self, seed: int = 0) -> None:
        self._seed = seed

    def __len__(self) -> int:
        raise NotImplementedError

    def item(self, index: int, rng: random.Random | None) -> tuple:
        """The image at `index` with its truth; for training if there is a generator. Raises images.ImageError."""
        raise NotImplementedError

    def __getitem__(self, key: int | tuple[int, int]) -> tuple | images.ImageError:
        index, epoch = key if isinstance(key, tuple) else (key, None)
        rng = None if epoch is None else random.Random(f"{self._seed}/{epoch}/{index}")
        try:
            return self.item(index, rng)
        except images.ImageError as error:
            return error


def text_lines(path: str | os.PathLike) -> list[str]:
    """The lines of a UTF-8 text file, without blank ones at its end. Raises OSError, ValueError."""
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    while lines and not lines[-1].strip():
        lines.pop()
    return lines


@contextlib.contextmanager
def torch_seed(rng: random.Random) -> Iterator[None]:
    """PyTorch's generator, which torchvision's transforms use, follows from `rng` in the body."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rng.getrandbits(63))
        yield


class ImageSet(Pictures):
    """Images with labels: a tensor (3, resolution, resolution) in float32 as the convention asks, and a label."""

    def __init__(
        self,
        sources: Sequence[Path | Image.Image],
        targets: Sequence[int],
        convention: Convention,
        augment: Callable[[Image.Image, Convention, random.Random], Image.Image],
        seed: int = 0,
    ) -> None:
        super().__init__(seed)
        self.sources, self.targets = sources, targets
        self._convention, self._augment = convention, augment

    def __len__(self) -> int:
        return len(self.sources)

    def item(self, index: int, rng: random.Random | None) -> tuple[torch.Tensor, int]:
        source = self.sources[index]
        image = source if isinstance(source, Image.Image) else images.read(source)
        if rng is None:
            image = images.fit(image, self._convention)
        else:
            image = self._augment(image, self._convention, rng)
        return images.normalize(image, self._convention), self.targets[index]


@dataclass(frozen=True)
class Data:
    """What to train on, what to validate on, and the name of each class by index."""

    train: Pictures
    held_out: Pictures
    labels: list[str]


def load(name: str, convention: Convention, seed: int = 0) -> Data:
    """The data that `name` stands for: `digits`, or the path of a folder. Raises DataError."""
    if name == "digits":
        return digits(convention, seed)
    if not os.path.exists(name):
        raise DataError(
            f"unknown data {name!r}: expected digits, or a folder with a directory of images for each class"
        )
    return folder(name, convention, seed)


def digits(convention: Convention, seed: int = 0) -> Data:
    """scikit-learn's 1797 handwritten digits of 8x8 pixels, a fifth of them held out. Raises DataError without it."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError(
            f"digits come with scikit-learn (pip install scikit-learn), which is missing: {error}"
        ) from None
    loaded = load_digits()
    pictures = [Image.fromarray((values * 255 / 16).round().astype("uint8")).convert("RGB") for values in loaded.images]
    targets = loaded.target.tolist()
    train, held_out = [], []
    for label in range(10):
        members = [index for index, target in enumerate(targets) if target == label]
        first, second = _split(members, str)
        train += first
        held_out += second
    sets = [
        ImageSet([pictures[i] for i in part], [targets[i] for i in part], convention, shift, seed)
        for part in (train, held_out)
    ]
    return Data(*sets, [str(label) for label in range(10)])


def folder(path: str | os.PathLike, convention: Convention, seed: int = 0) -> Data:
    """The images in `path`/CLASS/, a fifth of each class held out, or in `path`/train/CLASS/ and `path`/val/CLASS/.

    Classes are sorted by name. Files of kinds that Pillow does not read, and hidden ones, are left out. Whether an
    image is held out depends on the names in its class alone, not on the order of the files or on the seed.

    Raises:
        DataError: no folder, fewer than two classes, a class without images, a class in val that train does not have,
            or a class whose name cannot be a line of a text file.
    """
    root = Path(path)
    apart = (root / "train").is_dir() and (root / "val").is_dir()
    found = _classes(root / "train" if apart else root)
    labels = sorted(found)
    if len(labels) < 2:
        raise DataError(
            f"{path}: expected a directory of images for each of at least two classes, "
            f"got {f'only {labels[0]!r}' if labels else 'none'}"
        )
    if apart:
        validation = _classes(root / "val")
        unknown = sorted(set(validation) - set(labels))
        if unknown:
            raise DataError(f"{root / 'val'} has a class that {root / 'train'} has not: {unknown[0]!r}")
        if not validation:
            raise DataError(f"{root / 'val'}: expected a directory of images for each class, got none")
        parts = [found, validation]
    else:
        small = [label for label in labels if len(found[label]) < 2]
        if small:
            raise DataError(f"{root / small[0]} has a single image: expected at least two, because one is held out")
        halves = {label: _split(files, lambda file: file.name) for label, files in found.items()}
        parts = [{label: half[i] for label, half in halves.items()} for i in (0, 1)]
    sets = []
    for part in parts:
        pairs = [(file, labels.index(label)) for label in sorted(part) for file in part[label]]
        sets.append(ImageSet(*map(list, zip(*pairs, strict=True)), convention, crop_and_flip, seed))
    return Data(*sets, labels)


def shift(image: Image.Image, convention: Convention, rng: random.Random) -> Image.Image:
    """`image` moved by up to a tenth of its size in each direction, with black at the edges, then fitted."""
    dx, dy = (rng.uniform(-1, 1) / 10 * size for size in image.size)
    moved = image.transform(image.size, Image.Transform.AFFINE, (1, 0, dx, 0, 1, dy), Image.Resampling.BILINEAR)
    return images.fit(moved, convention)


def crop_and_flip(image: Image.Image, convention: Convention, rng: random.Random) -> Image.Image:
    """A random part of `image`, at least a fifth of its area and 3:4 to 4:3, resized; half of them are mirrored."""
    width, height = image.size
    for _ in range(10):
        area = width * height * rng.uniform(0.2, 1)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if w <= width and h <= height:
            break
    else:  # a very long or high image
        w = h = min(width, height)
    left, top = rng.uniform(0, width - w), rng.uniform(0, height - h)
    size = (convention.crop, convention.crop)
    image = image.resize(size, Image.Resampling.BILINEAR, box=(left, top, left + w, top + h))
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else image


def _split(members: list, name: Callable[..., str]) -> tuple[list, list]:
    """`members` to train on, and held-out ones; at least one of each if there are two."""
    shuffled = sorted(members, key=lambda member: hashlib.sha256(os.fsencode(name(member))).digest())
    count = max(1, round(HELD_OUT * len(members)))
    return shuffled[count:], shuffled[:count]


def _files(directory: Path) -> Iterator[Path]:
    """Everything below `directory`. Unlike pathlib it passes over no directory that cannot be listed: OSError."""

    def stop(error: OSError) -> None:
        raise error

    for parent, _, names in os.walk(directory, onerror=stop):
        yield from (Path(parent, name) for name in names)


def _classes(root: Path) -> dict[str, list[Path]]:
    """The image files of each directory in `root`, by the directory's name."""
    kinds = {ending for ending, format_ in Image.registered_extensions().items() if format_ in Image.OPEN}
    try:
        found = {
            entry.name: sorted(
                file
                for file in _files(entry)
                if file.suffix.lower() in kinds and not file.name.startswith(".") and file.is_file()
            )
            for entry in sorted(root.iterdir())
            if entry.is_dir() and not entry.name.startswith(".")
        }
    except OSError as error:
        raise DataError(f"cannot list {error.filename or root}: {error.strerror}") from None
    for name in found:
        if name.splitlines() != [name] or name != name.encode(errors="replace").decode():
            raise DataError(f"{str(root / name)!r}: expected a class name without line breaks and in UTF-8")
    empty = [name for name, files in found.items() if not files]
    if empty:
        raise DataError(f"{root / empty[0]} holds no image of a kind that Pillow reads")
    return found
