"""`detect`: objects in photographs, with SSDLite."""

from __future__ import annotations

import argparse

import torch

from mnv2_fused.builders import ssdlite320_mobilenet_v2
from mnv2_fused.cli import options, output, pictures
from mnv2_fused.cli.options import InputError
from mnv2_fused.data import detection
from mnv2_fused.freezing import freeze
from mnv2_fused.tools import measure


def add(commands: argparse._SubParsersAction) -> None:
    """Declares the command and its options."""
    parser = commands.add_parser(
        "detect",
        help="objects in photographs",
        description="Prints the objects in each photograph that SSDLite finds, with their boxes in pixels: left, top, "
        "right, bottom.",
    )
    parser.set_defaults(run=run)
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="photograph, of any kind that Pillow reads")
    options.add_network(parser, "SSDLite")
    parser.add_argument("--score", type=options.from_zero(1), default=0.5, help="the lowest to keep (default: 0.5)")
    parser.add_argument(
        "--labels", metavar="FILE", help="text file with a label a line, by class; with or without the background"
    )
    parser.add_argument(
        "--output", metavar="FILE|DIR", help="picture with boxes to write; a directory for several images"
    )
    options.add_threads(parser)
    options.add_json(parser)


def load(arguments: argparse.Namespace) -> torch.nn.Module:
    """The network that the options ask for, in eval mode. Raises weights.WeightsError, extras.MissingExtraError."""
    size = {} if arguments.resolution is None else {"size": arguments.resolution}
    return ssdlite320_mobilenet_v2(arguments.weights, tf=arguments.tf, fused=arguments.fused, **size).eval()


def run(arguments: argparse.Namespace) -> None:
    """Prints a table for each image. An image that cannot be read is reported at the end."""
    output.check_json(arguments.json)
    written = pictures.targets(arguments.output, arguments.images)
    model = freeze(load(arguments))
    labels = options.read_labels(arguments.labels, model.num_classes, background=True) if arguments.labels else None
    console = output.console(arguments)
    answers, failures = [], []
    with measure.threads(arguments.threads), torch.inference_mode():
        for path, image in options.readable(arguments.images, failures):
            target = written[path]
            x, scale = detection.fit(image, model.transform.fixed_size)
            (found,) = model([x])
            found = {name: value[found["scores"] >= arguments.score] for name, value in found.items()}
            found["boxes"] = found["boxes"] * scale
            rows = _rows(found, labels)
            answers.append({"image": path, "width": image.width, "height": image.height, "detections": rows})
            output.say(console, path)
            console.print(_table(rows))
            if target is not None:
                captions = [f"{row['label'] or row['index']} {row['score']:.2f}" for row in rows]
                pictures.save(pictures.boxed(image, found["boxes"], found["labels"], captions), target)
                output.say(console, f"written: {target}")
    settings = {
        "weights": str(arguments.weights),
        "tf": model.tf,
        "classes": model.num_classes,
        "resolution": list(model.transform.fixed_size),
        "score": arguments.score,
        "fused": arguments.fused,
        "threads": arguments.threads,
    }
    output.write_json(arguments.json, {**measure.environment(), "settings": settings, "answers": answers})
    if failures:
        raise InputError("; ".join(map(str, failures)))


def _rows(found: dict[str, torch.Tensor], labels: list[str] | None) -> list[dict]:
    columns = (found[name].tolist() for name in ("labels", "scores", "boxes"))
    return [
        {"index": index, "label": labels[index] if labels else None, "score": score, "box": box}
        for index, score, box in zip(*columns, strict=True)
    ]


def _table(rows: list[dict]):
    table = output.table("score", "class", "<label", "left", "top", "right", "bottom")
    for row in rows:
        label = "(no --labels)" if row["label"] is None else row["label"]
        table.add_row(f"{row['score']:.4f}", str(row["index"]), label, *(f"{edge:.1f}" for edge in row["box"]))
    return table
