"""Photographs with masks: what is read, what is refused, and how they are augmented."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import make_objects
from PIL import Image
from torch.utils.data import DataLoader

from mnv2_fused import weights
from mnv2_fused.data import datasets, images, segmentation

CONVENTION = dataclasses.replace(weights.TENSORFLOW, crop=33, interpolation="bilinear")


@pytest.fixture
def folder(tmp_path):
    return Path(make_objects(tmp_path / "data"))


def values(folder: Path, index: int) -> np.ndarray:
    return np.array(Image.open(folder / "SegmentationClass" / f"{index}.png"))


def test_a_mask_keeps_its_size_for_validation_alone(folder):
    data = segmentation.load(folder, CONVENTION, augment=False)
    assert data.train is data.held_out and data.labels == ["background", "blue thing", "red thing"]
    x, mask = data.held_out[1]
    assert torch.equal(x, images.prepare(images.read(folder / "images" / "1.png"), CONVENTION))
    assert mask.dtype == torch.int64 and np.array_equal(mask.numpy(), values(folder, 1))
    assert set(mask.unique().tolist()) == {0, 2, 255}
    again, small = data.train[1, 3]
    assert torch.equal(again, x) and small.shape == (33, 33) and set(small.unique().tolist()) <= {0, 2, 255}


def test_voc_s_own_layout_and_classes(folder):
    lists = folder / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (folder / "labels.txt").unlink()
    (folder / "val.txt").rename(lists / "val.txt")
    (lists / "train.txt").write_text("0\n2\n\n", encoding="utf-8")
    (folder / "JPEGImages").mkdir()
    for i in range(6):
        Image.open(folder / "images" / f"{i}.png").save(folder / "JPEGImages" / f"{i}.jpg")
    data = segmentation.load(folder, CONVENTION, augment=False)
    assert (len(data.train), len(data.held_out)) == (2, 6) and data.train.pairs[1][0].name == "2.jpg"
    assert len(data.labels) == 21 and data.labels[15] == "person" and data.train.classes == 21


def test_grey_masks_are_as_good(folder):
    before = values(folder, 2)
    Image.fromarray(before).save(folder / "SegmentationClass" / "2.png")
    _, mask = segmentation.load(folder, CONVENTION, augment=False).train[2]
    assert np.array_equal(mask.numpy(), before)


def test_masks_that_do_not_fit_are_named(folder):
    data = segmentation.load(folder, CONVENTION, augment=False).train
    masks = folder / "SegmentationClass"
    Image.new("P", (40, 48)).save(masks / "0.png")
    Image.fromarray(np.full((40, 48), 3, np.uint8)).save(masks / "1.png")
    Image.new("RGB", (48, 40)).save(masks / "2.png")
    (masks / "3.png").write_bytes(b"")
    (folder / "images" / "4.png").write_bytes(b"\x89PNG\r\n")
    for index, message in {
        0: f"{masks}/0.png has 40x48 pixels, expected 48x40 as {folder}/images/0.png",
        1: f"{masks}/1.png: expected classes from 0 to 2, or 255, got 3",
        2: f"{masks}/2.png: expected a mask with a palette or of 8-bit grey, got colours",
        3: f"expected an image in {masks}/3.png, got an empty file",
        4: f"not an image, or of a kind that Pillow does not read: {folder}/images/4.png",
    }.items():
        for key in (index, (index, 1)):
            assert isinstance(data[key], images.ImageError) and str(data[key]) == message


def test_folders_that_do_not_fit_are_named(folder, tmp_path):
    def load(change):
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        shutil.copytree(folder, tmp_path / "copy")
        change(tmp_path / "copy")
        with pytest.raises(datasets.DataError) as caught:
            segmentation.load(tmp_path / "copy", CONVENTION, augment=False)
        return str(caught.value)

    assert "val.txt: 2: no such mask: " in load(lambda root: (root / "SegmentationClass" / "2.png").unlink())
    assert "val.txt: 2: no such image: " in load(lambda root: (root / "images" / "2.png").unlink())
    assert "val.txt: expected the name of a photograph in each line" in load(
        lambda root: (root / "val.txt").write_text("\n")
    )
    assert "expected train.txt or val.txt" in load(lambda root: (root / "val.txt").unlink())
    assert "expected photographs in JPEGImages or images" in load(lambda root: shutil.rmtree(root / "images"))
    assert "labels.txt: expected 2 to 255 classes" in load(lambda root: (root / "labels.txt").write_text("one\n"))
    assert "got no folder" in load(shutil.rmtree)


def test_augmentation_follows_from_seed_epoch_and_index_alone(folder, torchvision_mobilenetv2):
    data = segmentation.load(folder, CONVENTION, seed=3).train
    before = torch.get_rng_state()
    keys = [(index, epoch) for index in range(6) for epoch in range(1, 5)]
    here = [data[key] for key in keys]
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    (there,) = list(DataLoader(data, batch_sampler=[keys], num_workers=2, collate_fn=list))
    assert all(
        torch.equal(a, b) for one, other in zip(here, there, strict=True) for a, b in zip(one, other, strict=True)
    )
    assert len({x.sum().item() for x, _ in here}) > 15
    different = segmentation.load(folder, CONVENTION, seed=4).train
    assert any(not torch.equal(different[key][0], x) for key, (x, _) in zip(keys, here, strict=True))


def test_augmented_masks_stay_on_their_objects(folder, torchvision_mobilenetv2):
    data = segmentation.load(folder, CONVENTION).train
    padded = 0
    for epoch in range(24):
        index = epoch % 6
        x, mask = data[index, epoch]
        assert x.shape == (3, 33, 33) and mask.shape == (33, 33) and mask.dtype == torch.int64
        assert set(mask.unique().tolist()) <= {0, 1 + index % 2, 255}
        red = x[0] > 0.3
        assert not (red & (mask == 1)).any() or index % 2
        if index % 2:
            assert (red == (mask == 2))[mask != 255].float().mean() > 0.9
        border = (x.abs() < 0.01).all(0)  # the mean colour
        assert (mask[border] == 255).all()
        padded += border.any().item()
    assert 3 < padded < 24
