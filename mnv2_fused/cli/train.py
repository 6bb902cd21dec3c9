"""`train`: training on digits, on a folder of images, or on photographs with boxes or masks."""

from __future__ import annotations

import argparse
import dataclasses
import shlex

from rich.progress import BarColumn, TimeRemainingColumn

from mnv2_fused import trainer
from mnv2_fused.cli import options, output
from mnv2_fused.models.units import PROJECT_ACTIVATIONS, SHORTCUTS
from mnv2_fused.tools import measure
from mnv2_fused.trainer.config import CHOICES, LIMITS, TASK_NAMES, option
from mnv2_fused.trainer.processes import Processes, joined
from mnv2_fused.training import RECOMPUTE


def add(commands: argparse._SubParsersAction) -> None:
    """Declares the command and its options: a field of `trainer.Config` each, and --json."""
    parser = commands.add_parser(
        "train",
        help="train on digits, on a folder of images, or on photographs with boxes or masks",
        description="Trains on scikit-learn's digits or on a folder with a directory of images for each class. "
        "--task detection trains SSDLite on a folder in COCO's format, --task segmentation DeepLabv3 on one in VOC's. "
        f"Writes {trainer.CHECKPOINT} (after every epoch and when interrupted), {trainer.MODEL}, {trainer.LABELS} and "
        f"{trainer.LOG}. With --resume, options that are left out come from the checkpoint. "
        "`torchrun --nproc-per-node N -m mnv2_fused train ...` trains on N processes, also on several machines.",
    )
    parser.set_defaults(run=run)
    _add_files(parser)
    add_recipe(parser)
    _add_network(parser)
    add_machine(parser)
    parser.add_argument(
        "--sync-bn",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="batch statistics over all processes that torchrun has started (default: no)",
    )
    options.add_json(parser)


def _add_files(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--task", choices=TASK_NAMES, help="(default: classification)")
    parser.add_argument(
        "--data",
        required=True,
        metavar="digits|FOLDER",
        help="digits, or a folder: FOLDER/CLASS/IMAGE, a fifth of which is held out, or FOLDER/train/CLASS/IMAGE and "
        "FOLDER/val/CLASS/IMAGE. For detection FOLDER/instances.json and images/, or annotations/instances_train*.json "
        "and _val*.json. For segmentation SegmentationClass/, JPEGImages/ or images/, and train.txt or val.txt",
    )
    parser.add_argument("--output", metavar="DIR", help="directory for all files (default: runs/ and the data's name)")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --output")
    parser.add_argument(
        "--augment",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="random crops and mirror images of photographs with boxes or masks (default: yes)",
    )


def _add_number(parser: argparse.ArgumentParser, field: str, metavar: str | None, described: str) -> None:
    """Adds the option for a field of `trainer.Config`, with the field's limits."""
    limit = LIMITS[field]
    if limit.whole:
        kind = options.count(limit.most, limit.least)
    else:
        kind = options.positive(limit.most) if limit.above else options.from_zero(limit.most)
    parser.add_argument(option(field), type=kind, metavar=metavar, help=described)


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """Adds the options of a training that do not depend on its network."""
    parser.add_argument(
        "--recipe",
        choices=CHOICES["recipe"],
        help="the MobileNetV2 paper's: rmsprop, learning rate 0.045, times 0.98 an epoch, 96 images a process, weight "
        "decay 4e-5. Options that are given come first",
    )
    _add_number(parser, "epochs", "N", "(default: 30 for digits, 90 for folders; detection 660, segmentation 50)")
    _add_number(
        parser, "max_steps", "N", "stop after this many steps; the learning rate follows the schedule of all epochs"
    )
    _add_number(parser, "batch", "N", "images a step, in all processes together (default: 64; 24, 16)")
    parser.add_argument(
        "--optimizer",
        choices=trainer.OPTIMIZERS,
        help="sgd: momentum 0.9, warm-up and cosine; rmsprop: the paper's, decay and momentum 0.9, times 0.98 after "
        "every epoch (default: sgd)",
    )
    _add_number(
        parser,
        "lr",
        "RATE",
        "highest learning rate (default: 0.045 for 96 images a step, in proportion for others; a tenth of it "
        "with --weights. Detection: 0.15 for 192 images; segmentation: 0.007 for 16; the same with --weights)",
    )
    _add_number(parser, "warmup", "EPOCHS", "of sgd (default: 1; 1, 0)")
    _add_number(parser, "weight_decay", "RATE", "(default: 4e-5)")
    _add_number(parser, "label_smoothing", "SHARE", "(default: 0)")
    _add_number(
        parser,
        "evaluate_every",
        "EPOCHS",
        "from one validation to the next; the last epoch always has one (default: 1)",
    )
    _add_number(
        parser,
        "ema",
        "DECAY",
        "validate and write a moving average of the weights, such as 0.9999 (default: the last weights)",
    )
    _add_number(parser, "seed", None, "of all that is random (default: 0)")


def _add_network(parser: argparse.ArgumentParser) -> None:
    options.add_width(parser, None, "the width of --weights, else 0.35 for digits and 1.0 for folders")
    options.add_resolution(parser, None, "what --weights expect, else 48 for digits, 224 for folders; 320, 513")
    options.add_weights(
        parser,
        note=" to start from, for detection and segmentation also such a network's file; the layer for the classes is "
        "replaced if the class counts differ",
    )
    parser.add_argument(
        "--tf", dest="convention", action="store_const", const="tensorflow", help="short for --convention tensorflow"
    )
    parser.add_argument(
        "--freeze-bn",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="keep statistics, scales and biases of batch norm as in --weights (default: no; for segmentation yes with "
        "--weights and a --batch below 16)",
    )
    options.add_output_stride(parser, "16")
    parser.add_argument(
        "--aspp", action=argparse.BooleanOptionalAction, default=None, help="DeepLabv3's dilated branches (default: no)"
    )
    _add_number(
        parser, "round_nearest", "N", "DeepLabv3's channels are multiples of N (default: 8, or as in --weights)"
    )
    parser.add_argument(
        "--project-activation",
        choices=PROJECT_ACTIVATIONS,
        help="behind the projection of the classifier's blocks (default: linear, the paper's, or as in --weights)",
    )
    parser.add_argument(
        "--shortcut",
        choices=SHORTCUTS,
        help="of the classifier's blocks; expansion runs plain (default: bottleneck, the paper's, or as in --weights)",
    )
    options.add_fused(parser)
    parser.add_argument(
        "--recompute",
        choices=RECOMPUTE,
        default="balanced",
        help="what the backward pass of fused units recomputes instead of saving it: most takes the least memory, "
        "least the least time (default: balanced)",
    )


def add_machine(parser: argparse.ArgumentParser) -> None:
    """Adds the options that say how a process computes."""
    options.add_threads(parser, None)
    _add_number(
        parser,
        "workers",
        "N",
        f"processes that decode images (default: 0 for digits, {min(4, options.CORES)} for folders)",
    )
    _add_number(
        parser,
        "accumulate",
        "N",
        "parts of each batch that pass through the network one after the other, to save memory (default: 1)",
    )
    parser.add_argument(
        "--amp", choices=CHOICES["amp"], help="arithmetic of the forward pass in training (default: float32)"
    )
    # torchrun takes `--log` for an abbreviation of its own options, wherever it stands.
    parser.add_argument(
        "--log",
        "--logger",
        choices=CHOICES["log"],
        help=f"also write curves to {trainer.CURVES}/ in --output; behind torchrun it is called --logger",
    )


def config_of(arguments: argparse.Namespace) -> trainer.Config:
    """The fields of a `trainer.Config` that the command has options for."""
    fields = {field.name for field in dataclasses.fields(trainer.Config)}
    return trainer.Config(**{name: value for name, value in vars(arguments).items() if name in fields})


def run(arguments: argparse.Namespace) -> None:
    """Trains, alone or with the processes that torchrun has started."""
    with joined():
        processes = Processes()
        processes.from_lead(lambda: output.check_json(arguments.json))
        training = trainer.Trainer(config_of(arguments))
        if processes.leads:
            _run(training, arguments)
            return
        try:
            training.run()
        except trainer.Interrupted as error:  # the first process prints it
            raise trainer.OtherProcessError(str(error)) from None


def _run(training: trainer.Trainer, arguments: argparse.Namespace) -> None:
    """Trains, with a progress bar on terminals and a line for each epoch."""
    config = training.config
    console = output.console(arguments)
    for line in introduction(training):
        output.say(console, line)
    columns = (
        "epoch {task.fields[epoch]}",
        BarColumn(),
        "{task.completed}/{task.total} {task.description}",
        TimeRemainingColumn(),
    )
    with output.progress(console, *columns) as bar:
        task = bar.add_task("", total=training.steps, completed=training.step, epoch=training.epoch)

        def report(now: trainer.Progress) -> None:
            digits = 0 if now.images_per_s >= 10 else 1
            figures = f"{now.images_per_s:.{digits}f} images/s, {now.peak_memory_bytes / 1e6:.0f} MB"
            trained = f"loss {now.loss:.4f}"
            if now.accuracy is not None:
                trained += f", accuracy {now.accuracy:.2%}"
            bar.update(task, completed=now.step, epoch=now.epoch, description=f"{trained}, {figures}")
            if now.record is not None:
                line = f"epoch {now.epoch}, step {now.step}: {trained}{_held_out(training, now.record)}; {figures}"
                output.say(console, line)

        history = training.run(report)
    content = {**measure.environment(), "settings": dataclasses.asdict(config), "epochs": history}
    output.write_json(arguments.json, content)
    model, labels, log = (training.directory / name for name in (trainer.MODEL, trainer.LABELS, trainer.LOG))
    output.say(console, f"written: {model}, {labels}, {log}")
    files = f"--weights {shlex.quote(str(model))} --labels {shlex.quote(str(labels))}"
    output.say(console, f"python -m mnv2_fused {training.task.command} IMAGE {files}")


def _held_out(training: trainer.Trainer, record: dict) -> str:
    """The headline figures of a log's entry; nothing if there was no validation."""
    shown = [
        f"{label} {record[name]:.2%}" if name.endswith("accuracy") else f"{label} {record[name]:.4f}"
        for name, label in training.task.headline.items()
        if name in record
    ]
    return f"; held out: {', '.join(shown)}" if shown else ""


def introduction(training: trainer.Trainer) -> list[str]:
    """The lines that describe a run before it starts."""
    config, data = training.config, training.data
    held_out = "the same to validate on" if data.held_out is data.train else f"{len(data.held_out)} held out"
    lines = [
        f"{training.task.title} {config.width:g}, {config.resolution}x{config.resolution}, {len(data.labels)} classes; "
        f"{len(data.train)} images to train on, {held_out}",
        f"{config.optimizer}, learning rate {config.lr:g}, batch {config.batch}, {config.epochs} epochs, "
        f"{training.steps} steps; {'fused' if config.fused else 'plain'}, {config.threads} threads",
    ]
    size = training.processes.size
    if size > 1:
        how = "synchronised batch norms" if config.sync_bn else "batch statistics of its own in each"
        lines.append(f"{size} processes, {how}")
    if training.new_classifier:
        lines.append(f"{config.weights} has other classes: the layer for them starts anew")
    if config.resume:
        lines.append(f"resumed in epoch {training.epoch} after step {training.step}")
    return lines
