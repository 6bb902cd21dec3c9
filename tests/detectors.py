"""Small detectors with random statistics, and what they are tested on. Importing this skips without torchvision."""

from __future__ import annotations

import contextlib
import io
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from oracle import randomize
from PIL import Image
from torch import Tensor, nn

import mnv2_fused
from mnv2_fused import extras

try:
    SSD = extras.use("torchvision.models.detection.ssd", "detection").SSD
except ImportError as error:
    pytest.skip(str(error), allow_module_level=True)

DATA = Path(os.environ.get("MNV2_FUSED_TEST_DATA", "")) / "tasks"
PERSON = DATA / "ssdlite_person" / "ssdlite_mobilenet_v2_person.safetensors"
needs_data = pytest.mark.skipif(
    "MNV2_FUSED_TEST_DATA" not in os.environ, reason="MNV2_FUSED_TEST_DATA names no directory with real networks"
)


class Outputs(nn.Module):
    """What the detector's network alone computes, in one tensor (n, anchors, 4 + classes)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        outputs = self.model.head_outputs(x)
        return torch.cat([outputs["bbox_regression"], outputs["cls_logits"]], dim=-1)


def make(num_classes: int = 5, width_mult: float = 0.35, size: int = 96, **options) -> nn.Module:
    """A detector in eval mode."""
    model = mnv2_fused.ssdlite320_mobilenet_v2(num_classes=num_classes, width_mult=width_mult, size=size, **options)
    randomize(Outputs(model), torch.randn(4, 3, size, size))
    return model.eval()


def make_images(count: int = 3) -> list[Tensor]:
    """Images of different sizes."""
    return [torch.rand(3, 70 + 13 * i, 120 - 17 * i) for i in range(count)]


def make_targets(images: list[Tensor], num_classes: int = 5, boxes: int = 3) -> list[dict[str, Tensor]]:
    targets = []
    for image in images:
        size = torch.tensor([image.shape[2], image.shape[1]])
        corner = torch.rand(boxes, 2) * 0.6
        far = corner + 0.1 + torch.rand(boxes, 2) * 0.3
        labels = torch.randint(1, num_classes, (boxes,))
        targets.append({"boxes": torch.cat([corner * size, far * size], dim=1), "labels": labels})
    return targets


class Photographs:
    """24 photographs of people with their boxes. All are resized to `size` x `size` with Pillow's bilinear filter."""

    def __init__(self, size: int = 300) -> None:
        coco = pytest.importorskip("pycocotools.coco")
        folder = DATA / "coco_val_people"
        with contextlib.redirect_stdout(io.StringIO()):
            self.truth = coco.COCO(str(folder / "instances.json"))
        self.images, self.targets, self._scales = [], [], {}
        for key, facts in self.truth.imgs.items():
            with Image.open(folder / "images" / facts["file_name"]) as file:
                pixels = np.array(file.convert("RGB").resize((size, size), Image.Resampling.BILINEAR))
            self.images.append(torch.from_numpy(pixels).permute(2, 0, 1) / 255)
            self._scales[key] = torch.tensor([facts["width"], facts["height"]] * 2) / size
            boxes = torch.tensor([each["bbox"] for each in self.truth.imgToAnns[key]])  # x, y, width, height
            boxes[:, 2:] += boxes[:, :2]
            labels = torch.ones(len(boxes), dtype=torch.int64)
            self.targets.append({"boxes": boxes / self._scales[key], "labels": labels})

    @torch.inference_mode()
    def precision(self, model: nn.Module) -> dict[str, float]:
        """COCO's AP, AP50 and AP75."""
        from pycocotools.cocoeval import COCOeval

        found = []
        for image, (key, scale) in zip(self.images, self._scales.items(), strict=True):
            got = model([image])[0]
            for (x1, y1, x2, y2), score in zip((got["boxes"] * scale).tolist(), got["scores"].tolist(), strict=True):
                box = [x1, y1, x2 - x1, y2 - y1]
                found.append({"image_id": key, "category_id": 1, "bbox": box, "score": score})
        with contextlib.redirect_stdout(io.StringIO()):
            evaluation = COCOeval(self.truth, self.truth.loadRes(found), "bbox")
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        return dict(zip(("AP", "AP50", "AP75"), evaluation.stats[:3].tolist(), strict=True))
