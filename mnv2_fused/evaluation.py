"""How good detections and masks are: COCO's average precision, and mean intersection over union."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from mnv2_fused import extras
from mnv2_fused.data.datasets import DataError
from mnv2_fused.data.detection import DetectionSet
from mnv2_fused.data.segmentation import IGNORED, SegmentationSet
from mnv2_fused.models.deeplab import DeepLabV3

# pycocotools' twelve figures in its order: precision (AP) and recall (AR) averaged over IoU 0.5 to 0.95, or at one IoU;
# for small, medium and large boxes; recall with at most 1, 10 and 100 detections a photograph.
COCO_FIGURES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


class DetectionScores:
    """Collects detections and compares them with the truth by pycocotools' COCOeval.

    Args:
        truth: images, categories and annotations in COCO's format, as `DetectionSet.truth`.
        categories: the category id that each label stands for. Detections with other labels count nowhere.

    Raises:
        extras.MissingExtraError: pycocotools is missing.
    """

    def __init__(self, truth: dict, categories: Mapping[int, int]) -> None:
        self._coco = extras.use("pycocotools.coco", "detection")
        self._cocoeval = extras.use("pycocotools.cocoeval", "detection")
        self._truth, self._categories = truth, categories
        self._found: list[dict] = []
        self._images: list[int] = []

    def add(self, image_id: int, detections: Mapping[str, torch.Tensor]) -> None:
        """Adds the detections of an image: `boxes` (n, 4) as x1, y1, x2, y2 in pixels, `scores` (n), `labels` (n)."""
        self._images.append(image_id)
        rows = zip(*(detections[name].tolist() for name in ("boxes", "scores", "labels")), strict=True)
        for (x1, y1, x2, y2), score, label in rows:
            if label in self._categories:
                w, h = x2 - x1, y2 - y1
                self._found.append(
                    {
                        "image_id": image_id,
                        "category_id": self._categories[label],
                        "bbox": [x1, y1, w, h],
                        "area": w * h,
                        "iscrowd": 0,
                        "score": score,
                    }
                )

    def answers(self) -> tuple[list[int], list[dict]]:
        """The images and the detections that were added, for `add_answers`."""
        return self._images, self._found

    def add_answers(self, answers: tuple[list[int], list[dict]]) -> None:
        """Adds what other scores collected, perhaps in another process."""
        images, found = answers
        self._images += images
        self._found += found

    def figures(self) -> tuple[dict[str, float | None], str]:
        """`COCO_FIGURES` over the images that were added, and pycocotools' own lines.

        A figure is None if no box of its size is in the truth.
        """
        with contextlib.redirect_stdout(io.StringIO()):
            truth = self._index(self._truth["annotations"])
            found = self._index([{**each, "id": i} for i, each in enumerate(self._found, 1)])
            result = self._cocoeval.COCOeval(truth, found, "bbox")
            result.params.imgIds = sorted(self._images)
            result.evaluate()
            result.accumulate()
        with contextlib.redirect_stdout(io.StringIO()) as lines:
            result.summarize()
        values = (float(value) for value in result.stats)
        figures = {name: value if value >= 0 else None for name, value in zip(COCO_FIGURES, values, strict=True)}
        return figures, lines.getvalue().rstrip("\n")

    def _index(self, annotations: list[dict]):
        index = self._coco.COCO()
        index.dataset = {**self._truth, "annotations": annotations}
        index.createIndex()
        return index


class SegmentationScores:
    """Counts pixels by true and by predicted class, with torchmetrics. Pixels of 255 do not count.

    Raises:
        extras.MissingExtraError: torchmetrics is missing.
    """

    def __init__(self, classes: int) -> None:
        metrics = extras.use("torchmetrics.classification", "segmentation")
        self._confusion = metrics.MulticlassConfusionMatrix(classes, ignore_index=IGNORED)

    def add(self, predicted: torch.Tensor, truth: torch.Tensor) -> None:
        """Adds a mask (height, width) and the truth of the same size, both int64."""
        self._confusion.update(predicted, truth)

    @property
    def counts(self) -> torch.Tensor:
        """Pixels by true class and predicted class (classes, classes), int64."""
        return self._confusion.confmat  # `compute` would add up the processes of a group by itself

    def add_counts(self, counts: torch.Tensor) -> None:
        """Adds the `counts` of other scores, perhaps in another process."""
        self._confusion.confmat += counts

    def figures(self) -> tuple[dict[str, float], list[float | None]]:
        """`mIOU`, the mean over the classes in the truth, and `pixel_accuracy`; then each class's IoU.

        A class that is not in the truth has None.

        Raises:
            datasets.DataError: all pixels are ignored.
        """
        counts = self.counts.double()
        if not counts.any():
            raise DataError("expected masks with at least one pixel of a class, got only pixels that are ignored")
        both, true = counts.diagonal(), counts.sum(1)
        union = (true + counts.sum(0) - both).clamp(min=1)
        iou = [share if there else None for share, there in zip((both / union).tolist(), true.tolist(), strict=True)]
        present = [share for share in iou if share is not None]
        figures = {
            "mIOU": sum(present) / max(1, len(present)),
            "pixel_accuracy": (both.sum() / true.sum().clamp(min=1)).item(),
        }
        return figures, iou


@torch.inference_mode()
def score_detections(
    model: nn.Module,
    data: DetectionSet,
    batches: Iterable[tuple[list[torch.Tensor], list[dict]]],
    categories: Mapping[int, int] | None = None,
) -> DetectionScores:
    """The scores of `model`, in eval mode, on batches of images and targets of `data`.

    Args:
        categories: the category id that each label stands for; by default labels count the categories from 1.
    """
    scores = DetectionScores(data.truth, data.label_ids if categories is None else categories)
    for x, targets in batches:
        for found, target in zip(model(x), targets, strict=True):
            scores.add(target["image_id"].item(), {**found, "boxes": found["boxes"] * target["scale"]})
    return scores


@torch.inference_mode()
def score_masks(
    model: DeepLabV3, data: SegmentationSet, batches: Iterable[tuple[torch.Tensor, list[torch.Tensor]]]
) -> SegmentationScores:
    """The scores of `model`, in eval mode, on batches of images (n, 3, h, w) and the n masks of `data`."""
    scores = SegmentationScores(data.classes)
    for x, masks in batches:
        for image, mask in zip(x, masks, strict=True):
            scores.add(model.predict_mask(image[None], tuple(mask.shape))[0], mask)
    return scores
