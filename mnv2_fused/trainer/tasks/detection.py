"""Detection with SSDLite: torchvision's recipe."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import nn

from mnv2_fused import weights
from mnv2_fused.builders import ssdlite320_mobilenet_v2
from mnv2_fused.data import datasets, detection
from mnv2_fused.evaluation import DetectionScores, score_detections
from mnv2_fused.tools import measure
from mnv2_fused.trainer.config import Config
from mnv2_fused.trainer.tasks.base import State, Task, contradiction, convention_of, read_backbone, with_new_layers
from mnv2_fused.weights import Convention
from mnv2_fused.weights.detection import load_detector


class Detection(Task):
    """Photographs with boxes."""

    name = "detection"
    title = "SSDLite MobileNetV2"
    headline: ClassVar = {"AP": "AP", "AP50": "AP50"}
    without = ("output_stride", "aspp", "round_nearest", "label_smoothing", "project_activation", "shortcut")
    packages = ("pycocotools.coco", "pycocotools.cocoeval")
    command = "detect"

    def defaults(self, config: Config) -> dict[str, Any]:
        batch = 24 if config.batch is None else config.batch
        return {
            "epochs": 660,
            "batch": batch,
            "lr": 0.15 * batch / (24 * 8),
            "warmup": 1.0,
            "width": 1.0,
            "resolution": 300 if weights.pads_as_tensorflow(config.convention) else 320,
            "freeze_bn": False,
            "sync_bn": False,
            "augment": True,
            "workers": min(4, measure.usable_cpus()),
        }

    def load(self, name: str, config: Config, convention: Convention) -> datasets.Data:
        return detection.load(name, (config.resolution,) * 2, config.augment, config.seed)

    def build(self, config: Config, classes: int, state: State | None) -> nn.Module:
        model = ssdlite320_mobilenet_v2(
            num_classes=classes,
            width_mult=config.width,
            tf=weights.pads_as_tensorflow(config.convention),
            size=config.resolution,
            fused=config.fused,
        )
        model.recompute = config.recompute
        return model

    def read_start(self, config: Config) -> tuple[State, Config]:
        backbone = read_backbone(config)
        if backbone is None:
            start, found = load_detector(config.weights)
            width, tf, size = found.width_mult, found.tf, found.size
        else:
            (start, tf), size = backbone, None
            width = weights.width_mult(weights.below(start, "backbone."))
        if config.width not in (None, width):
            raise contradiction("--width", config.width, width)
        return start, dataclasses.replace(
            config, width=width, convention=convention_of(config, tf), resolution=config.resolution or size
        )

    def merge(self, start: State, own: State) -> tuple[State, set[str]]:
        return with_new_layers(start, own, "head.classification_head.")

    def collate(self, items: list[tuple]) -> tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]:
        return [image for image, _ in items], [target for _, target in items]

    def loss(self, model: nn.Module, x: list, target: list, config: Config) -> tuple[torch.Tensor, float, int]:
        loss = sum(model(x, target).values())
        detector = getattr(model, "module", model)  # of DistributedDataParallel
        return loss, detector.positive_anchors.item(), 0

    def score(
        self, model: nn.Module, data: detection.DetectionSet, batches: Iterable[tuple[list, list]]
    ) -> tuple[list[int], list[dict]]:
        return score_detections(model, data, batches).answers()

    def figures(
        self, scores: list[tuple[list[int], list[dict]]], data: detection.DetectionSet
    ) -> dict[str, float | None]:
        total = DetectionScores(data.truth, data.label_ids)
        for answers in scores:
            total.add_answers(answers)
        return total.figures()[0]

    def facts(self, config: Config, classes: int) -> dict[str, object]:
        return {**super().facts(config, classes), "task": self.name, "num_classes": classes, "width_mult": config.width}
