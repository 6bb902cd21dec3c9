"""`evaluate`: how good a network for detection or segmentation is on photographs with ground truth."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, TimeRemainingColumn

from mnv2_fused import evaluation
from mnv2_fused.cli import detect, options, output, segment
from mnv2_fused.cli.options import InputError
from mnv2_fused.data import detection, images, segmentation
from mnv2_fused.data.datasets import Pictures
from mnv2_fused.tools import measure
from mnv2_fused.trainer.tasks import TASKS


def add(commands: argparse._SubParsersAction) -> None:
    """Declares the command and its options."""
    parser = commands.add_parser(
        "evaluate",
        help="average precision or mIOU on photographs with ground truth",
        description="Prints pycocotools' twelve figures of SSDLite on a folder in COCO's format, or the mean "
        "intersection over union of DeepLabv3 on a folder in VOC's. Of train and val it takes val.",
    )
    parser.set_defaults(run=run)
    parser.add_argument("--task", choices=("detection", "segmentation"), required=True)
    parser.add_argument(
        "--data",
        metavar="FOLDER",
        required=True,
        help="for detection instances.json and images/, or annotations/instances_val*.json; for segmentation "
        "SegmentationClass/, JPEGImages/ or images/, and val.txt or ImageSets/Segmentation/val.txt",
    )
    options.add_network(parser, "SSDLite or DeepLabv3")
    options.add_output_stride(parser, "16")
    options.add_threads(parser)
    options.add_json(parser)


def run(arguments: argparse.Namespace) -> None:
    """Prints the figures, with a progress bar on terminals. An image that cannot be read ends it."""
    output.check_json(arguments.json)
    if arguments.task == "detection" and arguments.output_stride is not None:
        raise InputError("--output-stride is no option of --task detection")
    console = output.console(arguments)
    with measure.threads(arguments.threads):
        results = (_detection if arguments.task == "detection" else _segmentation)(arguments, console)
    settings = {
        name: getattr(arguments, name)
        for name in ("task", "data", "weights", "tf", "resolution", "output_stride", "fused", "threads")
    }
    output.write_json(arguments.json, {**measure.environment(), "settings": settings, **results})


def _detection(arguments: argparse.Namespace, console: Console) -> dict:
    model = detect.load(arguments)
    data = detection.load(arguments.data, model.transform.fixed_size, augment=False).held_out
    labels = _category_ids(data, model.num_classes, arguments)
    scores = evaluation.score_detections(model, data, _batches("detection", data, console), labels)
    figures, lines = scores.figures()
    output.say(console, lines)
    return {"images": len(data), "figures": figures}


def _category_ids(data: detection.DetectionSet, classes: int, arguments: argparse.Namespace) -> dict[int, int]:
    """The category id of each label: labels count the categories, or with more classes they are their ids."""
    if classes == len(data.categories) + 1:
        return data.label_ids
    ids = [identity for identity, _ in data.categories]
    if classes > len(data.categories) + 1 and 0 < min(ids) <= max(ids) < classes:
        return {identity: identity for identity in ids}
    raise InputError(
        f"{arguments.weights} has {classes} classes with the background, but {arguments.data} has {len(ids)} categories"
    )


def _segmentation(arguments: argparse.Namespace, console: Console) -> dict:
    model, convention, classes = segment.load(arguments)
    loaded = segmentation.load(arguments.data, convention, augment=False)
    data = loaded.held_out
    if classes != data.classes:
        raise InputError(f"{arguments.weights} has {classes} classes, but {arguments.data} has {data.classes}")
    figures, iou = evaluation.score_masks(model, data, _batches("segmentation", data, console)).figures()
    table = output.table("IoU", "class", "<label")
    for index, (share, label) in enumerate(zip(iou, loaded.labels, strict=True)):
        if share is not None:
            table.add_row(f"{share:.4f}", str(index), label)
    console.print(table)
    present = sum(share is not None for share in iou)
    output.say(
        console,
        f"mIOU {figures['mIOU']:.4f} over the {present} classes in the masks, pixel accuracy "
        f"{figures['pixel_accuracy']:.4f}, {len(data)} images",
    )
    return {"images": len(data), "figures": figures, "iou": dict(zip(loaded.labels, iou, strict=True))}


def _batches(task: str, data: Pictures, console: Console) -> Iterator[tuple]:
    """The images of `data` one by one, as the task's batches. Raises images.ImageError."""
    columns = (BarColumn(), "{task.completed}/{task.total} images", TimeRemainingColumn())
    with output.progress(console, *columns) as bar:
        progress = bar.add_task("", total=len(data))
        for index in range(len(data)):
            item = data[index]
            if isinstance(item, images.ImageError):
                raise item
            yield TASKS[task].collate([item])
            bar.advance(progress)
