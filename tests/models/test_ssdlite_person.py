"""A real SSDLite for persons. Outputs, detections and the average precision are those of the original."""

from __future__ import annotations

import contextlib
import io
import json

import numpy as np
import pytest
import torch
from detectors import DATA, PERSON, needs_data
from PIL import Image

import mnv2_fused

pytestmark = needs_data
switch = pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])


@pytest.fixture(scope="module")
def model():
    return mnv2_fused.ssdlite320_mobilenet_v2(PERSON).eval()


@pytest.fixture(scope="module")
def arrays():
    with np.load(PERSON.with_name("expected.npz")) as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


@pytest.fixture(scope="module")
def expected():
    return json.loads(PERSON.with_name("expected.json").read_text(encoding="utf-8"))


def image_of(arrays, name):
    return arrays[f"{name}.image"].permute(2, 0, 1) / 255


def test_file_says_what_the_network_is(model):
    assert model.tf and model.num_classes == 2
    assert sum(p.numel() for p in model.parameters()) == 3045126


def test_anchors(model, arrays):
    got = model.anchor_generator.boxes(300, 300)[:, [1, 0, 3, 2]] / 300
    torch.testing.assert_close(got, arrays["anchors_yxyx"], rtol=0, atol=1e-6)


@switch
@torch.inference_mode()
def test_outputs(model, arrays, expected, fused):
    model.fused = fused
    for name in expected:
        got = model.head_outputs((image_of(arrays, name)[None] - 0.5) / 0.5)
        codes = arrays[f"{name}.boxes"][None, :, [1, 0, 3, 2]]  # TensorFlow has y, x, h, w
        torch.testing.assert_close(got["bbox_regression"], codes, rtol=0, atol=1e-4)
        torch.testing.assert_close(got["cls_logits"], arrays[f"{name}.logits"][None], rtol=0, atol=1e-4)


@switch
@torch.inference_mode()
def test_detections(model, arrays, expected, fused):
    model.fused = fused
    for name, answer in expected.items():
        got = model([image_of(arrays, name)])[0]
        wanted = answer["detections"]
        assert (got["scores"] > 0.3).sum() == len(wanted) > 0
        assert got["labels"].unique().tolist() == [1] and len(got["labels"]) <= 100
        boxes = torch.tensor([each["box_xyxy"] for each in wanted])
        torch.testing.assert_close(got["boxes"][: len(wanted)] / 300, boxes, rtol=0, atol=1e-4)
        scores = torch.tensor([each["score"] for each in wanted])
        torch.testing.assert_close(got["scores"][: len(wanted)], scores, rtol=0, atol=1e-4)


@torch.inference_mode()
def test_average_precision(model):
    """On 24 photographs, resized as in the measurement: with Pillow's bilinear filter."""
    pytest.importorskip("pycocotools")
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    model.fused = True
    folder, found = DATA / "coco_val_people", []
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(folder / "instances.json"))
    for key, facts in truth.imgs.items():
        with Image.open(folder / "images" / facts["file_name"]) as file:
            pixels = np.array(file.convert("RGB").resize((300, 300), Image.Resampling.BILINEAR))
        got = model([torch.from_numpy(pixels).permute(2, 0, 1) / 255])[0]
        scale = torch.tensor([facts["width"], facts["height"]] * 2) / 300
        for (x1, y1, x2, y2), score in zip((got["boxes"] * scale).tolist(), got["scores"].tolist(), strict=True):
            box = [x1, y1, x2 - x1, y2 - y1]
            found.append({"image_id": key, "category_id": 1, "bbox": box, "score": score})
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(truth, truth.loadRes(found), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    right = json.loads((folder / "expected_ap.json").read_text(encoding="utf-8"))["tensorflow"]
    got = dict(zip(("AP", "AP50", "AP75"), evaluation.stats[:3], strict=True))
    assert got == pytest.approx({name: right[name] for name in got}, abs=1e-4)
