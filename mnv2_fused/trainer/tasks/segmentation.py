"""Segmentation with DeepLabv3: the recipe of its authors."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import nn

from mnv2_fused import weights
from mnv2_fused.builders import deeplabv3_mobilenet_v2
from mnv2_fused.data import datasets, segmentation
from mnv2_fused.evaluation import SegmentationScores, score_masks
from mnv2_fused.tools import measure
from mnv2_fused.trainer.config import Config
from mnv2_fused.trainer.processes import Processes
from mnv2_fused.trainer.tasks.base import State, Task, contradiction, convention_of, read_backbone, with_new_layers
from mnv2_fused.weights import Convention
from mnv2_fused.weights import segmentation as segmentation_files


class Segmentation(Task):
    """Photographs with masks."""

    name = "segmentation"
    title = "DeepLabv3 MobileNetV2"
    headline: ClassVar = {"mIOU": "mIOU", "pixel_accuracy": "pixel accuracy"}
    # The norm of `classifier.project` trains plain, and PyTorch's synchronised one has no kernel for CPUs.
    without = ("sync_bn", "project_activation", "shortcut")
    packages = ("torchmetrics.classification",)
    command = "segment"

    def defaults(self, config: Config) -> dict[str, Any]:
        batch = 16 if config.batch is None else config.batch
        part = batch // (Processes().size * (config.accumulate or 1))
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
            "resolution": segmentation_files.RESOLUTION,
            # Statistics of fewer than 16 crops are worse than those of the weights.
            "freeze_bn": config.weights is not None and part < 16,
            "augment": True,
            "workers": min(4, measure.usable_cpus()),
        }

    def convention(self, config: Config) -> Convention:
        return segmentation_files.convention(weights.pads_as_tensorflow(config.convention), config.resolution)

    def load(self, name: str, config: Config, convention: Convention) -> datasets.Data:
        return segmentation.load(name, convention, config.augment, config.seed)

    def build(self, config: Config, classes: int, state: State | None) -> nn.Module:
        backbone = weights.below(state or {}, "backbone.")
        return deeplabv3_mobilenet_v2(
            num_classes=classes,
            width_mult=config.width,
            round_nearest=config.round_nearest,
            output_stride=config.output_stride,
            aspp=config.aspp,
            tf=weights.pads_as_tensorflow(config.convention),
            eps=segmentation_files.eps_of_identities(backbone),
            fused=config.fused,
            recompute=config.recompute,
        )

    def read_start(self, config: Config) -> tuple[State, Config]:
        backbone = read_backbone(config)
        if backbone is None:
            start, arguments, resolution = segmentation_files.load(
                config.weights, width_mult=config.width, round_nearest=config.round_nearest
            )
            tf = arguments["tf"]
            found = {"width": arguments["width_mult"], "round_nearest": arguments["round_nearest"]}
            found |= {"aspp": arguments["aspp"], "output_stride": config.output_stride or arguments["output_stride"]}
        else:
            (start, tf), resolution = backbone, None
            features = weights.below(start, "backbone.")
            width, round_nearest = weights.backbone_width(features, config.width, config.round_nearest)
            found = {"width": width, "round_nearest": round_nearest}
        if "aspp" in found and config.aspp not in (None, found["aspp"]):
            raise contradiction("--aspp", config.aspp, found["aspp"])
        return start, dataclasses.replace(
            config, **found, convention=convention_of(config, tf), resolution=config.resolution or resolution
        )

    def merge(self, start: State, own: State) -> tuple[State, set[str]]:
        return with_new_layers(start, own, "classifier.logits.")

    def collate(self, items: list[tuple]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        x = torch.stack([image for image, _ in items])
        return x.contiguous(memory_format=torch.channels_last), [mask for _, mask in items]

    def loss(
        self, model: nn.Module, x: torch.Tensor, target: list[torch.Tensor], config: Config
    ) -> tuple[torch.Tensor, float, int]:
        mask = torch.stack(target)
        # A crop may hold 255 alone: the mean over no pixels would be NaN.
        total = nn.functional.cross_entropy(
            model(x)["out"],
            mask,
            ignore_index=segmentation.IGNORED,
            label_smoothing=config.label_smoothing,
            reduction="sum",
        )
        counted = (mask != segmentation.IGNORED).sum().clamp(min=1)
        # In images: the loss of a part is multiplied by its weight, and float16 has not the range for pixels.
        return total / counted, counted.item() / mask[0].numel(), 0

    def score(
        self, model: nn.Module, data: segmentation.SegmentationSet, batches: Iterable[tuple[torch.Tensor, list]]
    ) -> torch.Tensor:
        return score_masks(model, data, batches).counts

    def figures(self, scores: list[torch.Tensor], data: segmentation.SegmentationSet) -> dict[str, float | None]:
        total = SegmentationScores(data.classes)
        for counts in scores:
            total.add_counts(counts)
        return total.figures()[0]

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
