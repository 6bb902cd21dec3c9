"""From the benchmarks' JSON to README.md's figures: ``python bench/report.py bench/results/cpu.json``.

Writes the tables between the figures markers of README.md, and the chart beside the JSON file. Needs the extra
``bench``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from tabulate import tabulate

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- figures:begin -->", "<!-- figures:end -->"


def rows_of(results: dict, group: str) -> list[dict]:
    return [row["extra_info"] for row in results["benchmarks"] if row["group"] == group]


def network_table(rows: list[dict]) -> str:
    engines = list(rows[0]["milliseconds"])
    header = ["batch", "threads", *(f"{name}, ms" for name in engines), "FMA limit, ms"]
    header += [f"{name} / {engines[0]}" for name in engines[1:]]
    table = []
    for row in sorted(rows, key=lambda r: (r["threads"], r["batch"])):
        ms, ratio = row["milliseconds"], row["times_as_long"]
        cells = [row["batch"], row["threads"], *(f"{ms[e]:.1f}" for e in engines), f"{row['limit_milliseconds']:.1f}"]
        table.append(cells + [f"{ratio[e]:.1f}x" for e in engines[1:]])
    return tabulate(table, header, tablefmt="github")


def memory_table(rows: list[dict]) -> str:
    engines = list(rows[0]["bytes"])
    table = [
        [row["batch"], *(f"{row['bytes'][e] / 1e6:.1f}" for e in engines), f"{row['share'][engines[0]]:.2f}"]
        for row in rows
    ]
    return tabulate(table, ["batch", *(f"{e}, MB" for e in engines), "share"], tablefmt="github")


def block_table(rows: list[dict]) -> str:
    table = [
        [
            row["block"],
            "x".join(map(str, row["shape"][1:])),
            f"{row['gmacs_per_second']:.1f}",
            f"{row['share_of_peak']:.0%}",
            f"{row['times_as_long']['eager channels_last']:.1f}x",
        ]
        for row in sorted(rows, key=lambda r: r["block"])
    ]
    header = ["block", "input", "fused, GMAC/s", "of the FMA peak", "eager channels_last / fused"]
    return tabulate(table, header, tablefmt="github")


def draw(rows: list[dict], path: Path) -> None:
    """A group of bars for each batch size and thread count: images a second by engine, the FMA limit as a line."""
    rows = sorted(rows, key=lambda r: (r["threads"], r["batch"]))
    engines = list(rows[0]["milliseconds"])
    figure, axes = plt.subplots(figsize=(9, 4), layout="constrained")
    width = 0.8 / len(engines)
    for i, engine in enumerate(engines):
        places = [group + (i - (len(engines) - 1) / 2) * width for group in range(len(rows))]
        axes.bar(places, [1e3 * r["batch"] / r["milliseconds"][engine] for r in rows], width, label=engine)
    for group, row in enumerate(rows):
        limit = 1e3 * row["batch"] / row["limit_milliseconds"]
        axes.hlines(limit, group - 0.42, group + 0.42, colors="black", label="FMA limit" if group == 0 else None)
    axes.set_xticks(
        range(len(rows)), [f"batch {r['batch']}\n{r['threads']} thread{'s'[: r['threads'] - 1]}" for r in rows]
    )
    axes.set_ylabel("images a second")
    axes.set_title("MobileNetV2 1.0, 224x224, fp32")
    axes.margins(y=0.1)
    axes.legend(ncols=len(engines) + 1, loc="upper left")
    axes.set_ylim(top=1.2 * axes.get_ylim()[1])
    figure.savefig(path, dpi=120)


def figures(results: dict, source: Path, chart: Path) -> str:
    environment = results["machine_info"]["mnv2_fused"]
    machine, versions = environment["machine"], environment["versions"]
    name = source.relative_to(ROOT)
    isa = f", {machine['isa']}" if machine["isa"] else ""
    return "\n\n".join(
        [
            BEGIN,
            f"![Images a second by engine]({chart.relative_to(ROOT)})",
            network_table(rows_of(results, "network")),
            "Peak activation memory:",
            memory_table(rows_of(results, "memory")),
            "Block by block, batch 1, one thread:",
            block_table(rows_of(results, "blocks")),
            f"{environment['date'][:10]}, {machine['cpu']}, {machine['cpus']} cores{isa}, torch {versions['torch']}. "
            "Medians of interleaved runs in one process; the FMA limit is the network's multiply-adds at the rate that "
            f"was measured on registers alone. Made by `pytest bench/ --benchmark-only --benchmark-json {name} && "
            f"python bench/report.py {name}`",
            END,
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("results", type=Path, help="what `pytest bench/ --benchmark-only --benchmark-json FILE` wrote")
    source = parser.parse_args().results.resolve()
    results = json.loads(source.read_text(encoding="utf-8"))
    chart = source.with_suffix(".png")
    draw(rows_of(results, "network"), chart)
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    readme.write_text(before + figures(results, source, chart) + rest.split(END)[1], encoding="utf-8")


if __name__ == "__main__":
    main()
