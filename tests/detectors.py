"""Small detectors with random statistics, and what they are tested on. Importing this skips without torchvision."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from oracle import randomize
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
