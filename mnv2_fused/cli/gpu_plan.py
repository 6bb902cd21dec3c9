"""A GPU's plan of a network, and the times that are predicted for it: `plan --device`. The GPU need not be there."""

from __future__ import annotations

import argparse
from typing import NamedTuple

from rich.table import Table

from mnv2_fused import _C
from mnv2_fused.cli import output
from mnv2_fused.cli.options import InputError
from mnv2_fused.models.mobilenet_v2 import MobileNetV2
from mnv2_fused.tools import measure, rates


class Gpu(NamedTuple):
    """A GPU that times are predicted for."""

    name: str
    clock: float  # cycles a second
    memory: float  # bytes a second


# A100: clock and bandwidth are the boost clock and the peak of its data sheet. H200: the clock at which its data sheet
# counts 989 TFLOP/s in 16 bits, and the bandwidth of a measured copy.
GPUS = {"sm_80": Gpu("A100 80GB", 1.41e9, 2.039e12), "sm_90": Gpu("H200", 1.83e9, 4.3e12)}
PARTS = {"hbm": "HBM", "tensor": "tensor cores", "shared": "shared memory", "issue": "instructions"}
PREDICTION_HEADS = ["launch", *(f"{name}, us" for name in PARTS.values()), "binds, share", "predicted, us"]


def gpu_plan(
    width: float,
    resolution: int,
    batch: int,
    dtype: str,
    device: str,
    tf32: bool = True,
    output_stride: int = 32,
) -> dict:
    """The result of `_C.cuda_network_plan` for a MobileNetV2, with three more entries for each launch.

    `us` has the microseconds that each of `PARTS` would need alone, `binds` the part that needs most, and
    `predicted_us` the predicted time of the launch. `device` is a key of `GPUS`.
    """
    gpu = GPUS[device]
    model = MobileNetV2(width_mult=width, output_stride=output_stride).eval()
    texts = rates.network_spec(model).flat().arguments
    plan = _C.cuda_network_plan((batch, resolution, resolution, 3), *texts, dtype, device, exact=not tf32)
    for launch in plan["launches"]:
        us = {part: 1e6 * launch[f"{part}_cycles"] / gpu.clock for part in PARTS if part != "hbm"}
        us["hbm"] = 1e6 * launch["memory_bytes"] / gpu.memory
        launch["us"] = {part: us[part] for part in PARTS}
        launch["binds"] = max(us, key=us.__getitem__)
        launch["predicted_us"] = max(1e6 * launch["cycles"] / gpu.clock, *us.values())
    return plan


def prediction_rows(launches: list[dict]) -> list[list[str]]:
    """Rows of text under `PREDICTION_HEADS`: one for each launch of a `gpu_plan`, and one for their sum."""
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


def run(arguments: argparse.Namespace) -> None:
    """Prints the plan of the GPU that --device names, and the predicted times."""
    if arguments.measure:
        raise InputError("--measure needs --device cpu: a GPU's plan is only a prediction")
    names = ("width", "resolution", "output_stride", "batch", "dtype", "device", "tf32")
    settings = {key: getattr(arguments, key) for key in names}
    gpu, device, plan = GPUS[arguments.device], _C.cuda_device(arguments.device), gpu_plan(**settings)
    if not plan["fits"]:
        raise InputError(f"a block of this network has no tile that fits into {arguments.device}'s shared memory")
    console = output.console(arguments, least_width=130)
    arithmetic = arguments.dtype + (", TF32" if arguments.tf32 and arguments.dtype == "float32" else "")
    output.say(
        console,
        f"MobileNetV2 {arguments.width}, {arguments.resolution}x{arguments.resolution}, output stride "
        f"{arguments.output_stride}, batch {arguments.batch}, {arithmetic}; {arguments.device} ({gpu.name}): "
        f"{device['multiprocessors']} multiprocessors at "
        f"{gpu.clock / 1e9:.2f} GHz, {device['shared_block_bytes'] // 1024} KiB of shared memory for a thread block, "
        f"{gpu.memory / 1e12:.1f} TB/s",
    )
    console.print(_launch_table(plan["launches"]))
    output.say(
        console,
        "tile, images: output of a thread block; rounds: of them, one after the other; splits: of the hidden channels; "
        "parts: of the output channels; "
        "blocks: thread blocks in all; at once: thread blocks on a multiprocessor; + x: adds its input",
    )
    output.say(
        console,
        f"the network in one operator: stem {'joined with' if plan['joined'] else 'before'} the first block, "
        f"{len(plan['launches'])} launches, {plan['memory_bytes'] / 2**20:.1f} MiB of memory beside input, output and "
        f"{plan['packed_bytes'] / 2**20:.1f} MiB of weights",
    )
    console.print(_prediction_table(plan["launches"]))
    output.say(
        console,
        "Predictions, not measurements. Columns in us: the time that a launch needs on one part of the GPU alone "
        "(bytes of its memory, products, bytes of shared memory, instructions). binds: the slowest part, and its share "
        "of the predicted time. The rest is waiting and idle multiprocessors.",
    )
    output.write_json(arguments.json, {**measure.environment(), "settings": settings, "gpu": gpu._asdict(), **plan})


def _launch_table(launches: list[dict]) -> Table:
    shape = ("<input", "hidden", "<output", "tile", "images", "rounds", "splits", "parts")
    table = output.table("<launch", *shape, "threads", "blocks", "at once", "shared KiB")
    for launch in launches:
        cells = [""] * len(shape)
        if "tile_h" in launch:
            cells = [
                "x".join(map(str, launch["input"])),
                str(launch["hidden"]),
                "x".join(map(str, launch["output"])) + (" + x" if launch["residual"] else ""),
                f"{launch['tile_h']}x{launch['tile_w']}",
                *(str(launch[key]) for key in ("images", "rounds", "splits", "column_parts")),
            ]
        x, y, z = launch["grid"]
        once = str(launch.get("blocks_at_once", ""))
        shared = f"{launch['shared_bytes'] / 1024:.1f}"
        table.add_row(launch["name"], *cells, str(launch["threads"]), str(x * y * z), once, shared)
    return table


def _prediction_table(launches: list[dict]) -> Table:
    table = output.table("<launch", *PREDICTION_HEADS[1:])
    *rows, total = prediction_rows(launches)
    for row in rows:
        table.add_row(*row, end_section=row is rows[-1])
    table.add_row(*total)
    return table
