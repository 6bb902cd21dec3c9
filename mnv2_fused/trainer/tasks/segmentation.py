"""Segmentation with DeepLabv3: the recipe of its authors."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from mnv2_fused import networks, weights
from mnv2_fused.data import datasets, segmentation
from mnv2_fused.evaluation import SegmentationScores
from mnv2_fused.tools import measure
from mnv2_fused.trainer.config import Config, TrainError
from mnv2_fused.trainer.tasks.base import State, Task, contradiction
from mnv2_fused.weights import Convention

_NETWORK = ("width", "round_nearest", "output_stride", "aspp")


class Segmentation(Task):
    """Photographs with masks."""

    name = "segmentation"
    title = "DeepLabv3 MobileNetV2"
    headline = {"mIOU": "mIOU", "pixel_accuracy": "pixel accuracy"}
    command = "segment"

    def defaults(self, config: Config) -> dict[str, Any]:
        batch = 16 if config.batch is None else config.batch
        return {
            "epochs": 50,
            "batch": batch,
            "lr": 0.007 * batch / 16,
            "warmup": 0.0,
            "label_smoothing": 0.0,
            "width": 1.0,
            "round_nearest": 8,
            "output_stride": 16,
            "aspp": False,
            "resolution": networks.SEGMENTATION_SIZE,
            # Statistics of fewer than 16 crops are worse than those of the weights.
            "freeze_bn": config.weights is not None and batch < 16,
            "augment": True,
            "workers": min(4, measure.usable_cpus()),
        }

    def convention(self, config: Config) -> Convention:
        return networks.segmentation_convention(config.convention, config.resolution)

    def load(self, name: str, config: Config, convention: Convention) -> datasets.Data:
        return segmentation.load(name, convention, config.augment, config.seed)

    def check(self, data: datasets.Data, name: str, config: Config) -> None:
        if len(data.train) < 2:
            raise TrainError(f"{name}: expected at least two photographs to train on, which batch norm needs, got one")

    def build(self, config: Config, classes: int) -> nn.Module:
        return networks.deeplab(
            num_classes=classes,
            width_mult=config.width,
            round_nearest=config.round_nearest,
            output_stride=config.output_stride,
            aspp=config.aspp,
            tf=weights.CONVENTIONS[config.convention].tf_padding,
            fused=config.fused,
            recompute=config.recompute,
        )

    def read_start(self, config: Config) -> tuple[State, Config]:
        start, facts = networks.read_start(config.weights, config.convention, "features.17.")
        found = networks.deeplab_arguments(start, config.width, config.round_nearest, facts)
        for field in _NETWORK:
            given = getattr(config, field)
            if field in found and given not in (None, found[field]):
                raise contradiction(f"--{field.replace('_', '-')}", given, found[field])
        convention = config.convention or facts.convention or "torchvision"
        resolution = config.resolution or facts.resolution
        return start, dataclasses.replace(config, **found, convention=convention, resolution=resolution)

    def merge(self, start: State, own: State) -> tuple[State, set[str]]:
        return networks.merge(start, own, head="classifier.", predictors="classifier.logits.")

    def collate(self, items: list[tuple]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        x = torch.stack([image for image, _ in items])
        return x.contiguous(memory_format=torch.channels_last), [mask for _, mask in items]

    def loss(
        self, model: nn.Module, x: torch.Tensor, target: list[torch.Tensor], config: Config
    ) -> tuple[torch.Tensor, int]:
        mask = torch.stack(target)
        # A crop may hold 255 alone: the mean over no pixels would be NaN.
        total = nn.functional.cross_entropy(
            model(x)["out"],
            mask,
            ignore_index=segmentation.IGNORED,
            label_smoothing=config.label_smoothing,
            reduction="sum",
        )
        return total / (mask != segmentation.IGNORED).sum().clamp(min=1), 0

    def validate(
        self, model: nn.Module, data: segmentation.SegmentationSet, batches: Iterable[tuple[torch.Tensor, list]]
    ) -> dict[str, float | None]:
        scores = SegmentationScores(data.classes)
        for x, masks in batches:
            for image, mask in zip(x, masks, strict=True):
                scores.add(model.predict_mask(image[None], mask.shape)[0], mask)
        return scores.figures()[0]

    def decay(self, share: float) -> float:
        return (1 - min(1.0, share)) ** 0.9

    def facts(self, config: Config, classes: int) -> dict[str, object]:
        network = {field: getattr(config, field) for field in ("round_nearest", "output_stride", "aspp")}
        return {
            **super().facts(config, classes),
            "task": self.name,
            "num_classes": classes,
            "width_mult": config.width,
            **network,
        }
