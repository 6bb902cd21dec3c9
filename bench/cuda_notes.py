"""Writes the tables of csrc/cuda/NOTES.md: ``python bench/cuda_notes.py [LOG]``.

Predictions are those of ``python -m mnv2_fused plan --device sm_90``, measurements those of bench/results. LOG is
the output of ``nvcc -Xptxas=-v`` for all kernels, as CONTRIBUTING.md shows; - is standard input. Without LOG the table
of registers stays.
"""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tests" / "cuda"))

import cuda_counters  # noqa: E402
import cuda_resources  # noqa: E402
import engines  # noqa: E402
from cuda_tables import BARS, FUSED_GRAPH, NETWORK, launch_tables, markdown  # noqa: E402
from measure_cuda import limit_of  # noqa: E402

from mnv2_fused.cli.gpu_plan import PREDICTION_HEADS, gpu_plan, prediction_rows  # noqa: E402

GPU = ROOT / "bench" / "results" / "gpu.json"
COMPILED = ROOT / "bench" / "results" / "compiled.csv"
NOTES = ROOT / "csrc" / "cuda" / "NOTES.md"


def predictions() -> str:
    """Launch by launch, fp16 on an H200; for blocks that are not joined with a stem also the share of their limit."""
    parts = []
    for batch in (1, 32, 256):
        launches = gpu_plan(1.0, 224, batch, "float16", "sm_90")["launches"]
        parts += [
            f"Batch {batch} (`python -m mnv2_fused plan --device sm_90 --dtype float16 --batch {batch}`):",
            markdown(
                [*PREDICTION_HEADS, "of its limit"],
                [[*row, share(batch, row[0], float(row[-1]))] for row in prediction_rows(launches)],
            ),
        ]
    return "\n\n".join(parts)


def measured() -> str:
    """What each launch took beside the predictions of the kernels that were measured; at batch 256 with counters."""
    launches = json.loads(GPU.read_text(encoding="utf-8"))["launches"]
    few = launch_tables([row for row in launches if row["batch"] < 256])
    return "\n\n".join(["Batch 256:", cuda_counters.table(launches), *few])


def compiled() -> str:
    """The kernels of torch.compile at batch 256, as it timed them while it tuned them, beside the fused launch."""
    launches = json.loads(GPU.read_text(encoding="utf-8"))["launches"]
    fused = {row["launch"]: row["us"] for row in launches if row["batch"] == 256 and not row["variant"]}
    kernels: dict[str, dict[str, float]] = {}
    with COMPILED.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            kernels.setdefault(f"block {row['block']}", {})[row["kernel"]] = float(row["us"])
    rows = [(name, " + ".join(k), sum(k.values()), fused[name]) for name, k in kernels.items()]
    rows.append(("all", "", sum(row[2] for row in rows), sum(row[3] for row in rows)))
    heads = ["launch", "kernels", "their sum, us", "fused, us", "times as long"]
    return markdown(heads, [[*row[:2], f"{row[2]:.1f}", f"{row[3]:.1f}", f"{row[2] / row[3]:.2f}"] for row in rows])


def bars() -> str:
    """The bars of bench/measure_cuda.py for the whole network, beside the predictions."""
    rows = [
        {
            **{"what": NETWORK, "batch": batch, "dtype": "float16"},
            "limit_milliseconds": 1e3 * limit_of(NETWORK, engines.network(), batch),
            "milliseconds": {
                FUSED_GRAPH: sum(
                    launch["predicted_us"] / 1e3 for launch in gpu_plan(1.0, 224, batch, "float16", "sm_90")["launches"]
                )
            },
        }
        for batch in (1, 32, 256)
    ]
    lines = [bar.line(rows) for bar in BARS if bar.what == NETWORK]
    names = ["1.0, 224x224, fp16", "batch", "fused, in a CUDA graph", "wanted on an H200", "predicted"]
    return markdown(names, [["" if cell == "not yet measured" else cell for cell in line] for line in lines])


def share(batch: int, launch: str, us: float) -> str:
    """The limit of bench/measure_cuda.py as a share of that time."""
    known = launch.startswith("block") and launch != "block 1"
    return f"{1e6 * limit_of(launch, engines.network(), batch) / us:.0%}" if known else ""


def resources(log: Iterable[str]) -> str:
    """Registers of a thread: a row for each kernel and variant, a column for each arithmetic, all architectures in a
    cell."""
    kernels = cuda_resources.read(log)
    cells: dict[str, dict[str, dict[str, int]]] = {}
    for kernel, name in zip(kernels, cuda_resources.readable([k.name for k in kernels]), strict=True):
        base, arithmetic, variant = re.fullmatch(r"(?:.*::)?(\w+)<\w+::\w+::(\w+(?:<\w+>)?)\s*(.*)>", name).groups()
        cells.setdefault(base + variant, {}).setdefault(arithmetic, {})[kernel.architecture] = kernel.registers
    arithmetics = list(dict.fromkeys(arithmetic for row in cells.values() for arithmetic in row))
    architectures = sorted({kernel.architecture for kernel in kernels})
    rows = [
        [name, *("/".join(str(row[a][arch]) for arch in architectures) if a in row else "" for a in arithmetics)]
        for name, row in sorted(cells.items(), key=lambda item: cuda_resources.by_number(item[0]))
    ]
    wrong = sum(kernel.leaves_the_registers() for kernel in kernels)
    return "\n\n".join(
        [
            f"Registers a thread on {' and '.join(architectures)}; {len(kernels)} kernels, "
            f"{wrong} with a stack frame or spills:",
            markdown(["kernel", *arithmetics], rows),
        ]
    )


def put(text: str, name: str, content: str) -> str:
    """`text` with `content` between the markers of that name."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, rest = text.split(begin)
    return f"{before}{begin}\n\n{content}\n\n{end}{rest.split(end)[1]}"


def main(arguments: list[str]) -> None:
    text = put(NOTES.read_text(encoding="utf-8"), "predictions", predictions())
    text = put(text, "measured", measured())
    text = put(text, "compiled", compiled())
    text = put(text, "bars", bars())
    for name in arguments:
        log = sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8")
        text = put(text, "resources", resources(log.splitlines()))
    NOTES.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
