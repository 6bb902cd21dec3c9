"""The command line: `python -m mnv2_fused [compare | classify | train | plan | info]`.

Exit codes: 0 done; 2 wrong usage or bad input; 1 the machine could not do it (memory); 130 interrupted.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch import nn

from mnv2_fused import _C, trainer, weights
from mnv2_fused._core import library as _library
from mnv2_fused.data import datasets, images
from mnv2_fused.explain import explain
from mnv2_fused.models.mobilenet_v2 import MobileNetV2
from mnv2_fused.tools import measure, rates
from mnv2_fused.training import RECOMPUTE

COMMANDS = ("compare", "classify", "train", "plan", "info")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CONTENDERS = ("eager", "eager_channels_last", "fused")


class Gpu(NamedTuple):
    name: str
    clock: float  # cycles a second
    memory: float  # bytes a second


# What predictions are made for. A100: its data sheet (boost clock, peak bandwidth). H200: the clock at which its data
# sheet counts 989 TFLOP/s in 16 bits, and the bandwidth that a copy was measured at.
GPUS = {"sm_80": Gpu("A100 80GB", 1.41e9, 2.039e12), "sm_90": Gpu("H200", 1.83e9, 4.3e12)}
PARTS = {"hbm": "HBM", "tensor": "tensor cores", "shared": "shared memory", "issue": "instructions"}


class InputError(ValueError):
    """Options or files that do not fit together."""


# ---------------------------------------------------------------------------------------------------------- arguments


def _count(most: int, least: int = 1) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"expected a whole number from {least} to {most}, got {text!r}")
        return value

    return parse


def _counts(most: int) -> Callable[[str], list[int]]:
    one = _count(most)

    def parse(text: str) -> list[int]:
        try:
            return [one(part.strip()) for part in text.split(",")]
        except argparse.ArgumentTypeError:
            raise argparse.ArgumentTypeError(
                f"expected whole numbers from 1 to {most} separated by commas, got {text!r}"
            ) from None

    return parse


def _positive(most: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = 0.0
        if not 0 < value <= most:  # also refuses NaN
            raise argparse.ArgumentTypeError(f"expected a number above 0 and at most {most:g}, got {text!r}")
        return value

    return parse


def _from_zero(most: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        if not 0 <= value <= most:
            raise argparse.ArgumentTypeError(f"expected a number from 0 to {most:g}, got {text!r}")
        return value

    return parse


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mnv2_fused",
        description="MobileNetV2 with fused inverted-residual blocks. Without a command it runs `compare`.",
        epilog="MNV2_FUSED_CPU_ISA=scalar|avx2|avx512 forces a lower instruction set than the machine's best.",
    )
    parser.add_argument("--version", action="version", version=f"mnv2_fused {_C.build_info()['version']}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    published = f"[{', '.join(weights.PUBLISHED)}]"
    cores = measure.usable_cpus()

    def add(name: str, run: Callable, help_: str, description: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=help_, description=description)
        command.set_defaults(run=run)
        return command

    def add_weights(command: argparse.ArgumentParser, required: bool, default: str) -> None:
        command.add_argument(
            "--weights",
            metavar="FILE|NAME",
            required=required,
            help=f".pth or .safetensors file with torchvision's key names, or a published checkpoint "
            f"{published}{default}",
        )
        command.add_argument(
            "--convention",
            choices=sorted(weights.CONVENTIONS),
            help="padding and preprocessing of the weights (default: tensorflow for 1001 classes, else torchvision)",
        )

    def add_common(command: argparse.ArgumentParser, resolution: int | None = 224) -> None:
        default = f"default: {resolution}" if resolution else "default: what the weights expect"
        command.add_argument(
            "--resolution", type=_count(8192), default=resolution, metavar="PIXELS", help=f"input size ({default})"
        )
        command.add_argument(
            "--dtype", choices=sorted(DTYPES), default="float32", help="of activations (default: float32)"
        )

    def add_json(command: argparse.ArgumentParser) -> None:
        command.add_argument("--json", metavar="FILE", help="also write the results as JSON; - is standard output")

    compare = add(
        "compare",
        _compare,
        "fused against plain PyTorch on this machine (the default)",
        "Measures latency, images/s, peak activation memory and the largest difference of the fused model against "
        "plain PyTorch (contiguous and channels_last), per batch size and thread count. Needs no weights: without any "
        "it uses random ones with randomised batch-norm statistics.",
    )
    compare.add_argument("--image", metavar="FILE", help="photograph to use as input (default: random numbers)")
    add_weights(compare, False, " (default: random)")
    compare.add_argument("--width", type=_positive(16), metavar="MULT", help="width multiplier (default: 1.0)")
    add_common(compare, None)
    compare.add_argument(
        "--batch", type=_counts(4096), default=[1, 8], metavar="N[,N...]", help="batch sizes (default: 1,8)"
    )
    threads = sorted({1, cores})
    compare.add_argument(
        "--threads",
        type=_counts(1024),
        default=threads,
        metavar="N[,N...]",
        help=f"thread counts (default: {','.join(map(str, threads))})",
    )
    compare.add_argument(
        "--seconds", type=_positive(600), default=1.0, help="time to spend on each measurement (default: 1)"
    )
    compare.add_argument("--seed", type=int, default=0, help="of random weights and inputs (default: 0)")
    add_json(compare)

    classify = add(
        "classify",
        _classify,
        "the most likely classes of photographs",
        "Prints the most likely classes of each photograph. Preprocessing and padding follow the weights' convention.",
    )
    classify.add_argument("images", nargs="+", metavar="IMAGE", help="photograph, of any kind that Pillow reads")
    add_weights(classify, True, "")
    classify.add_argument("--labels", metavar="FILE", help="text file with a label a line, by class index")
    classify.add_argument("--top", type=_count(100000), metavar="N", help="classes to print (default: 5, or all)")
    add_common(classify, None)
    classify.add_argument("--threads", type=_count(1024), default=cores, metavar="N", help=f"(default: {cores})")
    add_json(classify)

    training = add(
        "train",
        _train,
        "train on digits or on a folder of images",
        "Trains on scikit-learn's digits or on a folder with a directory of images for each class, and writes "
        f"{trainer.CHECKPOINT} (after every epoch and when interrupted), {trainer.MODEL}, {trainer.LABELS} and "
        f"{trainer.LOG}. "
        "With --resume, options that are left out come from the checkpoint.",
    )
    training.add_argument(
        "--data",
        required=True,
        metavar="digits|FOLDER",
        help="digits, or a folder: FOLDER/CLASS/IMAGE, a fifth of which is held out, or FOLDER/train/CLASS/IMAGE and "
        "FOLDER/val/CLASS/IMAGE",
    )
    training.add_argument(
        "--output", metavar="DIR", help="directory for all files (default: runs/ and the data's name)"
    )
    training.add_argument("--resume", action="store_true", help="go on from the checkpoint in --output")
    training.add_argument("--epochs", type=_count(100000), metavar="N", help="(default: 30 for digits, else 90)")
    training.add_argument(
        "--max-steps", type=_count(2**31), metavar="N", help="stop after so many steps, the schedule being that of all"
    )
    training.add_argument("--batch", type=_count(4096, 2), metavar="N", help="images a step (default: 64)")
    training.add_argument(
        "--optimizer",
        choices=trainer.OPTIMIZERS,
        help="sgd: momentum 0.9, warm-up and cosine; rmsprop: the paper's, decay and momentum 0.9, times 0.98 after "
        "every epoch (default: sgd)",
    )
    training.add_argument(
        "--lr",
        type=_positive(1000),
        metavar="RATE",
        help="highest learning rate (default: 0.045 for 96 images a step, in proportion for others; a tenth of that "
        "with --weights)",
    )
    training.add_argument("--warmup", type=_from_zero(1000), metavar="EPOCHS", help="of sgd (default: 1)")
    training.add_argument("--weight-decay", type=_from_zero(1), metavar="RATE", help="(default: 4e-5)")
    training.add_argument("--label-smoothing", type=_from_zero(1), metavar="SHARE", help="(default: 0)")
    training.add_argument(
        "--width",
        type=_positive(16),
        metavar="MULT",
        help="width multiplier (default: that of --weights, else 0.35 for digits and 1.0 for folders)",
    )
    training.add_argument(
        "--resolution",
        type=_count(8192),
        metavar="PIXELS",
        help="input size (default: what --weights expect, else 48 for digits and 224 for folders)",
    )
    add_weights(training, False, " to start from; its classifier is replaced where the class counts differ")
    training.add_argument(
        "--freeze-bn",
        action="store_true",
        default=None,
        help="keep statistics, scales and biases of batch norm as in --weights",
    )
    training.add_argument("--seed", type=_count(2**32 - 1, 0), help="of all that is random (default: 0)")
    training.add_argument(
        "--fused", action=argparse.BooleanOptionalAction, default=True, help="fused units or plain PyTorch"
    )
    training.add_argument(
        "--recompute",
        choices=RECOMPUTE,
        default="balanced",
        help="what fused units make again in order not to keep it: most saves memory, least time (default: balanced)",
    )
    training.add_argument("--threads", type=_count(1024), metavar="N", help=f"(default: {cores})")
    training.add_argument(
        "--workers",
        type=_count(1024, 0),
        metavar="N",
        help=f"processes that decode images (default: 0 for digits, {min(4, cores)} for folders)",
    )
    add_json(training)

    plan = add(
        "plan",
        _plan,
        "how every block is cut into tiles, on this machine or on a GPU",
        "Prints the tile plan of every block on this machine: what is computed at a time, by how many tasks, in how "
        "much scratch memory; with --measure also how fast the block should be, and is. With --device the plan is that "
        "of a GPU, which need not be there.",
    )
    plan.add_argument(
        "--width", type=_positive(16), default=1.0, metavar="MULT", help="width multiplier (default: 1.0)"
    )
    add_common(plan)
    plan.add_argument("--batch", type=_count(4096), default=1, metavar="N", help="batch size (default: 1)")
    plan.add_argument("--threads", type=_count(1024), default=cores, metavar="N", help=f"(default: {cores})")
    plan.add_argument("--device", choices=["cpu", *GPUS], default="cpu", help="sm_80: A100, sm_90: H200 (default: cpu)")
    plan.add_argument(
        "--tf32",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="float32 on a GPU: products in TF32, PyTorch's own default for convolutions (default: yes)",
    )
    plan.add_argument(
        "--measure", action="store_true", help="also run each block alone: GMAC/s, and share of the peak on registers"
    )
    add_json(plan)

    info = add("info", _info, "versions, instruction set, threads, CUDA, build", "Prints what is installed and in use.")
    add_json(info)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the command line `argv` (default: the process's own) and returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or (argv[0].startswith("-") and argv[0] not in ("-h", "--help", "--version")):
        argv.insert(0, "compare")
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
        sys.stdout.flush()
        return 0
    except (InputError, weights.WeightsError, images.ImageError, datasets.DataError, trainer.TrainError) as error:
        return _fail(2, error)
    except KeyboardInterrupt as error:
        return _fail(130, str(error) or "interrupted")
    except BrokenPipeError:  # `... | head`: nobody reads on, and the interpreter must not try to flush at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except MemoryError as error:
        return _fail(1, f"not enough memory {error}")
    except RuntimeError as error:
        if "allocate memory" in str(error):
            return _fail(1, f"not enough memory; try a smaller --batch or --resolution ({str(error).splitlines()[0]})")
        raise


def _fail(code: int, message: object) -> int:
    print(f"error: {message}", file=sys.stderr)
    return code


# ------------------------------------------------------------------------------------------------------------- output


def _console(arguments: argparse.Namespace, least_width: int = 80) -> Console:
    """Where tables go: standard output, or standard error where JSON has that. Pipes get no 80-column limit."""
    console = Console(stderr=arguments.json == "-", highlight=False)
    width = max(console.width if console.is_terminal else 160, least_width)
    return Console(stderr=arguments.json == "-", highlight=False, width=width)


def _table(*columns: str) -> Table:
    """A table whose columns are right-aligned unless their name starts with `<`."""
    table = Table(box=box.SIMPLE_HEAD)
    for column in columns:
        table.add_column(column.lstrip("<"), justify="left" if column.startswith("<") else "right")
    return table


def _check_json(target: str | None) -> None:
    """Fails before the measuring, not after it, where the JSON cannot be written."""
    if target in (None, "-"):
        return
    path = Path(target)
    if path.is_dir():
        raise InputError(f"--json: expected a file, got a directory: {target}")
    if not path.absolute().parent.is_dir():
        raise InputError(f"--json: no such directory: {path.absolute().parent}")
    if not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
        raise InputError(f"--json: no permission to write {target}")


def _write_json(target: str | None, content: dict) -> None:
    if target is None:
        return
    text = json.dumps(content, indent=1) + "\n"
    if target == "-":
        sys.stdout.write(text)
        return
    try:
        Path(target).write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"--json: cannot write {target}: {error.strerror}") from error


# ------------------------------------------------------------------------------------------------------------ compare


def _compare(arguments: argparse.Namespace) -> None:
    _check_json(arguments.json)
    dtype = DTYPES[arguments.dtype]
    models, convention, described = _contenders(arguments, dtype)
    resolution = arguments.resolution or convention.crop
    picture = None
    if arguments.image is not None:
        picture = images.prepare(images.read(arguments.image), convention, resolution)

    console = _console(arguments)
    facts = measure.environment()
    console.print(
        f"{described['network']}, {resolution}x{resolution}, {arguments.dtype}; weights: {described['weights']}; "
        f"input: {arguments.image or 'random'}",
        markup=False,
        soft_wrap=True,
    )
    console.print(
        f"{facts['machine']['cpu']}, {facts['machine']['cpus']} CPUs, {facts['machine']['isa']}; "
        f"torch {facts['versions']['torch']}",
        markup=False,
        soft_wrap=True,
    )
    _warn_of_fallbacks(models["fused"], console)
    cases = [(batch, threads) for batch in arguments.batch for threads in arguments.threads]
    results = []
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f}%"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("measuring", total=len(cases))
        for done, (batch, threads) in enumerate(cases):
            progress.update(task, description=f"batch {batch}, {threads} thread{'s' if threads > 1 else ''}")

            def advance(share: float, done: int = done) -> None:
                progress.update(task, completed=done + share)

            x = _inputs(picture, batch, resolution, dtype, arguments.seed)
            results.append(_measure_case(models, x, threads, arguments.seconds, advance))

    console.print(_comparison_table(results))
    for line in _summary(results):
        console.print(line, markup=False, soft_wrap=True)
    settings = {
        **described,
        "resolution": resolution,
        "dtype": arguments.dtype,
        "input": arguments.image or "random",
        "seed": arguments.seed,
    }
    _write_json(arguments.json, {**facts, "settings": settings, "results": results})
    if arguments.json not in (None, "-"):
        console.print(f"written: {arguments.json}", markup=False, soft_wrap=True)


def _contenders(
    arguments: argparse.Namespace, dtype: torch.dtype
) -> tuple[dict[str, nn.Module], weights.Convention, dict]:
    """The same network three times, its convention, and what to say of it."""
    if arguments.weights is None:
        width = 1.0 if arguments.width is None else arguments.width
        convention = weights.CONVENTIONS[arguments.convention or "torchvision"]
        torch.manual_seed(arguments.seed)
        plain = MobileNetV2(width_mult=width, fused=False, tf_padding=convention.tf_padding).eval()
        weights.randomize_batch_norm(plain, arguments.seed)
        origin = "random, with randomised batch-norm statistics"
    else:
        plain, convention = weights.load_model(arguments.weights, convention=arguments.convention, fused=False)
        width = weights.width_mult(plain.state_dict())
        origin = f"{arguments.weights} ({convention.name} convention)"
        if arguments.width not in (None, width):
            raise InputError(f"--width {arguments.width:g} contradicts --weights, whose width is {width:g}")
    classes = weights.num_classes(plain.state_dict())
    fused = MobileNetV2(classes, width, fused=True, tf_padding=convention.tf_padding).eval()
    fused.load_state_dict(plain.state_dict())
    plain, fused = plain.to(dtype), fused.to(dtype)
    models = {
        "eager": plain,
        "eager_channels_last": copy.deepcopy(plain).to(memory_format=torch.channels_last),
        "fused": fused,
    }
    return models, convention, {"network": f"MobileNetV2 {width}", "width": width, "weights": origin}


def _warn_of_fallbacks(model: nn.Module, console: Console) -> None:
    with torch.inference_mode():
        reasons = {unit: reason for unit, reason in explain(model).items() if reason}
    for unit, reason in reasons.items():
        console.print(f"not fused: {unit}: {reason}", markup=False, soft_wrap=True, style="yellow")


def _inputs(
    picture: torch.Tensor | None, batch: int, resolution: int, dtype: torch.dtype, seed: int
) -> dict[str, torch.Tensor]:
    """The same numbers in each contender's layout."""
    if picture is None:
        x = torch.randn(batch, 3, resolution, resolution, generator=torch.Generator().manual_seed(seed))
    else:
        x = picture.expand(batch, -1, -1, -1).contiguous()
    x = x.to(dtype)
    channels_last = x.contiguous(memory_format=torch.channels_last)
    return {"eager": x, "eager_channels_last": channels_last, "fused": channels_last}


def _measure_case(
    models: dict[str, nn.Module],
    inputs: dict[str, torch.Tensor],
    threads: int,
    seconds: float,
    advance: Callable[[float], None],
) -> dict:
    calls = {name: (lambda m=models[name], x=inputs[name]: m(x)) for name in CONTENDERS}
    with measure.threads(threads), torch.inference_mode():
        largest, relative = measure.difference(calls["fused"](), calls["eager"]())
        times = measure.interleaved(calls, seconds=seconds, progress=lambda share: advance(0.8 * share))
        memory = {}
        for name in CONTENDERS:
            memory[name] = measure.peak_memory(calls[name])
            advance(0.8 + 0.2 * len(memory) / len(CONTENDERS))
    latency = measure.medians(times)
    batch = inputs["fused"].shape[0]
    return {
        "batch": batch,
        "threads": threads,
        "latency_ms": {name: 1e3 * latency[name] for name in CONTENDERS},
        "images_per_s": {name: batch / latency[name] for name in CONTENDERS},
        "runs": len(times["fused"]),
        "peak_activation_bytes": memory,
        "speedup": {name: latency[name] / latency["fused"] for name in CONTENDERS[:-1]},
        "memory_ratio": {name: memory[name] / memory["fused"] for name in CONTENDERS[:-1]},
        "largest_difference": largest,
        "largest_relative_difference": relative,
    }


def _comparison_table(results: list[dict]) -> Table:
    table = _table("batch", "threads", "<model", "ms", "images/s", "peak MB", "largest difference")
    for result in results:
        for name in CONTENDERS:
            first, last = name == CONTENDERS[0], name == CONTENDERS[-1]
            table.add_row(
                str(result["batch"]) if first else "",
                str(result["threads"]) if first else "",
                name.replace("_", " ", 1),
                f"{result['latency_ms'][name]:.2f}",
                f"{result['images_per_s'][name]:.1f}",
                f"{result['peak_activation_bytes'][name] / 1e6:.2f}",
                f"{result['largest_difference']:.2g} ({result['largest_relative_difference']:.1g} relative)"
                if last
                else "",
                end_section=last,
                style="bold" if last else None,
            )
    return table


def _summary(results: list[dict]) -> list[str]:
    def span(key: str, name: str) -> str:
        values = [result[key][name] for result in results]
        low, high = f"{min(values):.1f}", f"{max(values):.1f}"
        return f"{low}x" if low == high else f"{low}x to {high}x"

    return [
        f"fused is {span('speedup', name)} as fast as {name.replace('_', ' ', 1)}, "
        f"whose activations take {span('memory_ratio', name)} the memory"
        for name in CONTENDERS[:-1]
    ]


# ----------------------------------------------------------------------------------------------------------- classify


def _classify(arguments: argparse.Namespace) -> None:
    _check_json(arguments.json)
    model, convention = weights.load_model(arguments.weights, convention=arguments.convention)
    classes = weights.num_classes(model.state_dict())
    labels = _labels(arguments.labels, classes) if arguments.labels else None
    top = arguments.top or min(5, classes)
    if top > classes:
        raise InputError(f"--top {arguments.top}: the weights have {classes} classes")
    model = model.to(DTYPES[arguments.dtype])
    console = _console(arguments)
    answers, failures = [], []
    with measure.threads(arguments.threads), torch.inference_mode():
        for path in arguments.images:  # a picture that cannot be read does not cost the others their answer
            try:
                x = images.load_batch([path], convention, arguments.resolution)
            except images.ImageError as error:
                failures.append(error)
                continue
            logits = model(x.to(DTYPES[arguments.dtype]))[0].float()
            probabilities, indices = logits.softmax(0).topk(top)
            answers.append(
                {
                    "image": path,
                    "top": [
                        {
                            "index": index,
                            "label": labels[index] if labels else None,
                            "probability": probability,
                            "logit": logits[index].item(),
                        }
                        for index, probability in zip(indices.tolist(), probabilities.tolist(), strict=True)
                    ],
                }
            )
            table = _table("probability", "class", "<label")
            for row in answers[-1]["top"]:
                table.add_row(f"{row['probability']:.4f}", str(row["index"]), row["label"] or "(no --labels)")
            console.print(path, markup=False, soft_wrap=True)
            console.print(table)
    settings = {
        "weights": str(arguments.weights),
        "convention": convention.name,
        "classes": classes,
        "resolution": arguments.resolution or convention.crop,
        "dtype": arguments.dtype,
    }
    _write_json(arguments.json, {**measure.environment(), "settings": settings, "answers": answers})
    if failures:
        raise InputError("; ".join(map(str, failures)))


def _labels(path: str, classes: int) -> list[str]:
    try:
        labels = Path(path).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise InputError(f"no such labels file: {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read labels from {path}: {error}") from None
    while labels and not labels[-1].strip():
        labels.pop()
    if len(labels) != classes:
        hint = "; one of the two counts a background class at 0" if abs(len(labels) - classes) == 1 else ""
        raise InputError(f"{path} has {len(labels)} labels, but the weights have {classes} classes{hint}")
    return labels


# -------------------------------------------------------------------------------------------------------------- train


def _train(arguments: argparse.Namespace) -> None:
    _check_json(arguments.json)
    given = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(trainer.Config)}
    run = trainer.Trainer(trainer.Config(**given))
    config, data = run.config, run.data
    console = _console(arguments)

    def say(text: str) -> None:
        console.print(text, markup=False, soft_wrap=True)

    say(
        f"MobileNetV2 {config.width:g}, {config.resolution}x{config.resolution}, {len(data.labels)} classes; "
        f"{len(data.train)} images to train on, {len(data.held_out)} held out"
    )
    say(
        f"{config.optimizer}, learning rate {config.lr:g}, batch {config.batch}, {config.epochs} epochs, "
        f"{run.steps} steps; {'fused' if config.fused else 'plain'}, {config.threads} threads"
    )
    if run.new_classifier:
        say(f"{config.weights} has other classes: the classifier starts anew")
    if config.resume:
        say(f"resumed in epoch {run.epoch} after step {run.step}")
    columns = (
        TextColumn("epoch {task.fields[epoch]}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} {task.description}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=run.steps, completed=run.step, epoch=run.epoch)

        def report(now: trainer.Progress) -> None:
            figures = f"{now.images_per_s:.0f} images/s, {now.peak_memory_bytes / 1e6:.0f} MB"
            trained = f"loss {now.loss:.4f}, accuracy {now.accuracy:.2%}"
            bar.update(task, completed=now.step, epoch=now.epoch, description=f"{trained}, {figures}")
            if now.record is not None:
                say(
                    f"epoch {now.epoch}, step {now.step}: {trained}; held out: loss "
                    f"{now.record['validation_loss']:.4f}, accuracy {now.record['validation_accuracy']:.2%}; {figures}"
                )

        history = run.run(report)
    _write_json(arguments.json, {**measure.environment(), "settings": dataclasses.asdict(config), "epochs": history})
    directory = run.directory
    say(f"written: {', '.join(str(directory / name) for name in (trainer.MODEL, trainer.LABELS, trainer.LOG))}")
    say(
        f"python -m mnv2_fused classify IMAGE --weights {shlex.quote(str(directory / trainer.MODEL))} "
        f"--labels {shlex.quote(str(directory / trainer.LABELS))}"
    )


# --------------------------------------------------------------------------------------------------------------- plan


def _plan(arguments: argparse.Namespace) -> None:
    _check_json(arguments.json)
    if arguments.device != "cpu":
        return _gpu_plan(arguments)
    model = MobileNetV2(width_mult=arguments.width).eval()
    rows = []
    for shape in rates.block_shapes(model, arguments.resolution):
        given = rates.plan_arguments(shape, arguments.batch)
        plan = _C.cpu_plan(*given, threads=arguments.threads, dtype=arguments.dtype)
        rows.append({**shape, "plan": plan})
    content: dict = {"blocks": rows, "network": _network_plan(model, arguments)}
    if arguments.measure:
        content["total"] = _measure_blocks(model, rows, arguments)
    console = _console(arguments, least_width=130)
    first = rows[0]["plan"]
    console.print(
        f"MobileNetV2 {arguments.width}, {arguments.resolution}x{arguments.resolution}, batch {arguments.batch}, "
        f"{arguments.threads} thread{'s' if arguments.threads > 1 else ''}, {arguments.dtype}; {first['isa']}, "
        f"L1 {first['l1'] // 1024} KiB, L2 {first['l2'] // 1024} KiB, chunks of {first['chunk']} hidden channels"
    )
    apart = ("isa", "l1", "l2", "chunk", "h_out", "w_out", "macs")
    shown = [key for key in first if key not in apart]
    names = [key.replace("_bytes", " KiB").replace("_", " ") for key in shown]
    table = _table("<block", "<input", "hidden", "<output", *names, "MMACs")
    for row in rows:
        plan = row["plan"]
        table.add_row(
            row["block"],
            f"{row['h']}x{row['w']}x{row['c_in']}",
            str(row["c_hidden"]),
            f"{plan['h_out']}x{plan['w_out']}x{row['c_out']}" + (" + x" if row["residual"] else ""),
            *(f"{plan[key] / 1024:.1f}" if key.endswith("_bytes") else str(plan[key]) for key in shown),
            f"{plan['macs'] / 1e6:.2f}",
        )
    console.print(table)
    console.print(
        "scratch: of one task; shared: of all; MMACs: millions of multiply-adds of one image; + x: adds its input"
    )
    network = content["network"]
    console.print(
        f"the network in one operator: stem {'fused into' if network['fused_stem'] else 'before'} the first block, "
        f"arena {network['arena_bytes'] / 2**20:.1f} MiB"
        + (
            f", {network['images_at_a_time']} images at a time through the first {network['steps_for_a_few_images']} "
            f"of {network['steps']} steps"
            if network["steps_for_a_few_images"]
            else ""
        )
    )
    if arguments.measure:
        console.print(_rate_table(rows, content["total"]))
        console.print(
            "measured: each block's operator alone, median; the peak: "
            f"{content['total']['peak_gmacs_per_second']:.1f} GMAC/s of multiply-adds on registers, measured beside it"
        )
    settings = {key: getattr(arguments, key) for key in ("width", "resolution", "batch", "threads", "dtype")}
    _write_json(arguments.json, {**measure.environment(), "settings": settings, **content})


def gpu_plan(width: float, resolution: int, batch: int, dtype: str, device: str, tf32: bool = True) -> dict:
    """`_C.cuda_network_plan` of a MobileNetV2, with the microseconds of every launch: what each part of the GPU needs
    alone, which of them binds, and what is predicted for the launch.
    """
    gpu = GPUS[device]
    lists = rates.network_spec(MobileNetV2(width_mult=width).eval()).arguments
    plan = _C.cuda_network_plan((batch, resolution, resolution, 3), *lists, dtype, device, exact=not tf32)
    for launch in plan["launches"]:
        us = {part: 1e6 * launch[f"{part}_cycles"] / gpu.clock for part in PARTS if part != "hbm"}
        us["hbm"] = 1e6 * launch["memory_bytes"] / gpu.memory
        launch["us"] = {part: us[part] for part in PARTS}
        launch["binds"] = max(us, key=us.__getitem__)
        launch["predicted_us"] = max(1e6 * launch["cycles"] / gpu.clock, *us.values())
    return plan


def prediction_rows(launches: list[dict]) -> list[list[str]]:
    """A line of text for each launch and one for all: name, parts, which binds and its share, prediction."""
    lines = []
    for launch in launches:
        share = launch["us"][launch["binds"]] / launch["predicted_us"]
        cells = [f"{us:.1f}" for us in launch["us"].values()]
        binds = f"{PARTS[launch['binds']]} {share:.0%}"
        lines.append([launch["name"], *cells, binds, f"{launch['predicted_us']:.1f}"])
    total = {part: sum(launch["us"][part] for launch in launches) for part in PARTS}
    bound = sum(max(launch["us"].values()) for launch in launches)
    predicted = sum(launch["predicted_us"] for launch in launches)
    cells = [f"{us:.1f}" for us in total.values()]
    return [*lines, ["all", *cells, f"{bound:.1f} us, {bound / predicted:.0%}", f"{predicted:.1f}"]]


PREDICTION_HEADS = ["launch", *(f"{name}, us" for name in PARTS.values()), "binds, share", "predicted, us"]


def _gpu_plan(arguments: argparse.Namespace) -> None:
    if arguments.measure:
        raise InputError("--measure needs --device cpu: a GPU's plan is only a prediction")
    options = {key: getattr(arguments, key) for key in ("width", "resolution", "batch", "dtype", "device", "tf32")}
    gpu, device, plan = GPUS[arguments.device], _C.cuda_device(arguments.device), gpu_plan(**options)
    console = _console(arguments, least_width=130)
    arithmetic = arguments.dtype + (", TF32" if arguments.tf32 and arguments.dtype == "float32" else "")
    console.print(
        f"MobileNetV2 {arguments.width}, {arguments.resolution}x{arguments.resolution}, batch {arguments.batch}, "
        f"{arithmetic}; {arguments.device} ({gpu.name}): {device['multiprocessors']} multiprocessors at "
        f"{gpu.clock / 1e9:.2f} GHz, {device['shared_block_bytes'] // 1024} KiB of shared memory for a thread block, "
        f"{gpu.memory / 1e12:.1f} TB/s"
    )
    if not plan["fits"]:
        raise InputError(f"a block of this network has no tile that fits into {arguments.device}'s shared memory")
    table = _table("<launch", "<input", "hidden", "<output", "tile", "images", "splits", "parts", "threads", "blocks",
                   "at once", "shared KiB")  # fmt: skip
    for launch in plan["launches"]:
        cells = [""] * 7
        if "tile_h" in launch:
            cells = [
                "x".join(map(str, launch["input"])),
                str(launch["hidden"]),
                "x".join(map(str, launch["output"])) + (" + x" if launch["residual"] else ""),
                f"{launch['tile_h']}x{launch['tile_w']}",
                *(str(launch[key]) for key in ("images", "splits", "column_parts")),
            ]
        x, y, z = launch["grid"]
        once = str(launch.get("blocks_at_once", ""))
        shared = f"{launch['shared_bytes'] / 1024:.1f}"
        table.add_row(launch["name"], *cells, str(launch["threads"]), str(x * y * z), once, shared)
    console.print(table)
    console.print(
        "tile, images: output of a thread block; splits: of the hidden channels; parts: of the output channels; "
        "blocks, at once: of threads, in all and on a multiprocessor; + x: adds its input"
    )
    console.print(
        f"the network in one operator: stem {'joined with' if plan['joined'] else 'before'} the first block, "
        f"{len(plan['launches'])} launches, {plan['memory_bytes'] / 2**20:.1f} MiB of memory beside input, output and "
        f"{plan['packed_bytes'] / 2**20:.1f} MiB of weights"
    )
    table = _table("<launch", *PREDICTION_HEADS[1:])
    *rows, total = prediction_rows(plan["launches"])
    for row in rows:
        table.add_row(*row, end_section=row is rows[-1])
    table.add_row(*total)
    console.print(table)
    console.print(
        "what each part of the GPU needs for a launch if it alone counted: bytes of its memory, products, bytes of "
        "shared memory, instructions; binds: the largest, and its share of the prediction, of which the rest is "
        "waiting and idle multiprocessors. Predictions, not measurements"
    )
    _write_json(arguments.json, {**measure.environment(), "settings": options, "gpu": gpu._asdict(), **plan})


def _network_plan(model: MobileNetV2, arguments: argparse.Namespace) -> dict:
    size = (arguments.batch, arguments.resolution, arguments.resolution, 3)
    lists = rates.network_spec(model).arguments
    return _C.cpu_network_plan(size, *lists, threads=arguments.threads, dtype=arguments.dtype)


def _measure_blocks(model: MobileNetV2, rows: list[dict], arguments: argparse.Namespace) -> dict:
    """Adds predicted and measured rates to every row and returns those of all blocks together."""
    model.to(DTYPES[arguments.dtype])
    generator = torch.Generator().manual_seed(0)
    with measure.threads(arguments.threads), torch.inference_mode():
        peak = _C.cpu_fma_peak()
        for row in rows:
            x = torch.rand(arguments.batch, row["c_in"], row["h"], row["w"], generator=generator)
            x = x.to(DTYPES[arguments.dtype], memory_format=torch.channels_last)
            row["measured_seconds"] = rates.measured_seconds(model.get_submodule(row["block"]), x)
        peak = max(peak, _C.cpu_fma_peak()) * arguments.threads
    for row in rows:
        row["predicted_seconds"] = rates.predicted_seconds(row, row["plan"], arguments.batch, peak)
    total = {key: sum(row[key] for row in rows) for key in ("measured_seconds", "predicted_seconds")}
    total["macs"] = sum(row["plan"]["macs"] for row in rows)
    for entry in (*rows, total):
        macs = arguments.batch * entry.get("plan", entry)["macs"]
        for kind in ("predicted", "measured"):
            entry[f"{kind}_gmacs_per_second"] = macs / entry[f"{kind}_seconds"] / 1e9
        entry["share_of_peak"] = macs / entry["measured_seconds"] / peak
    return {**total, "peak_gmacs_per_second": peak / 1e9}


def _rate_table(rows: list[dict], total: dict) -> Table:
    table = _table("<block", "MMACs", "predicted GMAC/s", "measured GMAC/s", "of the peak")
    for row in (*rows, {"block": "all blocks", "plan": total, **total}):
        table.add_row(
            row["block"],
            f"{row['plan']['macs'] / 1e6:.2f}",
            f"{row['predicted_gmacs_per_second']:.1f}",
            f"{row['measured_gmacs_per_second']:.1f}",
            f"{row['share_of_peak']:.0%}",
            end_section=row is rows[-1],
        )
    return table


# --------------------------------------------------------------------------------------------------------------- info


def _info(arguments: argparse.Namespace) -> None:
    _check_json(arguments.json)
    facts = measure.environment()
    facts["threads"] = torch.get_num_threads()
    facts["isa"] = {
        "in_use": _C.cpu_isa(),
        "supported": list(_C.cpu_supported_isas()),
        "MNV2_FUSED_CPU_ISA": os.environ.get("MNV2_FUSED_CPU_ISA"),
    }
    facts["cuda"] = {
        "torch": torch.version.cuda,
        "available": torch.cuda.is_available(),
        "kernels": _library.cuda_missing or "loaded",
        "gpus": [
            f"{torch.cuda.get_device_name(i)}: {_library.gpu_reason(i) or 'runs them'}"
            for i in range(0 if _library.cuda_missing else torch.cuda.device_count())
        ],
    }
    facts["build"] = dict(_C.build_info())
    for package in ("numpy", "pillow", "rich", "safetensors"):
        facts["versions"][package] = measure.version_of(package)
    table = Table(box=None, show_header=False)
    for section, content in facts.items():
        if isinstance(content, dict):
            for key, value in content.items():
                text = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
                table.add_row(f"{section} {key}", text)
        else:
            table.add_row(section, str(content))
    _console(arguments).print(table)
    _write_json(arguments.json, facts)
