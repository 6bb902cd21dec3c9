"""Images to train on: which are held out, how they are augmented, and folders that are refused."""

from __future__ import annotations

import random

import pytest
import torch
from pictures import make_pictures
from PIL import Image

from mnv2_fused import weights
from mnv2_fused.data import datasets, images


def test_held_out_images_depend_on_names_alone(tmp_path):
    root = make_pictures(tmp_path / "data")
    before = datasets.folder(root, weights.TORCHVISION)
    assert len(before.train) == 24 and len(before.held_out) == 6
    assert not set(before.train.sources) & set(before.held_out.sources)
    before.train.sources[0].unlink()
    (tmp_path / "data" / "red" / "notes.txt").write_text("no image", encoding="utf-8")
    (tmp_path / "data" / ".cache").mkdir()
    after = datasets.folder(root, weights.TORCHVISION)
    assert after.held_out.sources == before.held_out.sources and len(after.train) == 23


def test_a_split_of_the_folders_own(tmp_path):
    make_pictures(tmp_path / "data" / "train", 3)
    make_pictures(tmp_path / "data" / "val", 2, ["red"])
    data = datasets.load(str(tmp_path / "data"), weights.TORCHVISION)
    assert (data.labels, len(data.train), data.held_out.targets) == (["blue", "green", "red"], 9, [2, 2])
    (tmp_path / "data" / "val" / "red").rename(tmp_path / "data" / "val" / "pink")
    with pytest.raises(datasets.DataError, match=r"has a class that .*train has not: 'pink'"):
        datasets.load(str(tmp_path / "data"), weights.TORCHVISION)


def test_augmentation_follows_from_seed_epoch_and_index(tmp_path):
    convention = weights.at_resolution(weights.TORCHVISION, 32)
    data = datasets.folder(make_pictures(tmp_path / "data"), convention).train
    data.sources[0] = data.sources[1] = Image.linear_gradient("L").convert("RGB")
    assert torch.equal(data[0, 1][0], data[0, 1][0])
    plain = images.prepare(data.sources[0], convention)
    assert torch.equal(data[0][0], plain)
    different = [data[0, 1][0], data[0, 2][0], data[1, 1][0], plain]
    other = datasets.ImageSet(data.sources, data.targets, convention, datasets.crop_and_flip, seed=1)
    different.append(other[0, 1][0])
    for i, one in enumerate(different):
        assert one.shape == (3, 32, 32)
        assert not any(torch.equal(one, another) for another in different[:i])


@pytest.mark.parametrize("size", [(200, 150), (400, 20), (1, 1)])
def test_crops_lie_inside_the_image(size):
    image = Image.new("RGB", size, (255, 255, 255))
    convention = weights.at_resolution(weights.TORCHVISION, 16)
    for seed in range(20):
        cropped = datasets.crop_and_flip(image, convention, random.Random(seed))
        assert cropped.size == (16, 16) and cropped.getextrema() == ((255, 255),) * 3


def test_shifts_are_small(monkeypatch):
    image = Image.new("RGB", (80, 80))
    image.putpixel((40, 40), (255, 255, 255))
    monkeypatch.setattr(images, "fit", lambda image, convention: image)
    places = set()
    for seed in range(20):
        x, y, *_ = datasets.shift(image, weights.TORCHVISION, random.Random(seed)).getbbox()
        assert abs(x - 40) <= 9 and abs(y - 40) <= 9
        places.add((x, y))
    assert len(places) > 10


@pytest.mark.parametrize("name", ["a\nb", "a\u2028b", "a\udcff"])
def test_class_names_that_are_no_line_of_text(tmp_path, name):
    """labels.txt has a class a line, in UTF-8."""
    root = make_pictures(tmp_path / "data", 2)
    (tmp_path / "data" / "red").rename(tmp_path / "data" / name)
    with pytest.raises(datasets.DataError, match="expected a class name without line breaks and in UTF-8"):
        datasets.folder(root, weights.TORCHVISION)
