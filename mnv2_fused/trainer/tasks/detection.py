"""Detection with SSDLite: torchvision's recipe."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from mnv2_fused import networks, weights
from mnv2_fused.data import datasets, detection
from mnv2_fused.evaluation import DetectionScores
from mnv2_fused.tools import measure
from mnv2_fused.trainer.config import Config
from mnv2_fused.trainer.tasks.base import State, Task, contradiction
from mnv2_fused.weights import Convention


class Detection(Task):
    """Photographs with boxes."""

    name = "detection"
    title = "SSDLite MobileNetV2"
    headline = {"AP": "AP", "AP50": "AP50"}
    without = ("output_stride", "aspp", "round_nearest", "label_smoothing")
    command = "detect"

    def defaults(self, config: Config) -> dict[str, Any]:
        batch = 24 if config.batch is None else config.batch
        return {
            "epochs": 660,
            "batch": batch,
            "lr": 0.15 * batch / (24 * 8),
            "warmup": 1.0,
            "width": 1.0,
            "resolution": networks.DETECTION_SIZE[config.convention or "torchvision"],
            "freeze_bn": False,
            "augment": True,
            "workers": min(4, measure.usable_cpus()),
        }

    def load(self, name: str, config: Config, convention: Convention) -> datasets.Data:
        return detection.load(name, config.augment, config.seed)

    def build(self, config: Config, classes: int) -> nn.Module:
        model = networks.ssdlite(
            num_classes=classes,
            width_mult=config.width,
            tf=weights.CONVENTIONS[config.convention].tf_padding,
            size=config.resolution,
            fused=config.fused,
        )
        model.recompute = config.recompute
        return model

    def read_start(self, config: Config) -> tuple[State, Config]:
        start, facts = networks.read_start(config.weights, config.convention, "features.18.")
        width = weights.width_mult({key.removeprefix("backbone."): value for key, value in start.items()})
        if config.width not in (None, width):
            raise contradiction("--width", f"{config.width:g}", f"{width:g}")
        convention = config.convention or facts.convention or "torchvision"
        resolution = config.resolution or facts.resolution
        return start, dataclasses.replace(config, width=width, convention=convention, resolution=resolution)

    def merge(self, start: State, own: State) -> tuple[State, set[str]]:
        return networks.merge(start, own, head="head.", predictors="head.classification_head.")

    def collate(self, items: list[tuple]) -> tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]:
        return [image for image, _ in items], [target for _, target in items]

    def loss(self, model: nn.Module, x: list, target: list, config: Config) -> tuple[torch.Tensor, int]:
        return sum(model(x, target).values()), 0

    def validate(
        self, model: nn.Module, data: detection.DetectionSet, batches: Iterable[tuple[list, list]]
    ) -> dict[str, float | None]:
        scores = DetectionScores(data.truth, {label: id_ for label, (id_, _) in enumerate(data.categories, 1)})
        for x, targets in batches:
            for found, target in zip(model(x), targets, strict=True):
                scores.add(target["image_id"].item(), found)
        return scores.figures()[0]

    def facts(self, config: Config, classes: int) -> dict[str, object]:
        return {**super().facts(config, classes), "task": self.name, "num_classes": classes, "width_mult": config.width}
