"""Average precision and mIOU."""

from __future__ import annotations

import json
import os
import types
from pathlib import Path

import pytest
import torch
from pictures import make_objects

import mnv2_fused
from mnv2_fused import cli, evaluation, extras
from mnv2_fused.data import detection
from mnv2_fused.data.datasets import DataError

for name in ("pycocotools.coco", "torchmetrics.classification"):
    try:
        extras.use(name, "detection")
    except ImportError as error:
        pytest.skip(str(error), allow_module_level=True)
DATA = Path(os.environ.get("MNV2_FUSED_TEST_DATA", ""), "tasks")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return detection.load(make_objects(tmp_path_factory.mktemp("objects") / "data"), (32, 32), augment=False).train


def found(photograph, score=0.9, label=None, shift=0.0):
    labels = photograph.labels if label is None else torch.full_like(photograph.labels, label)
    return {"boxes": photograph.boxes + shift, "scores": torch.full((len(labels),), score), "labels": labels}


def test_perfect_detections(data):
    scores = evaluation.DetectionScores(data.truth, data.label_ids)
    for photograph in data.photographs:
        scores.add(photograph.id, found(photograph))
    figures, lines = scores.figures()
    assert tuple(figures) == evaluation.COCO_FIGURES
    assert figures["AP"] == figures["AP50"] == figures["AR1"] == figures["APs"] == pytest.approx(1)
    assert figures["APm"] is None and figures["ARl"] is None  # no such boxes
    assert lines.count("\n") == 11 and " Average Precision  (AP) @[ IoU=0.50:0.95 | area=   all" in lines


def test_wrong_detections(data):
    def figures(**change):
        scores = evaluation.DetectionScores(data.truth, data.label_ids)
        for photograph in data.photographs:
            scores.add(photograph.id, found(photograph, **change))
        return scores.figures()[0]

    assert figures(label=9)["AP"] == 0  # no category
    assert figures(shift=200.0)["AP"] == 0
    assert 0.2 < figures(label=1)["AP50"] < 0.5  # half of one class is right, none of the other
    moved = figures(shift=2.0)
    assert moved["AP50"] == pytest.approx(1) and 0 < moved["AP"] < 0.7


def test_no_detections(data):
    scores = evaluation.DetectionScores(data.truth, data.label_ids)
    scores.add(10, {"boxes": torch.zeros(0, 4), "scores": torch.zeros(0), "labels": torch.zeros(0, dtype=torch.int64)})
    assert scores.figures()[0]["AP50"] == 0


def test_only_the_images_that_were_added_count(data):
    scores = evaluation.DetectionScores(data.truth, data.label_ids)
    scores.add(data.photographs[0].id, found(data.photographs[0]))
    assert scores.figures()[0]["AP"] == pytest.approx(1)


def test_masks_by_hand():
    truth = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 255]])
    predicted = torch.tensor([[0, 0, 1, 0], [3, 0, 1, 1]])
    scores = evaluation.SegmentationScores(4)
    scores.add(predicted, truth)
    figures, iou = scores.figures()
    assert iou == [pytest.approx(3 / 5), pytest.approx(2 / 3), None, None]  # class 3 is nowhere in the truth
    assert figures == {"mIOU": pytest.approx((3 / 5 + 2 / 3) / 2), "pixel_accuracy": pytest.approx(5 / 7)}
    scores.add(predicted, predicted)
    assert scores.figures()[1][3] == pytest.approx(1 / 2)


def test_masks_without_truth():
    scores = evaluation.SegmentationScores(3)
    scores.add(torch.zeros(2, 2, dtype=torch.int64), torch.full((2, 2), 255))
    with pytest.raises(DataError, match="only pixels that are ignored"):
        scores.figures()
    model = mnv2_fused.deeplabv3_mobilenet_v2(num_classes=3, width_mult=0.1).eval()
    ignored = [(torch.randn(1, 3, 33, 33), [torch.full((33, 33), 255)])]
    with pytest.raises(DataError, match="only pixels that are ignored"):
        evaluation.score_masks(model, types.SimpleNamespace(classes=3), ignored).figures()


@pytest.mark.skipif("MNV2_FUSED_TEST_DATA" not in os.environ, reason="MNV2_FUSED_TEST_DATA names no directory")
def test_the_right_values_of_real_networks(tmp_path):
    """As TensorFlow's and LiteRT's own outputs have them on the same 24 photographs."""
    common = ["--data", str(DATA / "coco_val_people"), "--threads", "1", "--json", str(tmp_path / "out.json")]
    weights = str(DATA / "ssdlite_person" / "ssdlite_mobilenet_v2_person.safetensors")
    assert cli.main(["evaluate", "--task", "detection", "--weights", weights, "--tf", *common]) == 0
    figures = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["figures"]
    expected = json.loads((DATA / "coco_val_people" / "expected_ap.json").read_text(encoding="utf-8"))["tensorflow"]
    for name, value in expected.items():
        assert figures[name] == pytest.approx(value, abs=1e-4), name

    weights = str(DATA / "deeplab_dm05_os8" / "deeplabv3_mnv2_050_os8_voc.safetensors")
    options = ["--weights", weights, "--tf", "--output-stride", "8", "--resolution", "257"]
    assert cli.main(["evaluate", "--task", "segmentation", *options, *common]) == 0
    content = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    expected = json.loads((DATA / "coco_val_people" / "expected_miou.json").read_text(encoding="utf-8"))["litert"]
    assert content["figures"]["mIOU"] == pytest.approx(expected["mIOU_present_classes"], abs=1e-5)
    assert content["figures"]["pixel_accuracy"] == pytest.approx(expected["pixel_accuracy"], abs=1e-5)
    assert content["iou"]["person"] == pytest.approx(expected["person"], abs=1e-5)
    assert sum(share is not None for share in content["iou"].values()) == expected["classes"]


def test_boxes_are_scaled_to_the_photograph(data):
    """A network that knows the truth, in pixels of its own input."""
    batches = [([x], [target]) for x, target in (data[i] for i in range(len(data)))]
    answers = iter(target for _, (target,) in batches)

    class Oracle(torch.nn.Module):
        def forward(self, images):
            target = next(answers)
            return [{**target, "scores": torch.ones(len(target["labels"]))} for _ in images]

    assert evaluation.score_detections(Oracle(), data, batches).figures()[0]["AP"] == pytest.approx(1)
