"""Photographs with boxes: what is read, what is refused, and how they are augmented."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from pictures import make_objects
from PIL import Image
from torch.utils.data import DataLoader

from mnv2_fused.data import datasets, detection, images

SIZE = (32, 24)


@pytest.fixture
def folder(tmp_path):
    return Path(make_objects(tmp_path / "data"))


def edit(folder: Path, change) -> dict:
    """Applies `change` to the content of instances.json."""
    file = folder / "instances.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    change(content)
    file.write_text(json.dumps(content), encoding="utf-8")
    return content


def test_labels_follow_the_ids_of_the_categories(folder):
    data = detection.load(folder, SIZE, augment=False)
    assert data.train is data.held_out and len(data.train) == 6
    assert data.labels == ["background", "blue thing", "red thing"]
    assert data.train.label_ids == {1: 3, 2: 7}
    content = json.loads((folder / "instances.json").read_text(encoding="utf-8"))
    for photograph, entry in zip(data.train.photographs, content["annotations"], strict=True):
        x, y, w, h = entry["bbox"]
        assert photograph.boxes.tolist() == [[x, y, x + w, y + h]]
        assert photograph.labels.tolist() == [1 if entry["category_id"] == 3 else 2]


def test_an_item_is_resized_with_its_boxes(folder):
    data = detection.load(folder, SIZE, augment=False).train
    for item in (data[1], data[1, 5]):
        x, target = item
        assert x.shape == (3, 24, 32) and x.dtype == torch.float32 and 0 <= x.min() < x.max() <= 1
        assert target["image_id"] == 11 and target["labels"].tolist() == [2]
        torch.testing.assert_close(target["boxes"] * target["scale"], data.photographs[1].boxes)
    expected = images.read(folder / "images" / "1.png").resize(SIZE, Image.Resampling.BILINEAR)
    assert torch.equal(data[1][0], images.pixels(expected) / 255)
    left, top, right, bottom = data[1][1]["boxes"][0].round().int().tolist()
    inside = data[1][0][:, top + 2 : bottom - 2, left + 2 : right - 2]
    assert (inside[0] > 0.7).all() and (inside[2] < 0.4).all()  # the red thing is in its box


def test_crowd_regions_are_kept_for_evaluation_alone(folder):
    edit(folder, lambda content: content["annotations"][2].update(iscrowd=1))
    data = detection.load(folder, SIZE, augment=False).train
    assert data.photographs[2].boxes.shape == (0, 4) and data[2, 1][1]["boxes"].shape == (0, 4)
    assert [entry["iscrowd"] for entry in data.truth["annotations"]] == [0, 0, 1, 0, 0, 0]
    assert all(entry["id"] > 0 for entry in data.truth["annotations"])


def test_boxes_that_end_a_little_outside_are_clipped(folder):
    edit(folder, lambda content: content["annotations"][0].update(bbox=[-0.5, 30, 48.9, 10.4]))
    assert detection.load(folder, SIZE, False).train.photographs[0].boxes.tolist() == [[0, 30, 48, 40]]


def test_coco_s_own_layout(folder):
    (folder / "annotations").mkdir()
    for part in ("train2017", "val2017"):
        (folder / "images").rename(folder / part) if part == "train2017" else (folder / part).symlink_to("train2017")
        (folder / "annotations" / f"instances_{part}.json").write_bytes((folder / "instances.json").read_bytes())
    (folder / "instances.json").unlink()
    data = detection.load(folder, SIZE, augment=False)
    assert data.train is not data.held_out
    assert data.train.photographs[0].path == folder / "train2017" / "0.png"
    assert data.held_out.photographs[0].path == folder / "val2017" / "0.png"
    changed = json.loads((folder / "annotations" / "instances_val2017.json").read_text(encoding="utf-8"))
    changed["categories"][0]["name"] = "other"
    (folder / "annotations" / "instances_val2017.json").write_text(json.dumps(changed), encoding="utf-8")
    with pytest.raises(datasets.DataError, match="expected the same categories to train on and to validate on"):
        detection.load(folder, SIZE, augment=False)


def put(*path):
    """A change of instances.json: the value at `path[:-1]` becomes `path[-1]`."""

    def change(content):
        for key in path[:-2]:
            content = content[key]
        content[path[-2]] = path[-1]

    return change


BOX = ("annotations", 4, "bbox")
BAD = {
    "outside": (put(*BOX, [40, 5, 10, 10]), "annotation 4: bbox: expected a box inside 4.png of 48x40 pixels, got [40"),
    "left": (put(*BOX, [-2, 5, 10, 10]), "annotation 4: bbox: expected a box inside 4.png"),
    "at the border": (put(*BOX, [-1, 5, 1, 10]), "annotation 4: bbox: expected a box inside 4.png, got"),
    "no width": (put(*BOX, [4, 5, 0, 10]), "annotation 4: bbox: expected a width and a height of at least 0.01 pixels"),
    "negative": (put(*BOX, [4, 5, 3, -1]), "annotation 4: bbox: expected a width and a height"),
    "NaN": (put(*BOX, [4, 5, float("nan"), 1]), "annotation 4: bbox: expected x, y, width and height, got"),
    "three": (put(*BOX, [4, 5, 3]), "annotation 4: bbox: expected x, y, width and height, got [4, 5, 3]"),
    "category": (
        put("annotations", 4, "category_id", 1),
        "annotation 4: expected the id of a category, got category_id 1",
    ),
    "image": (put("annotations", 4, "image_id", 99), "annotation 4: expected the id of an image, got image_id 99"),
    "image in a list": (put("annotations", 4, "image_id", [4]), "expected the id of an image, got image_id [4]"),
    "category in a list": (
        put("annotations", 4, "category_id", [7]),
        "expected the id of a category, got category_id [7]",
    ),
    "many digits": (put(*BOX, [10**400, 5, 3, 1]), "annotation 4: bbox: expected x, y, width and height, got [1000"),
    "long id": (
        put("images", 2, "id", 2**64),
        "images: id: expected a whole number of 64 bits, got 18446744073709551616",
    ),
    "twice": (put("annotations", 4, "id", 3), "annotation 3: expected an id of its own"),
    "crowd": (put("annotations", 4, "iscrowd", 2), "annotation 4: iscrowd: expected 0 or 1, got 2"),
    "area": (put("annotations", 4, "area", "big"), "annotation 4: area: expected a number from 0, got 'big'"),
    "no id": (put("annotations", 4, "id", None), "annotations: id: expected a whole number of 64 bits, got None"),
    "width": (put("images", 2, "width", 0), "image 12: width: expected pixels, got 0"),
    "long width": (put("images", 2, "width", 10**400), "image 12: width: expected pixels, got 1000"),
    "missing file": (put("images", 2, "file_name", "none.png"), "image 12: no such image: "),
    "no file name": (put("images", 2, "file_name", ""), "image 12: file_name: expected the name of a file, got ''"),
    "image twice": (put("images", 2, "id", 10), "images: expected an id of its own, got 10 twice"),
    "names": (put("categories", 0, "name", "a\nb"), "category 7: name: expected a line of text"),
    "categories twice": (put("categories", 0, "id", 3), "categories: expected an id of its own, got 3 twice"),
    "no images": (put("images", []), "expected a list of images, got an empty list"),
    "no annotations": (put("annotations", []), "expected a list of annotations, got an empty list"),
    "all crowds": (
        lambda content: [entry.update(iscrowd=1) for entry in content["annotations"]],
        "expected at least one annotation that is no crowd region",
    ),
    "no categories": (lambda content: content.pop("categories"), "expected a list of categories, got none"),
    "numbers": (put("annotations", [1, 2]), "annotations: expected dictionaries, got 1"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD.keys())
def test_bad_annotations_are_named(change, message, folder):
    edit(folder, change)
    with pytest.raises(datasets.DataError) as caught:
        detection.load(folder, SIZE, augment=False)
    assert str(caught.value).startswith(str(folder / "instances.json")) and message in str(caught.value)


def test_folders_that_hold_no_list(tmp_path, folder):
    for path, message in {
        tmp_path / "none": "expected a folder with instances.json or annotations/instances_*.json, got no folder",
        tmp_path: "expected instances.json or annotations/instances_train*.json and _val*.json, got none",
    }.items():
        with pytest.raises(datasets.DataError) as caught:
            detection.load(path, SIZE, augment=False)
        assert str(caught.value) == f"{path}: {message}"
    for content, message in {"{": "is not JSON", "[]": "expected COCO's dictionary"}.items():
        (folder / "instances.json").write_text(content, encoding="utf-8")
        with pytest.raises(datasets.DataError, match=rf"instances\.json.* {message}"):
            detection.load(folder, SIZE, augment=False)


def test_images_that_do_not_fit_or_cannot_be_read(folder):
    data = detection.load(folder, SIZE, augment=False).train
    Image.new("RGB", (40, 48)).save(folder / "images" / "1.png")
    (folder / "images" / "2.png").write_bytes(b"no image")
    assert isinstance(data[1], images.ImageError)
    assert str(data[1]) == f"{folder}/images/1.png has 40x48 pixels, but its annotations are for 48x40"
    assert str(data[2, 1]).startswith("not an image") and str(folder / "images" / "2.png") in str(data[2, 1])
    turned = Image.new("RGB", (48, 40)).getexif()
    turned[0x0112] = 3  # by 180 degrees: the size is right, the boxes are not
    Image.new("RGB", (48, 40)).save(folder / "images" / "3.png", exif=turned)
    assert "3.png: expected an image that is stored upright" in str(data[3])
    assert images.read(folder / "images" / "3.png").size == (48, 40)  # without annotations it is turned


def test_augmentation_follows_from_seed_epoch_and_index_alone(folder, torchvision_mobilenetv2):
    data = detection.load(folder, SIZE, seed=3).train
    before = torch.get_rng_state()
    keys = [(index, epoch) for index in range(6) for epoch in range(1, 7)]
    here = [data[key] for key in keys]
    assert torch.equal(torch.get_rng_state(), before)
    loader = DataLoader(data, batch_sampler=[keys], num_workers=2, collate_fn=list)
    torch.manual_seed(99)
    (there,) = list(loader)
    for (x, target), (y, other) in zip(here, there, strict=True):
        assert torch.equal(x, y) and target.keys() == other.keys()
        assert all(torch.equal(target[name], other[name]) for name in target)
    assert len({x.sum().item() for x, _ in here}) > 20
    different = detection.load(folder, SIZE, seed=4).train
    assert any(not torch.equal(different[key][0], x) for key, (x, _) in zip(keys, here, strict=True))


def test_augmented_boxes_stay_on_their_objects(folder, torchvision_mobilenetv2):
    data = detection.load(folder, (96, 80)).train
    cut = 0
    for epoch in range(30):
        x, target = data[epoch % 6, epoch]
        for box, label in zip(target["boxes"], target["labels"].tolist(), strict=True):
            left, top, right, bottom = box.tolist()
            assert 0 <= left < right <= 96 and 0 <= top < bottom <= 80
            if min(right - left, bottom - top) > 8:
                middle = x[:, int((top + bottom) / 2), int((left + right) / 2)]
                assert (middle[0] > middle[2]) == (label == 2)
            cut += abs((right - left) - 2 * (data.photographs[epoch % 6].boxes[0, ::2].diff().item())) > 1
    assert cut > 5  # the photograph was cropped, so its objects have other sizes


def test_torch_seed_restores_the_generator():
    before = torch.get_rng_state()
    with datasets.torch_seed(random.Random(1)):
        first = torch.rand(3)
    with datasets.torch_seed(random.Random(1)):
        assert torch.equal(torch.rand(3), first)
    assert torch.equal(torch.get_rng_state(), before)
