"""A real SSDLite for persons. Outputs, detections and the average precision are those of the original."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from detectors import DATA, PERSON, Photographs, needs_data
from torch import nn

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


@pytest.fixture(scope="module")
def photographs():
    return Photographs()


def test_average_precision(model, photographs):
    model.fused = True
    right = json.loads((DATA / "coco_val_people" / "expected_ap.json").read_text(encoding="utf-8"))["tensorflow"]
    got = photographs.precision(model)
    assert got == pytest.approx({name: right[name] for name in got}, abs=1e-4)


def test_training_learns_the_photographs_by_heart(photographs):
    """36 steps with fixed statistics, about 15 seconds on one core."""
    model = mnv2_fused.ssdlite320_mobilenet_v2(PERSON, trainable_backbone_layers=3).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=36, pct_start=0.2)
    for _ in range(12):
        for batch in torch.randperm(len(photographs.images)).split(8):
            optimizer.zero_grad()
            losses = model([photographs.images[i] for i in batch], [photographs.targets[i] for i in batch])
            sum(losses.values()).backward()
            optimizer.step()
            schedule.step()
    assert photographs.precision(model.eval())["AP50"] > 0.8
