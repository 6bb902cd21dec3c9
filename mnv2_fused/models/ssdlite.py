"""SSDLite on MobileNetV2, in torchvision's detection convention. Importing this module imports torchvision."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mnv2_fused import extras
from mnv2_fused._core.decide import Unit
from mnv2_fused._core.run import run
from mnv2_fused.models.boxes import check_images, check_targets, non_maximum_suppression
from mnv2_fused.models.fused import NETWORK, Entry, FusedModel, keeps_forward, unit_of
from mnv2_fused.models.ssdlite_parts import ANCHORS, Backbone, Head

_ssd = extras.use("torchvision.models.detection.ssd", "detection")
_anchor_utils = extras.use("torchvision.models.detection.anchor_utils", "detection")
_box_ops = extras.use("torchvision.ops.boxes", "detection")
_extension = extras.use("torchvision.extension", "detection")

__all__ = ["AnchorGenerator", "SSDLite"]

STAGES = 6  # of the backbone, for `trainable_backbone_layers`

_COMMON = {
    "image_mean": (0.5, 0.5, 0.5),
    "image_std": (0.5, 0.5, 0.5),
    "iou_thresh": 0.5,
    "positive_fraction": 0.25,
}
_TORCHVISION = _COMMON | {
    "size": 320,
    "score_thresh": 0.001,
    "nms_thresh": 0.55,
    "detections_per_img": 300,
    "topk_candidates": 300,
}
_TENSORFLOW = _COMMON | {
    "size": 300,
    "score_thresh": 1e-8,
    "nms_thresh": 0.6,
    "detections_per_img": 100,
    "topk_candidates": None,
}


class AnchorGenerator(_anchor_utils.DefaultBoxGenerator):
    """The anchors of TensorFlow's object detection API for SSD: 3 a cell in the first map, 6 in the others."""

    def __init__(self) -> None:
        super().__init__([[2, 3]] * len(ANCHORS), min_ratio=0.2, max_ratio=0.95, clip=False)

    def _generate_wh_pairs(
        self, num_outputs: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> list[Tensor]:
        pairs = []
        for k in range(num_outputs):
            scale, following = self.scales[k], self.scales[k + 1]
            shapes = [(scale, ratio) for ratio in (1.0, 2.0, 0.5, 3.0, 0.3333)] + [(math.sqrt(scale * following), 1.0)]
            if k == 0:
                shapes = [(0.1, 1.0), (scale, 2.0), (scale, 0.5)]
            rows = [(size * math.sqrt(ratio), size / math.sqrt(ratio)) for size, ratio in shapes]
            pairs.append(torch.tensor(rows, dtype=dtype, device=device))
        return pairs

    def num_anchors_per_location(self) -> list[int]:
        """Anchors of a cell, for each map."""
        return list(ANCHORS)

    def boxes(self, height: int, width: int, device: torch.device | str = "cpu") -> Tensor:
        """All anchors of an input of `height` x `width` pixels: (anchors, 4), float32, x1, y1, x2, y2 in pixels."""
        grids = [[-(-height // stride), -(-width // stride)] for stride in (16 << k for k in range(len(ANCHORS)))]
        relative = self._grid_default_boxes(grids, [height, width])
        centres, halves = relative[:, :2], 0.5 * relative[:, 2:]
        pixels = torch.cat([centres - halves, centres + halves], dim=1) * torch.tensor([width, height] * 2)
        return pixels.to(device)


class SSDLite(FusedModel, _ssd.SSD):
    """SSDLite on MobileNetV2: torchvision's ``SSD`` with a backbone, anchors and heads of its own.

    In training ``model(images, targets)`` returns the losses ``{"bbox_regression", "classification"}``, scalars. In
    eval mode ``model(images)`` returns for each image ``{"boxes", "scores", "labels"}``, best score first.

    Args:
        num_classes: classes, with the background as class 0.
        width_mult: multiplies the channel counts of the backbone and of the extra layers.
        tf: follow TensorFlow's object detection API: "SAME" padding, input of 300 x 300, sigmoid scores, binary cross
            entropy, and its thresholds. Otherwise torchvision's SSDLite: padding 1, 320 x 320, softmax.
        fused: False always runs plain PyTorch. Assigning to ``model.fused`` or ``model.recompute`` later changes the
            whole network.
        trainable_backbone_layers: stages of the backbone that train, from the last; 0 to 6.
        norm_layer: makes a norm from a channel count; ``nn.BatchNorm2d`` with an eps of 1e-3 by default.
        **ssd_arguments: ``size`` (an int, or width and height), ``image_mean``, ``image_std``, ``score_thresh``,
            ``nms_thresh``, ``detections_per_img``, ``topk_candidates`` (of each class, before suppression;
            None: all), ``iou_thresh`` and ``positive_fraction``, as in torchvision.

    Raises:
        ValueError, TypeError: an argument of another form or value.
        mnv2_fused.extras.MissingExtraError: torchvision is missing.
    """

    def __init__(
        self,
        num_classes: int = 91,
        width_mult: float = 1.0,
        *,
        tf: bool = False,
        fused: bool = True,
        trainable_backbone_layers: int = STAGES,
        norm_layer: Callable[..., nn.Module] | None = None,
        **ssd_arguments: Any,
    ) -> None:
        if not isinstance(num_classes, int) or num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, the background included; got {num_classes!r}")
        if trainable_backbone_layers not in range(STAGES + 1):
            raise ValueError(f"trainable_backbone_layers must be from 0 to {STAGES}, got {trainable_backbone_layers!r}")
        if norm_layer is None:
            norm_layer = partial(nn.BatchNorm2d, eps=1e-3, momentum=3e-4 if tf else 0.03)
        arguments = _arguments(_TENSORFLOW if tf else _TORCHVISION, ssd_arguments)
        backbone = Backbone(width_mult, norm_layer, tf_padding=tf)
        backbone.freeze(trainable_backbone_layers)
        head = Head(backbone.out_channels, num_classes, norm_layer)
        super().__init__(backbone, AnchorGenerator(), num_classes=num_classes, head=head, **arguments)
        self.num_classes = num_classes
        self.tf = tf
        self.fused = fused

    def forward(
        self, images: Sequence[Tensor], targets: Sequence[dict[str, Tensor]] | None = None
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Losses in training mode, detections in eval mode.

        Args:
            images: (3, h, w) each, floating-point, 0..1; sizes may differ.
            targets: for each image ``"boxes"`` (k, 4), floating-point, x1, y1, x2, y2 in its pixels, and ``"labels"``
                (k), int64, from 1. k may be 0: all anchors are background then. Ignored in eval mode.

        Returns:
            The two losses; or for each image ``"boxes"`` (k, 4) in its pixels, ``"scores"`` (k), ``"labels"`` (k).

        Raises:
            TypeError, ValueError: images or targets of another form; the message names the entry.
        """
        check_images(images)
        if self.training:
            check_targets(targets, images, self.num_classes)
        sizes = [tuple(image.shape[-2:]) for image in images]
        batch, targets = self.transform(list(images), targets if self.training else None)
        outputs = self.head_outputs(batch.tensors)
        # Losses and boxes need more digits than the 16-bit dtypes have.
        wide = torch.promote_types(outputs["cls_logits"].dtype, torch.float32)
        outputs = {name: output.to(wide) for name, output in outputs.items()}
        anchors = self.anchor_generator.boxes(*batch.tensors.shape[-2:], batch.tensors.device).to(wide)
        all_anchors = [anchors] * len(images)
        if self.training:
            targets = [{**target, "boxes": target["boxes"].to(wide)} for target in targets]
            matches = [self._match(target["boxes"], anchors) for target in targets]
            return self.compute_loss(targets, outputs, all_anchors, matches)
        detections = self.postprocess_detections(outputs, all_anchors, batch.image_sizes)
        return self.transform.postprocess(detections, batch.image_sizes, sizes)

    def head_outputs(self, x: Tensor) -> dict[str, Tensor]:
        """The network alone.

        Args:
            x: (n, 3, h, w), resized and normalised.

        Returns:
            ``"bbox_regression"`` (n, anchors, 4), codes of x, y, w, h; ``"cls_logits"`` (n, anchors, num_classes).
        """
        outputs = run(NETWORK, self, x, inside=True)
        if outputs is None:
            if self.fused:  # here once: each unit would convert its output back to the input's format
                x = x.contiguous(memory_format=torch.channels_last)
            return self.head(list(self.backbone(x).values()))
        return self.head.join(outputs[: len(ANCHORS)], outputs[len(ANCHORS) :])

    def _wholes(self) -> list[tuple[Unit, Any]]:
        return [(NETWORK, self)]

    def _entries(self) -> list[Entry] | str:
        if not keeps_forward(self.backbone, Backbone) or not keeps_forward(self.head, Head):
            return "backbone or head is of another class"
        found = self.backbone.entries()
        predictors = self.head.predictors()
        if isinstance(found, str) or isinstance(predictors, str):
            return found if isinstance(found, str) else predictors
        entries, maps = found
        for i, predictor in enumerate(predictors):
            entries.append(Entry(unit_of(predictor), predictor, maps[i % len(maps)], tap=True))
        return entries

    def _network_key(self) -> tuple[Any, ...]:
        return self.backbone, self.head, self.training

    def _match(self, boxes: Tensor, anchors: Tensor) -> Tensor:
        """(anchors): the row of `boxes` that each anchor is to find, or a negative number for the background."""
        if len(boxes) == 0:
            return torch.full((len(anchors),), -1, dtype=torch.int64, device=anchors.device)
        return self.proposal_matcher(_box_ops.box_iou(boxes, anchors))

    def compute_loss(
        self,
        targets: list[dict[str, Tensor]],
        head_outputs: dict[str, Tensor],
        anchors: list[Tensor],
        matched_idxs: list[Tensor],
    ) -> dict[str, Tensor]:
        """Torchvision's multibox loss, with two differences.

        With `tf` the classification loss is binary cross entropy, summed over all classes and the background. An image
        without boxes counts as many of its hardest anchors as an image with one positive anchor does.

        Both losses are sums divided by the number of positive anchors, which `positive_anchors` holds afterwards.
        """
        logits, box_loss, labels = head_outputs["cls_logits"], [], []
        for target, codes, boxes, matched in zip(
            targets, head_outputs["bbox_regression"], anchors, matched_idxs, strict=True
        ):
            positive = (matched >= 0).nonzero()[:, 0]
            wanted = self.box_coder.encode_single(target["boxes"][matched[positive]], boxes[positive])
            box_loss.append(F.smooth_l1_loss(codes[positive], wanted, reduction="sum"))
            label = torch.zeros_like(matched)
            label[positive] = target["labels"][matched[positive]]
            labels.append(label)
        label = torch.stack(labels)
        if self.tf:
            one_hot = F.one_hot(label, logits.shape[-1]).to(logits.dtype)
            class_loss = F.binary_cross_entropy_with_logits(logits, one_hot, reduction="none").sum(-1)
        else:
            class_loss = F.cross_entropy(logits.flatten(0, 1), label.flatten(), reduction="none").view_as(label)

        positive = label > 0
        negatives = self.neg_to_pos_ratio * positive.sum(1, keepdim=True).clamp(min=1)
        hardness = class_loss.detach().masked_fill(positive, -math.inf)
        rank = hardness.argsort(dim=1, descending=True).argsort(dim=1)
        counts = positive | (rank < negatives)
        total = self.positive_anchors = positive.sum().clamp(min=1)
        return {
            "bbox_regression": torch.stack(box_loss).sum() / total,
            "classification": class_loss[counts].sum() / total,
        }

    def postprocess_detections(
        self, head_outputs: dict[str, Tensor], image_anchors: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> list[dict[str, Tensor]]:
        """Boxes, scores and labels of each image, in pixels of the resized image."""
        logits = head_outputs["cls_logits"]
        all_scores = (logits.sigmoid() if self.tf else logits.softmax(-1))[..., 1:]
        rows = zip(head_outputs["bbox_regression"], all_scores, image_anchors, image_shapes, strict=True)
        return [
            self._detect(self.box_coder.decode_single(codes, anchors), scores, shape)
            for codes, scores, anchors, shape in rows
        ]

    def _detect(self, boxes: Tensor, scores: Tensor, shape: tuple[int, int]) -> dict[str, Tensor]:
        """The detections of one image, from a box (anchors, 4) and scores (anchors, classes) for each anchor."""
        if not self.tf:
            boxes = _box_ops.clip_boxes_to_image(boxes, shape)
        above = scores > self.score_thresh
        if self.topk_candidates is None or (above.sum(0) <= self.topk_candidates).all():
            row, label = above.nonzero(as_tuple=True)
        else:
            best, rows = scores.t().topk(min(self.topk_candidates, len(scores)), dim=1, sorted=False)
            label, column = (best > self.score_thresh).nonzero(as_tuple=True)
            row = rows[label, column]
        score = scores[row, label]
        box = boxes[row]
        kept = _suppress(box, score, label, self.nms_thresh, self.detections_per_img)
        box, score, label = box[kept], score[kept], label[kept] + 1
        if self.tf:  # clips after the suppression
            box = _box_ops.clip_boxes_to_image(box, shape)
            kept = (box[:, 2:] > box[:, :2]).all(dim=1)
            box, score, label = box[kept], score[kept], label[kept]
        return {"boxes": box, "scores": score, "labels": label}


def _suppress(boxes: Tensor, scores: Tensor, labels: Tensor, iou_threshold: float, most: int) -> Tensor:
    """Torchvision's operator, or this package's if torchvision's library did not load beside this torch."""
    if _extension._has_ops():
        return _box_ops.batched_nms(boxes, scores, labels, iou_threshold)[:most]
    return non_maximum_suppression(boxes, scores, labels, iou_threshold, most)


def _arguments(defaults: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """The arguments of torchvision's SSD. SSD itself ignores names that it does not know."""
    unknown = [name for name in given if name not in defaults]
    if unknown:
        raise TypeError(f"unknown argument {unknown[0]!r}: SSDLite takes {', '.join(sorted(defaults))}")
    arguments = defaults | given
    size = arguments["size"]
    sides = (size, size) if isinstance(size, int) else tuple(size) if isinstance(size, Sequence) else ()
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise ValueError(f"size must be a positive integer, or a width and a height; got {size!r}")
    return arguments | {"size": sides}
