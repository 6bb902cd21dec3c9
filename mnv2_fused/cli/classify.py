"""`classify`: the most likely classes of photographs."""

from __future__ import annotations

import argparse

import torch

from mnv2_fused import weights
from mnv2_fused.cli import options, output
from mnv2_fused.cli.options import InputError
from mnv2_fused.data import images
from mnv2_fused.freezing import freeze
from mnv2_fused.tools import measure


def add(commands: argparse._SubParsersAction) -> None:
    """Declares the command and its options."""
    parser = commands.add_parser(
        "classify",
        help="the most likely classes of photographs",
        description="Prints the most likely classes of each photograph. Preprocessing and padding follow the weights' "
        "convention.",
    )
    parser.set_defaults(run=run)
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="photograph, of any kind that Pillow reads")
    options.add_weights(parser, required=True)
    parser.add_argument("--labels", metavar="FILE", help="text file with a label a line, by class index")
    parser.add_argument(
        "--top",
        type=options.count(100000),
        metavar="N",
        help="classes to print (default: 5, or all if there are fewer)",
    )
    options.add_resolution(parser, None, "what the weights expect")
    options.add_dtype(parser)
    options.add_threads(parser)
    options.add_json(parser)


def run(arguments: argparse.Namespace) -> None:
    """Prints a table for each image. An image that cannot be read is reported at the end."""
    output.check_json(arguments.json)
    model, convention = weights.load_model(arguments.weights, convention=arguments.convention)
    classes = weights.num_classes(model.state_dict())
    labels = options.read_labels(arguments.labels, classes) if arguments.labels else None
    top = arguments.top or min(5, classes)
    if top > classes:
        raise InputError(f"--top {arguments.top}: the weights have {classes} classes")
    dtype = options.DTYPES[arguments.dtype]
    model = freeze(model.to(dtype))
    console = output.console(arguments)
    answers, failures = [], []
    with measure.threads(arguments.threads), torch.inference_mode():
        for path, image in options.readable(arguments.images, failures):
            x = images.prepare(image, convention, arguments.resolution)[None]
            answers.append({"image": path, "top": _answer(model(x.to(dtype))[0].float(), top, labels)})
            table = output.table("probability", "class", "<label")
            for row in answers[-1]["top"]:
                label = "(no --labels)" if row["label"] is None else row["label"]
                table.add_row(f"{row['probability']:.4f}", str(row["index"]), label)
            output.say(console, path)
            console.print(table)
    settings = {
        "weights": str(arguments.weights),
        "convention": convention.name,
        "classes": classes,
        "resolution": arguments.resolution or convention.crop,
        "dtype": arguments.dtype,
    }
    output.write_json(arguments.json, {**measure.environment(), "settings": settings, "answers": answers})
    if failures:
        raise InputError("; ".join(map(str, failures)))


def _answer(logits: torch.Tensor, top: int, labels: list[str] | None) -> list[dict]:
    probabilities, indices = logits.softmax(0).topk(top)
    return [
        {
            "index": index,
            "label": labels[index] if labels else None,
            "probability": probability,
            "logit": logits[index].item(),
        }
        for index, probability in zip(indices.tolist(), probabilities.tolist(), strict=True)
    ]
