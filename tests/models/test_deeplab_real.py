"""A real DeepLabv3 (TensorFlow, VOC, width 0.5, output stride 8). Needs the directory that MNV2_FUSED_TEST_DATA names.
Its expected.npz holds the logits and masks of TensorFlow's runtime."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mnv2_fused import deeplabv3_mobilenet_v2, extras, multiscale
from mnv2_fused.data import images

DATA = Path(os.environ.get("MNV2_FUSED_TEST_DATA", ""), "tasks")
pytestmark = pytest.mark.skipif(
    not DATA.is_dir() or "MNV2_FUSED_TEST_DATA" not in os.environ,
    reason="MNV2_FUSED_TEST_DATA names no directory with the real networks",
)
PEOPLE = DATA / "coco_val_people"
EIGHTH = slice(None, None, 8)


@pytest.fixture(scope="module", params=[True, False], ids=["fused", "plain"])
def network(request):
    path = DATA / "deeplab_dm05_os8" / "deeplabv3_mnv2_050_os8_voc.safetensors"
    return deeplabv3_mobilenet_v2(path, tf=True, output_stride=8, fused=request.param).eval()


@pytest.fixture(scope="module")
def expected():
    return np.load(DATA / "deeplab_dm05_os8" / "expected.npz")


def named(expected):
    return sorted({name.rpartition(".")[0] for name in expected})


def test_arguments_follow_from_the_file(network):
    assert sum(p.numel() for p in network.parameters()) == 697_013
    widths = [network.backbone.channels(i) for i in (0, 1, 2, 4, 7, 11, 14, 17)]
    assert widths == [16, 8, 12, 16, 32, 48, 80, 160]
    assert {m.eps for m in network.modules() if hasattr(m, "eps")} == {1e-5}


@torch.inference_mode()
def test_logits_and_every_pixel(network, expected):
    assert len(named(expected)) == 5
    for name in named(expected):
        x = torch.from_numpy(expected[f"{name}.image"]).permute(2, 0, 1)[None] / 127.5 - 1
        logits = network(x)["out"]
        right = torch.from_numpy(expected[f"{name}.logits"]).permute(2, 0, 1)
        assert right.abs().max() > 10 and (logits[0, :, EIGHTH, EIGHTH] - right).abs().max() < 1e-3
        mask = torch.from_numpy(expected[f"{name}.mask"])[None]
        assert torch.equal(logits.argmax(1), mask) and torch.equal(network.predict_mask(x), mask)


@torch.inference_mode()
def test_mean_intersection_over_union(network):
    with contextlib.suppress(ImportError):
        extras.use("torchvision", "segmentation")  # torchmetrics imports it, if it is installed
    metrics = pytest.importorskip("torchmetrics.classification")
    right = json.loads((PEOPLE / "expected_miou.json").read_text(encoding="utf-8"))["litert"]
    metric = metrics.MulticlassJaccardIndex(num_classes=21, average=None, ignore_index=255)
    accuracy = metrics.MulticlassAccuracy(num_classes=21, average="micro", ignore_index=255)
    classes = set()
    for name in (PEOPLE / "val.txt").read_text(encoding="utf-8").split():
        target = torch.from_numpy(np.array(Image.open(PEOPLE / "SegmentationClass" / f"{name}.png"))).long()[None]
        image = images.read(PEOPLE / "images" / f"{name}.jpg")
        x = images.prepare(image, network.preprocessing, 257)[None]
        masks = network.predict_mask(x, target.shape[1:])
        metric.update(masks, target)
        accuracy.update(masks, target)
        classes |= set(target.unique().tolist()) - {255}
    scores = metric.compute()
    assert len(classes) == right["classes"]
    found = scores[sorted(classes)].mean().item(), scores[15].item(), accuracy.compute().item()
    assert found == pytest.approx((right["mIOU_present_classes"], right["person"], right["pixel_accuracy"]), abs=1e-5)


@torch.inference_mode()
def test_several_scales_agree_with_one(network, expected):
    x = torch.from_numpy(expected["pets.image"]).permute(2, 0, 1)[None] / 127.5 - 1
    probabilities = multiscale(network, x, (0.75, 1.0, 1.25))
    torch.testing.assert_close(probabilities.sum(1), torch.ones(1, 257, 257))
    torch.testing.assert_close(
        multiscale(network, x.flip(-1), (0.75, 1.0, 1.25)).flip(-1), probabilities, atol=1e-3, rtol=0
    )
    assert (probabilities.argmax(1) == network.predict_mask(x)).float().mean() > 0.95
