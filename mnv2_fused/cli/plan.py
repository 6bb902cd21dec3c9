"""`plan`: how every block is cut into tiles, and how fast it should be and is."""

from __future__ import annotations

import argparse

import torch
from rich.table import Table

from mnv2_fused import _C
from mnv2_fused.cli import gpu_plan, options, output
from mnv2_fused.models.mobilenet_v2 import MobileNetV2
from mnv2_fused.tools import measure, rates


def add(commands: argparse._SubParsersAction) -> None:
    """Declares the command and its options."""
    parser = commands.add_parser(
        "plan",
        help="how every block is cut into tiles, on this machine or on a GPU",
        description="Prints the tile plan of every block on this machine: what is computed at a time, by how many "
        "tasks, in how much scratch memory. --measure adds how fast each block should be, and is. --device prints the "
        "plan of a GPU instead; the GPU need not be there.",
    )
    parser.set_defaults(run=run)
    options.add_width(parser, 1.0)
    options.add_resolution(parser, 224, "224")
    options.add_dtype(parser)
    parser.add_argument(
        "--output-stride",
        type=int,
        choices=[8, 16, 32],
        default=32,
        help="strides beyond it become dilations, as in a segmentation's backbone (default: 32)",
    )
    parser.add_argument(
        "--batch", type=options.count(options.MAX_BATCH), default=1, metavar="N", help="batch size (default: 1)"
    )
    options.add_threads(parser)
    parser.add_argument(
        "--device", choices=["cpu", *gpu_plan.GPUS], default="cpu", help="sm_80: A100, sm_90: H200 (default: cpu)"
    )
    parser.add_argument(
        "--tf32",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="float32 on a GPU: products in TF32, PyTorch's own default for convolutions (default: yes)",
    )
    parser.add_argument(
        "--measure", action="store_true", help="also run each block alone: GMAC/s, and share of the peak on registers"
    )
    options.add_json(parser)


def run(arguments: argparse.Namespace) -> None:
    """Prints the plan of every block and of the network."""
    output.check_json(arguments.json)
    if arguments.device != "cpu":
        return gpu_plan.run(arguments)
    model = MobileNetV2(width_mult=arguments.width, output_stride=arguments.output_stride).eval()
    rows = []
    for shape in rates.block_shapes(model, arguments.resolution):
        given = rates.plan_arguments(shape, arguments.batch)
        plan = _C.cpu_plan(*given, threads=arguments.threads, dtype=arguments.dtype)
        rows.append({**shape, "plan": plan})
    content: dict = {"blocks": rows, "network": _network_plan(model, arguments)}
    if arguments.measure:
        content["total"] = _measure_blocks(model, rows, arguments)
    console = output.console(arguments, least_width=168)
    first = rows[0]["plan"]
    output.say(
        console,
        f"MobileNetV2 {arguments.width}, {arguments.resolution}x{arguments.resolution}, output stride "
        f"{arguments.output_stride}, batch {arguments.batch}, {arguments.threads} "
        f"thread{'s' if arguments.threads > 1 else ''}, {arguments.dtype}; {first['isa']}, "
        f"L1 {first['l1'] // 1024} KiB, L2 {first['l2'] // 1024} KiB, chunks of {first['chunk']} hidden channels",
    )
    console.print(_plan_table(rows))
    output.say(
        console,
        "rows: filtered at a time; strips, columns: strips of rows times column strips of an image; halo: rows or "
        "columns that two neighbouring strips both expand; scratch: of one task; shared: of all; MMACs: millions of "
        "multiply-adds of one image; + x: adds its input",
    )
    output.say(console, _network_line(content["network"]))
    if arguments.measure:
        console.print(_rate_table(rows, content["total"]))
        output.say(
            console,
            "measured: each block's operator alone, median; the peak: "
            f"{content['total']['peak_gmacs_per_second']:.1f} GMAC/s of multiply-adds on registers, measured beside it",
        )
    settings = {
        key: getattr(arguments, key) for key in ("width", "resolution", "output_stride", "batch", "threads", "dtype")
    }
    output.write_json(arguments.json, {**measure.environment(), "settings": settings, **content})


def _plan_table(rows: list[dict]) -> Table:
    first = rows[0]["plan"]
    apart = ("isa", "l1", "l2", "chunk", "h_out", "w_out", "macs")
    shown = [key for key in first if key not in apart]
    names = [key.replace("_bytes", " KiB").replace("_", " ") for key in shown]
    table = output.table("<block", "<input", "hidden", "<output", *names, "MMACs")
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
    return table


def _network_plan(model: MobileNetV2, arguments: argparse.Namespace) -> dict:
    size, texts = (
        (arguments.batch, arguments.resolution, arguments.resolution, 3),
        rates.network_spec(model).flat().arguments,
    )
    return _C.cpu_network_plan(size, *texts, threads=arguments.threads, dtype=arguments.dtype)


def _network_line(plan: dict) -> str:
    text = (
        f"the network in one operator: stem {'fused into' if plan['fused_stem'] else 'before'} the first block, "
        f"arena {plan['arena_bytes'] / 2**20:.1f} MiB"
    )
    if plan["steps_for_a_few_images"]:
        text += (
            f", {plan['images_at_a_time']} images at a time through the first {plan['steps_for_a_few_images']} "
            f"of {plan['steps']} steps"
        )
    return text


def _measure_blocks(model: MobileNetV2, rows: list[dict], arguments: argparse.Namespace) -> dict:
    """Adds predicted and measured rates to every row, and returns the rates of all blocks together."""
    model.to(options.DTYPES[arguments.dtype])
    generator = torch.Generator().manual_seed(0)
    with measure.threads(arguments.threads), torch.inference_mode():
        peak = _C.cpu_fma_peak()
        for row in rows:
            x = torch.rand(arguments.batch, row["c_in"], row["h"], row["w"], generator=generator)
            x = x.to(options.DTYPES[arguments.dtype], memory_format=torch.channels_last)
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
    table = output.table("<block", "MMACs", "predicted GMAC/s", "measured GMAC/s", "of the peak")
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
