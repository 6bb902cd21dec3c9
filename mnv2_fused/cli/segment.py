"""`segment`: a class for each pixel of photographs, with DeepLabv3."""

from __future__ import annotations

import argparse
import dataclasses

import torch

from mnv2_fused.builders import deeplabv3_mobilenet_v2
from mnv2_fused.cli import options, output, pictures
from mnv2_fused.cli.options import InputError
from mnv2_fused.data import images
from mnv2_fused.data.segmentation import VOC_LABELS
from mnv2_fused.freezing import freeze
from mnv2_fused.tools import measure
from mnv2_fused.weights import Convention


def add(commands: argparse._SubParsersAction) -> None:
    """Declares the command and its options."""
    parser = commands.add_parser(
        "segment",
        help="a class for each pixel of photographs",
        description="Prints the share of each class in each photograph, and writes masks of the photographs' sizes.",
    )
    parser.set_defaults(run=run)
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="photograph, of any kind that Pillow reads")
    options.add_network(parser, "DeepLabv3")
    options.add_output_stride(parser, "16")
    parser.add_argument(
        "--labels",
        metavar="FILE",
        help="text file with a label a line, by class; with or without the background (default: VOC's for 21 classes)",
    )
    parser.add_argument(
        "--output",
        metavar="FILE|DIR",
        help="mask to write, an image whose palette indices are the classes; a directory for several images",
    )
    parser.add_argument("--overlay", action="store_true", help="write the photograph under the mask's colours instead")
    options.add_threads(parser)
    options.add_json(parser)


def load(arguments: argparse.Namespace) -> tuple[torch.nn.Module, Convention, int]:
    """The network that the options ask for, in eval mode, its preprocessing and its number of classes.

    Raises:
        weights.WeightsError: the weights cannot be read or do not fit.
    """
    model = deeplabv3_mobilenet_v2(
        arguments.weights, tf=arguments.tf, output_stride=arguments.output_stride, fused=arguments.fused
    ).eval()
    convention = model.preprocessing
    if arguments.resolution is not None:
        convention = dataclasses.replace(convention, crop=arguments.resolution)
    return model, convention, model.classifier.logits.out_channels


def run(arguments: argparse.Namespace) -> None:
    """Prints a table for each image. An image that cannot be read is reported at the end."""
    output.check_json(arguments.json)
    if arguments.overlay and arguments.output is None:
        raise InputError("--overlay needs --output")
    written = pictures.targets(arguments.output, arguments.images, "RGB" if arguments.overlay else "P")
    model, convention, classes = load(arguments)
    freeze(model)
    if arguments.output is not None and classes > pictures.MOST_CLASSES:
        raise InputError(
            f"--output: a mask has at most {pictures.MOST_CLASSES} classes, but the weights have {classes}"
        )
    labels = list(VOC_LABELS) if classes == len(VOC_LABELS) else None
    if arguments.labels:
        labels = options.read_labels(arguments.labels, classes, background=True)
    console = output.console(arguments)
    answers, failures = [], []
    with measure.threads(arguments.threads), torch.inference_mode():
        for path, image in options.readable(arguments.images, failures):
            target = written[path]
            x = images.prepare(image, convention)[None]
            mask = model.predict_mask(x, (image.height, image.width))[0]
            rows = _rows(mask, labels)
            answers.append({"image": path, "width": image.width, "height": image.height, "classes": rows})
            table = output.table("pixels", "class", "<label")
            for row in rows:
                label = "(no --labels)" if row["label"] is None else row["label"]
                table.add_row(f"{row['share']:.2%}", str(row["index"]), label)
            output.say(console, path)
            console.print(table)
            if target is not None:
                picture = pictures.coloured(mask)
                pictures.save(pictures.overlaid(image, picture) if arguments.overlay else picture, target)
                output.say(console, f"written: {target}")
    settings = {
        "weights": str(arguments.weights),
        "convention": convention.name,
        "classes": classes,
        "resolution": convention.crop,
        "fused": arguments.fused,
        "threads": arguments.threads,
    }
    output.write_json(arguments.json, {**measure.environment(), "settings": settings, "answers": answers})
    if failures:
        raise InputError("; ".join(map(str, failures)))


def _rows(mask: torch.Tensor, labels: list[str] | None) -> list[dict]:
    """The classes of a mask, the largest first."""
    indices, counts = mask.unique(return_counts=True)
    shares = sorted(zip((counts / mask.numel()).tolist(), indices.tolist(), strict=True), reverse=True)
    return [{"index": index, "label": labels[index] if labels else None, "share": share} for share, index in shares]
