"""`compare`: the fused model against plain PyTorch on this machine."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable

import torch
from rich.console import Console
from rich.progress import BarColumn, TimeElapsedColumn
from rich.table import Table
from torch import nn

from mnv2_fused import weights
from mnv2_fused.cli import options, output
from mnv2_fused.cli.options import InputError
from mnv2_fused.data import images
from mnv2_fused.explain import explain
from mnv2_fused.freezing import freeze
from mnv2_fused.models.mobilenet_v2 import MobileNetV2
from mnv2_fused.tools import measure

CONTENDERS = ("eager", "eager_channels_last", "fused")


def add(commands: argparse._SubParsersAction) -> None:
    """Declares the command and its options."""
    parser = commands.add_parser(
        "compare",
        help="fused against plain PyTorch on this machine (the default)",
        description="Measures latency, images/s, peak activation memory and the largest difference of the fused "
        "model, frozen, against plain PyTorch (contiguous and channels_last), per batch size and thread count. Needs "
        "no weights: without any it uses random ones with randomised batch-norm statistics.",
    )
    parser.set_defaults(run=run)
    parser.add_argument("--image", metavar="FILE", help="photograph to use as input (default: random numbers)")
    options.add_weights(parser, note=" (default: random)")
    options.add_width(parser, None)
    options.add_resolution(parser, None, "what the weights expect")
    options.add_dtype(parser)
    parser.add_argument(
        "--batch",
        type=options.counts(options.MAX_BATCH),
        default=[1, 8],
        metavar="N[,N...]",
        help="batch sizes (default: 1,8)",
    )
    threads = sorted({1, options.CORES})
    options.add_measuring(parser, threads, f"thread counts (default: {','.join(map(str, threads))})")
    options.add_json(parser)


def run(arguments: argparse.Namespace) -> None:
    """Measures every batch size with every thread count, then prints a table and a summary."""
    output.check_json(arguments.json)
    dtype = options.DTYPES[arguments.dtype]
    models, convention, described = _contenders(arguments, dtype)
    resolution = arguments.resolution or convention.crop
    picture = None
    if arguments.image is not None:
        picture = images.prepare(images.read(arguments.image), convention, resolution)

    console = output.console(arguments)
    facts = measure.environment()
    output.say(
        console,
        f"{described['network']}, {resolution}x{resolution}, {arguments.dtype}; weights: {described['weights']}; "
        f"input: {arguments.image or 'random'}",
    )
    output.say(
        console,
        f"{facts['machine']['cpu']}, {facts['machine']['cpus']} CPUs, {facts['machine']['isa']}; "
        f"torch {facts['versions']['torch']}",
    )
    _warn_of_fallbacks(models["fused"], console)
    cases = [(batch, threads) for batch in arguments.batch for threads in arguments.threads]
    results = []
    columns = ("{task.description}", BarColumn(), "{task.percentage:.0f}%", TimeElapsedColumn())
    with output.progress(None, *columns) as progress:
        task = progress.add_task("measuring", total=len(cases))
        for done, (batch, threads) in enumerate(cases):
            progress.update(task, description=f"batch {batch}, {threads} thread{'s' if threads > 1 else ''}")

            def advance(share: float, done: int = done) -> None:
                progress.update(task, completed=done + share)

            x = _inputs(picture, batch, resolution, dtype, arguments.seed)
            results.append(_measure_case(models, x, threads, arguments.seconds, advance))

    console.print(_comparison_table(results))
    for line in _summary(results):
        output.say(console, line)
    settings = {
        **described,
        "resolution": resolution,
        "dtype": arguments.dtype,
        "input": arguments.image or "random",
        "seed": arguments.seed,
    }
    output.write_json(arguments.json, {**facts, "settings": settings, "results": results})
    if arguments.json not in (None, "-"):
        output.say(console, f"written: {arguments.json}")


def _contenders(
    arguments: argparse.Namespace, dtype: torch.dtype
) -> tuple[dict[str, nn.Module], weights.Convention, dict]:
    """The same network three times, its convention, and what to say of it."""
    if arguments.weights is None:
        width = 1.0 if arguments.width is None else arguments.width
        convention = weights.CONVENTIONS[arguments.convention or "torchvision"]
        torch.manual_seed(arguments.seed)
        plain = MobileNetV2(width_mult=width, fused=False, **convention.network()).eval()
        weights.randomize_batch_norm(plain, arguments.seed)
        origin = "random, with randomised batch-norm statistics"
    else:
        plain, convention = weights.load_model(arguments.weights, convention=arguments.convention, fused=False)
        width = weights.width_mult(plain.state_dict())
        origin = f"{arguments.weights} ({convention.name} convention)"
        if arguments.width not in (None, width):
            raise InputError(f"--width {arguments.width:g} contradicts --weights, whose width is {width:g}")
    plain = plain.to(dtype)
    fused = copy.deepcopy(plain)
    fused.fused = True
    freeze(fused)
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
        output.say(console, f"not fused: {unit}: {reason}", style="yellow")


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
    table = output.table("batch", "threads", "<model", "ms", "images/s", "peak MB", "largest difference")
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
