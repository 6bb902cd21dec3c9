"""Boxes without torchvision: checks of a detector's input, and non-maximum suppression."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["check_images", "check_targets", "non_maximum_suppression"]

_CHUNK = 128  # candidates that are compared with each other at once
_FIRST = 2048  # candidates that are sorted at first; often no more are needed
_BEYOND = 0.5  # pixels that a box may reach beyond its image: annotations are rounded


def check_images(images: Any) -> None:
    """Raises TypeError or ValueError unless `images` is a list of (3, h, w) floating-point tensors of one dtype and
    device.
    """
    if not isinstance(images, (list, tuple)):
        raise TypeError(f"images must be a list of (3, h, w) tensors, got {_kind(images)}")
    if not images:
        raise ValueError("images must hold at least one image, got an empty list")
    for i, image in enumerate(images):
        name = f"images[{i}]"
        if not isinstance(image, Tensor):
            raise TypeError(f"{name} must be a tensor, got {_kind(image)}")
        if image.dim() != 3 or image.shape[0] != 3 or image.numel() == 0:
            raise ValueError(f"{name} must have shape (3, h, w) with h, w > 0, got {tuple(image.shape)}")
        if not image.is_floating_point():
            raise TypeError(f"{name} must hold floating-point numbers in 0..1, got {image.dtype}")
        if image.dtype != images[0].dtype or image.device != images[0].device:
            raise ValueError(
                f"{name} must have the dtype and device of images[0], {images[0].dtype} on {images[0].device}; "
                f"got {image.dtype} on {image.device}"
            )


def check_targets(targets: Any, images: Sequence[Tensor], num_classes: int) -> None:
    """Raises TypeError or ValueError unless `targets` has a dictionary for each of `images` with valid "boxes" (k, 4)
    and "labels" (k). An image may have no boxes.
    """
    if targets is None:
        raise ValueError("targets must be given in training mode, got None; call eval() for detections")
    if not isinstance(targets, (list, tuple)):
        raise TypeError(f"targets must be a list of dictionaries, got {_kind(targets)}")
    if len(targets) != len(images):
        raise ValueError(f"targets must have one entry for each of the {len(images)} images, got {len(targets)}")
    for i, (target, image) in enumerate(zip(targets, images, strict=True)):
        if not isinstance(target, Mapping):
            raise TypeError(f"targets[{i}] must be a dictionary, got {_kind(target)}")
        for key in ("boxes", "labels"):
            value = target.get(key)
            if not isinstance(value, Tensor):
                got = "none" if key not in target else _kind(value)
                raise TypeError(f'targets[{i}]["{key}"] must be a tensor, got {got}')
            if value.device != image.device:
                raise ValueError(f'targets[{i}]["{key}"] must be on {image.device}, got {value.device}')
        _check_boxes(target["boxes"], f'targets[{i}]["boxes"]', *image.shape[-2:])
        _check_labels(target["labels"], f'targets[{i}]["labels"]', len(target["boxes"]), num_classes)


def _check_boxes(boxes: Tensor, name: str, height: int, width: int) -> None:
    if boxes.dim() != 2 or boxes.shape[1] != 4:
        raise ValueError(f"{name} must have shape (boxes, 4), got {tuple(boxes.shape)}")
    if not boxes.is_floating_point():
        raise TypeError(f"{name} must hold floating-point numbers, got {boxes.dtype}")
    limits = boxes.new_tensor([width, height, width, height])
    rules = (
        (boxes.isfinite(), "must be finite"),
        (boxes[:, 2:] > boxes[:, :2], "must be (x1, y1, x2, y2) with x1 < x2 and y1 < y2"),
        (
            (boxes >= -_BEYOND) & (boxes <= limits + _BEYOND),
            f"must lie in the image, which is {width} pixels wide and {height} high",
        ),
    )
    for valid, rule in rules:
        wrong = (~valid.all(dim=1)).nonzero()
        if len(wrong):
            row = int(wrong[0])
            raise ValueError(f"{name} {rule}, got {boxes[row].tolist()} in row {row}")


def _check_labels(labels: Tensor, name: str, boxes: int, num_classes: int) -> None:
    if labels.dtype != torch.int64:
        raise TypeError(f"{name} must be of torch.int64, got {labels.dtype}")
    if labels.shape != (boxes,):
        raise ValueError(f"{name} must have shape ({boxes},), a label for each box; got {tuple(labels.shape)}")
    wrong = ((labels < 1) | (labels >= num_classes)).nonzero()
    if len(wrong):
        row = int(wrong[0])
        raise ValueError(f"{name} must be from 1 to {num_classes - 1}, got {int(labels[row])} in row {row}")


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return "None" if value is None else f"a {type(value).__name__}"


def non_maximum_suppression(boxes: Tensor, scores: Tensor, labels: Tensor, iou_threshold: float, most: int) -> Tensor:
    """Indices of the at most `most` boxes that remain, best score first.

    A box is dropped if a box of the same label with a higher score overlaps it by more than `iou_threshold`.
    Candidates are taken in chunks, in the order of their scores, until `most` boxes remain.

    Args:
        boxes: (k, 4), as x1, y1, x2, y2.
        scores: (k).
        labels: (k), integers.
        iou_threshold: intersection over union.
        most: number of boxes.
    """
    kept = labels.new_empty(0, dtype=torch.int64)
    for chunk in _by_score(scores):
        chunk = chunk[~_overlaps(kept, chunk, boxes, labels, iou_threshold).any(dim=0)]
        rows = _overlaps(chunk, chunk, boxes, labels, iou_threshold).triu(1).cpu().numpy()
        dropped, remain = rows[:0].any(axis=0), []
        for i, row in enumerate(rows):
            if not dropped[i]:
                remain.append(i)
                dropped |= row
        kept = torch.cat([kept, chunk[torch.tensor(remain, dtype=torch.int64, device=chunk.device)]])
        if len(kept) >= most:
            break
    return kept[:most]


def _by_score(scores: Tensor) -> Iterator[Tensor]:
    """Indices in the order of falling scores, in chunks. Most are sorted only when they are asked for."""
    if len(scores) == 0:
        return
    first = scores >= scores.topk(min(_FIRST, len(scores)), sorted=False).values.min()
    for part in (first, ~first):
        indices = part.nonzero()[:, 0]
        yield from indices[scores[indices].argsort(descending=True, stable=True)].split(_CHUNK)


def _overlaps(first: Tensor, second: Tensor, boxes: Tensor, labels: Tensor, threshold: float) -> Tensor:
    """(first, second), bool: whether two boxes of one label overlap by more than `threshold`."""
    a, b = boxes[first][:, None], boxes[second]
    shared = (torch.minimum(a[..., 2:], b[:, 2:]) - torch.maximum(a[..., :2], b[:, :2])).clamp(min=0).prod(-1)
    areas = [(box[..., 2:] - box[..., :2]).prod(-1) for box in (a, b)]
    return (shared / (areas[0] + areas[1] - shared) > threshold) & (labels[first][:, None] == labels[second])
