"""Reduces ncu's counters to those that csrc/cuda/NOTES.md shows: ``python bench/cuda_counters.py NCU_CSV``.

NCU_CSV is gpu_ncu.csv of bench/gpu_session.sh: the raw page, the launches of the network at batch 256. The reduced
table goes to bench/results/counters.csv; ``python bench/cuda_notes.py`` writes it into the notes.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterable
from pathlib import Path

from cuda_tables import markdown

COUNTERS = Path(__file__).resolve().parent / "results" / "counters.csv"
STALL, PER_ISSUE = "smsp__average_warps_issue_stalled_", "_per_issue_active.ratio"
NAMES = {
    "issue slots": "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "warps": "smsp__warps_active.avg.per_cycle_active",
    "shared memory": "l1tex__data_pipe_lsu_wavefronts.avg.pct_of_peak_sustained_elapsed",
    "HBM": "dram__cycles_active.avg.pct_of_peak_sustained_elapsed",
    "tensor cores": "sm__pipe_tensor_op_hmma_cycles_active.avg.pct_of_peak_sustained_elapsed",
}


def reduced(lines: Iterable[str]) -> list[dict[str, str]]:
    """A row for each launch: the counters of NAMES by ncu's names, and the stalls that are not zero."""
    rows = csv.DictReader(line for line in lines if not line.startswith("=="))
    launches = [row for row in rows if row["ID"]]  # the first row has units
    stalls = [name for name in launches[0] if name.startswith(STALL) and name.endswith(PER_ISSUE)]
    stalls = [name for name in stalls if any(float(row[name]) >= 0.01 for row in launches)]
    columns = [*NAMES.values(), *stalls]
    names = [f"block {i}" for i in range(1, len(launches) - 1)] + ["pool", "classify"]
    return [{"launch": name, **{c: row[c] for c in columns}} for name, row in zip(names, launches, strict=True)]


def largest_stalls(row: dict[str, str]) -> str:
    """The three reasons for which a warp waits longest, in cycles for each instruction that its scheduler issues."""
    stalls = {
        name[len(STALL) : -len(PER_ISSUE)].replace("_", " "): float(value)
        for name, value in row.items()
        if name.startswith(STALL)
    }
    del stalls["selected"]
    return ", ".join(f"{name} {stalls[name]:.1f}" for name in sorted(stalls, key=stalls.get, reverse=True)[:3])


def table(launches: list[dict]) -> str:
    """Markdown. launches: those of bench/results/gpu.json, with predicted and measured microseconds."""
    with COUNTERS.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    lines = []
    for row in rows:
        same = [x for x in launches if (x["launch"], x["batch"], x["variant"]) == (row["launch"], 256, "")]
        value = {name: float(row[counter]) for name, counter in NAMES.items()}
        shares = [f"{value[name]:.0f}%" for name in ("shared memory", "HBM", "tensor cores")]
        times = [f"{same[0]['predicted_us']:.1f}", f"{min(x['us'] for x in same):.1f}"]
        cells = [row["launch"], *times, f"{value['issue slots']:.0f}%", f"{value['warps']:.1f}", *shares]
        lines.append([*cells, largest_stalls(row)])
    heads = ["launch", "predicted, us", "measured, us", "issue slots", "warps a scheduler", "shared memory", "HBM"]
    return markdown([*heads, "tensor cores", "largest stalls, cycles an instruction"], lines)


def main(path: str) -> None:
    with Path(path).open(encoding="utf-8", newline="") as file:
        rows = reduced(file)
    with COUNTERS.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main(sys.argv[1])
