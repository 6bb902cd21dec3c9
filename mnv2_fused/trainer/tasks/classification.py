"""Classification with MobileNetV2."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import nn

from mnv2_fused import weights
from mnv2_fused.data import datasets
from mnv2_fused.models.mobilenet_v2 import MobileNetV2
from mnv2_fused.models.units import variant
from mnv2_fused.tools import measure
from mnv2_fused.trainer.config import Config, TrainError
from mnv2_fused.trainer.tasks.base import State, Task
from mnv2_fused.weights import Convention


class Classification(Task):
    """Images with a class each."""

    name = "classification"
    title = "MobileNetV2"
    accuracy = True
    headline: ClassVar = {"validation_loss": "loss", "validation_accuracy": "accuracy"}
    without = ("output_stride", "aspp", "round_nearest", "augment")
    command = "classify"

    def defaults(self, config: Config) -> dict[str, Any]:
        digits = config.data == "digits"
        batch = 64 if config.batch is None else config.batch
        # The paper's for RMSProp; SGD does well with it.
        lr = 0.045 / 96 * batch * (1.0 if config.weights is None else 0.1)
        return {
            "epochs": 30 if digits else 90,
            "batch": batch,
            "lr": lr,
            "warmup": 1.0,
            "label_smoothing": 0.0,
            "width": 0.35 if digits else 1.0,
            "resolution": 48 if digits else 224,
            "freeze_bn": False,
            "sync_bn": False,
            "project_activation": "linear",
            "shortcut": "bottleneck",
            "workers": 0 if digits else min(4, measure.usable_cpus()),
        }

    def load(self, name: str, config: Config, convention: Convention) -> datasets.Data:
        return datasets.load(name, convention, config.seed)

    def check(self, data: datasets.Data, name: str, config: Config) -> None:
        for targets in (data.train.targets, data.held_out.targets):
            if not 0 <= min(targets) <= max(targets) < len(data.labels):
                raise TrainError(
                    f"{name}: expected labels from 0 to {len(data.labels) - 1}, got {min(targets)} to {max(targets)}"
                )

    def build(self, config: Config, classes: int, state: State | None) -> nn.Module:
        return MobileNetV2(
            classes,
            config.width,
            fused=config.fused,
            recompute=config.recompute,
            **weights.CONVENTIONS[config.convention].network(),
            **variant(config.project_activation, config.shortcut),
        )

    def read_start(self, config: Config) -> tuple[State, Config]:
        start, found, block = weights.load(config.weights, config.convention)
        block = {name: value for name, value in block.items() if getattr(config, name) is None}
        width = weights.width_mult(start)
        if config.width not in (None, width):
            raise TrainError(f"--width {config.width:g} contradicts --weights, whose width is {width:g}")
        resolution = config.resolution or found.crop
        return start, dataclasses.replace(config, width=width, convention=found.name, resolution=resolution, **block)

    def merge(self, start: State, own: State) -> tuple[State, set[str]]:
        if weights.num_classes(start) == weights.num_classes(own):
            return start, set()
        new = {"classifier.1.weight", "classifier.1.bias"}
        return {**start, **{key: own[key] for key in new}}, new

    def collate(self, items: list[tuple]) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.stack([image for image, _ in items])
        return x.contiguous(memory_format=torch.channels_last), torch.tensor([target for _, target in items])

    def loss(
        self, model: nn.Module, x: torch.Tensor, target: torch.Tensor, config: Config
    ) -> tuple[torch.Tensor, float, int]:
        logits = model(x)
        loss = nn.functional.cross_entropy(logits, target, label_smoothing=config.label_smoothing)
        return loss, len(target), (logits.argmax(1) == target).sum().item()

    def score(
        self, model: nn.Module, data: datasets.Pictures, batches: Iterable[tuple[torch.Tensor, torch.Tensor]]
    ) -> tuple[float, int]:
        """The sum of the losses, and how many answers are correct."""
        loss, correct = 0.0, 0
        for x, target in batches:
            logits = model(x)
            loss += nn.functional.cross_entropy(logits, target, reduction="sum").item()
            correct += (logits.argmax(1) == target).sum().item()
        return loss, correct

    def figures(self, scores: list[tuple[float, int]], data: datasets.Pictures) -> dict[str, float | None]:
        loss, correct = (sum(values) / len(data) for values in zip(*scores, strict=True))
        return {"validation_loss": loss, "validation_accuracy": correct}

    def facts(self, config: Config, classes: int) -> dict[str, object]:
        block = {name: getattr(config, name) for name in ("project_activation", "shortcut")}
        return {**super().facts(config, classes), **block}
