"""From the benchmarks' JSON to README.md's figures: ``python bench/report.py bench/results/*.json``.

Writes the tables between the figures markers of README.md, and the charts beside the first JSON file. Needs the extra
``bench``. What the JSON lacks is left out, but for what is wanted of a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
import measure_cuda

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from tabulate import tabulate

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- figures:begin -->", "<!-- figures:end -->"
PLAIN = "eager channels_last"
CHECKPOINTED = "checkpointed channels_last"

Row = dict
Columns = dict[str, Callable[[Row], object]]


def table(rows: list[Row], columns: Columns) -> str:
    """A row of text for each of `rows`, cut as `columns` say; nothing where there are no rows."""
    cells = [[cell(row) for cell in columns.values()] for row in rows]
    return tabulate(cells, list(columns), tablefmt="github", disable_numparse=True, colglobalalign="right")


def milliseconds(value: float) -> str:
    return f"{value:.{1 if value >= 10 else 2}f}"


def engines_of(rows: list[Row], key: str = "milliseconds") -> list[str]:
    """Every engine that any row has, in the order of measuring."""
    return list(dict.fromkeys(name for row in rows for name in row[key]))


def timed(rows: list[Row]) -> Columns:
    """For each engine its milliseconds, and in brackets how many times as long as the first one it takes."""

    def column(name: str) -> Callable[[Row], str]:
        def cell(row: Row) -> str:
            ms = row["milliseconds"].get(name)
            if ms is None:
                return "missing"
            ratio = "" if name == engines[0] else f" ({row['times_as_long'][name]:.2f}x)"
            return milliseconds(ms) + ratio

        return cell

    engines = engines_of(rows)
    return {f"{name}, ms": column(name) for name in engines}


def at(key: str, form: str = "{}") -> Callable[[Row], str]:
    return lambda row: form.format(row[key])


PEAK: Columns = {"fused, of the FMA peak": at("share_of_peak", "{:.0%}")}


def network(rows: list[Row]) -> str:
    columns = {"batch": at("batch"), "threads": at("threads"), **timed(rows)}
    columns |= {"FMA limit, ms": lambda row: milliseconds(row["limit_milliseconds"]), **PEAK}
    return table(sorted(rows, key=lambda r: (r["threads"], r["batch"])), columns)


def grid(rows: list[Row]) -> str:
    columns = {"width": at("width"), "resolution": at("resolution"), **timed(rows), **PEAK}
    return table(sorted(rows, key=lambda r: (r["width"], r["resolution"])), columns)


def blocks(rows: list[Row]) -> str:
    rows = sorted(rows, key=lambda r: r["block"])
    sums = {name: sum(row["milliseconds"][name] for row in rows) for name in engines_of(rows)}
    ours = next(iter(sums))
    limit = sum(row["limit_milliseconds"] for row in rows)
    macs = sum(row["gmacs_per_second"] * row["milliseconds"][ours] for row in rows)
    total = {
        "block": "all",
        "shape": [],
        "gmacs_per_second": macs / sums[ours],
        "share_of_peak": limit / sums[ours],
        "times_as_long": {name: ms / sums[ours] for name, ms in sums.items()},
    }
    columns = {
        "block": at("block"),
        "input": lambda row: "x".join(map(str, row["shape"][1:])),
        "fused, GMAC/s": at("gmacs_per_second", "{:.1f}"),
        **PEAK,
        f"{PLAIN} / fused": lambda row: f"{row['times_as_long'][PLAIN]:.1f}x",
    }
    return table([*rows, total], columns)


def avx2(rows: list[Row]) -> str:
    total, shares = rows[0]["total"], rows[0]["share_of_peak"]
    return (
        f"The same blocks with the AVX2 kernels: {total['measured_gmacs_per_second']:.1f} GMAC/s and "
        f"{total['share_of_peak']:.0%} of the FMA peak together, {min(shares):.0%} to {max(shares):.0%} one by one."
    )


def scaling(rows: list[Row]) -> str:
    columns = {
        "batch": at("batch"),
        **{f"{name}, ms": (lambda row, n=name: milliseconds(row["milliseconds"][n])) for name in engines_of(rows)},
        "speedup": lambda row: f"{1 / row['times_as_long']['2 threads']:.2f}x",
    }
    return table(sorted(rows, key=lambda r: r["batch"]), columns)


def memory(rows: list[Row]) -> str:
    columns: Columns = {"as seen by": lambda row: row.get("level", "allocator"), "batch": at("batch")}
    for name in engines_of(rows, "bytes"):
        columns[f"{name}, MB"] = lambda row, n=name: f"{row['bytes'][n] / 1e6:.1f}"
    columns["share"] = lambda row: f"{row['share']['fused']:.2f}"
    return table(rows, columns)


def overhead(rows: list[Row]) -> str:
    row = rows[0]
    columns: Columns = {
        "part": lambda part: part,
        "us": lambda part: f"{row['microseconds'][part]:.0f}",
        "of a forward": lambda part: f"{row['share'][part]:.1%}",
    }
    return table(list(row["microseconds"]), columns)


def training(rows: list[Row]) -> str:
    """A line for each batch size and engine; a peer that none of the rows has gets no column."""

    def against(name: str) -> Callable[[Row], str]:
        return lambda row: f"{row['times'][name] / row['time']:.2f}x" if name in row["times"] else "missing"

    engines = engines_of(rows)
    columns: Columns = {
        "batch": at("batch"),
        "engine": at("engine"),
        "ms": lambda row: milliseconds(row["time"]),
        "images/s": lambda row: f"{1e3 * row['batch'] / row['time']:.1f}",
        **{f"against {name}": against(name) for name in (PLAIN, CHECKPOINTED) if name in engines},
        "FMA limit, ms": lambda row: milliseconds(row["limit_milliseconds"]),
        "of the FMA peak": lambda row: f"{row['limit_milliseconds'] / row['time']:.0%}",
    }
    lines = [
        {**row, "engine": engine, "time": time, "times": row["milliseconds"]}
        for row in sorted(rows, key=lambda r: r["batch"])
        for engine, time in row["milliseconds"].items()
    ]
    return table(lines, columns)


def training_memory(rows: list[Row]) -> str:
    """A line for each engine, two columns for each of `rows`."""
    headings = {
        "saved": "saved for the backward (batch {}), MB an image",
        "peak": "peak of a step (batch {}), MB",
    }
    columns: Columns = {"engine": lambda engine: engine}
    for row in sorted(rows, key=lambda r: list(headings).index(r["level"])):
        cells = {name: f"{size / 1e6:.1f}" for name, size in row["bytes"].items()}
        shares = {name: f"{share:.2f}" for name, share in row["share"].items()}
        columns[headings[row["level"]].format(row["batch"])] = lambda engine, c=cells: c.get(engine, "missing")
        columns[f"{row['level']}, share"] = lambda engine, s=shares: s.get(engine, "missing")
    return table(engines_of(rows, "bytes"), columns)


# The group of benchmarks, what stands above its figures, and what makes them of its rows.
SECTIONS: list[tuple[str, str, Callable[[list[Row]], str]]] = [
    ("network", "The whole network, 1.0 at 224x224; in brackets the time relative to fused:", network),
    ("grid", "By width and resolution, batch 1, one thread:", grid),
    ("scaling", "Two threads against one, fused:", scaling),
    (
        "overhead",
        "Beside the kernels, batch 1, one thread (check: that no weight has changed; call: the rest):",
        overhead,
    ),
    ("memory", "Peak activation memory:", memory),
    ("blocks", "Block by block, batch 1, one thread:", blocks),
    ("blocks avx2", "", avx2),
    (
        "training step alone",
        "A training step (forward, loss, backward, SGD with momentum), 1.0 at 224x224 in fp32, two threads, every "
        "engine in processes of its own with the C library's defaults; fused with each setting of `recompute`, "
        'checkpointed: every block by itself. "Against" is how many times as fast. The limit is three forward passes '
        "of multiply-adds:",
        training,
    ),
    ("training frozen alone", "The same of fine-tuning, with the statistics of batch norm fixed:", training),
    ("training forward alone", "Its forward pass alone, with statistics of the batch but no gradients:", training),
    (
        "training step",
        "The same three in one process that keeps the memory it has freed, in turns, so that no engine waits for new "
        "pages. A step:",
        training,
    ),
    ("training frozen", "Fine-tuning:", training),
    ("training forward", "The forward pass alone:", training),
    (
        "training memory",
        f"Memory of a training step; the peak is the process's, above model, optimizer and images; share of {PLAIN}:",
        training_memory,
    ),
]


def rows_of(results: dict, group: str) -> list[Row]:
    return [row["extra_info"] for row in results["benchmarks"] if row["group"] == group]


def missing(results: dict) -> str:
    """Every peer that was not measured somewhere, and why."""
    reasons = {
        f"{name}: {reason}"
        for row in results["benchmarks"]
        for name, reason in row["extra_info"].get("missing", {}).items()
    }
    return "Not measured: " + "; ".join(sorted(reasons)) + "." if reasons else ""


def draw(rows: list[Row], path: Path) -> None:
    """A group of bars for each batch size and thread count: images a second by engine, the FMA limit as a line."""
    rows = sorted(rows, key=lambda r: (r["threads"], r["batch"]))
    engines = engines_of(rows)
    figure, axes = plt.subplots(figsize=(11, 4.5), layout="constrained")
    width = 0.84 / len(engines)
    for i, engine in enumerate(engines):
        bars = [(group, row) for group, row in enumerate(rows) if engine in row["milliseconds"]]
        places = [group + (i - (len(engines) - 1) / 2) * width for group, _ in bars]
        axes.bar(places, [1e3 * r["batch"] / r["milliseconds"][engine] for _, r in bars], width, label=engine)
    for group, row in enumerate(rows):
        limit = 1e3 * row["batch"] / row["limit_milliseconds"]
        axes.hlines(limit, group - 0.44, group + 0.44, colors="black", label="FMA limit" if group == 0 else None)
    axes.set_xticks(
        range(len(rows)), [f"batch {r['batch']}\n{r['threads']} thread{'s'[: r['threads'] - 1]}" for r in rows]
    )
    axes.set_ylabel("images a second")
    axes.set_title("MobileNetV2 1.0, 224x224, fp32")
    axes.legend(ncols=4, loc="upper left")
    axes.set_ylim(top=1.3 * axes.get_ylim()[1])
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_training(steps: list[Row], peaks: list[Row], path: Path) -> None:
    """Bars by engine: a step of the largest batch, with the FMA limit as a line, and its peak in the process."""
    panels = []
    if steps:
        row = max(steps, key=lambda r: r["batch"])
        panels.append((f"a step of {row['batch']} images, ms", row["milliseconds"], row["limit_milliseconds"]))
    for row in peaks:
        sizes = {name: size / 1e6 for name, size in row["bytes"].items()}
        panels.append((f"peak memory of {row['batch']} images, MB", sizes, None))
    figure, several = plt.subplots(1, len(panels), figsize=(11, 3.5), layout="constrained", squeeze=False)
    for axes, (label, values, limit) in zip(several[0], panels, strict=True):
        colors = ["C0" if name.startswith("fused") else "C1" for name in values]
        bars = axes.barh(list(values), list(values.values()), color=colors)
        axes.bar_label(bars, fmt="%.0f", padding=3)
        axes.margins(x=0.15)
        axes.invert_yaxis()
        axes.set_xlabel(label)
        if limit is not None:
            axes.axvline(limit, color="black", label="FMA limit")
            axes.legend()
    figure.suptitle("Training MobileNetV2 1.0, 224x224, fp32")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def provenance(results: dict) -> str:
    """Date, machine, versions and command of one file of results."""
    environment = results["machine_info"]["mnv2_fused"]
    machine, versions = environment["machine"], environment["versions"]
    isa = f", {machine['isa']}" if machine["isa"] else ""
    packages = ("torch", "onnxruntime", "openvino")
    return (
        f"{environment['date'][:10]}, {machine['cpu']}, {machine['cpus']} cores{isa}, "
        + ", ".join(f"{package} {versions[package]}" for package in packages if package in versions)
        + f": `{environment['command']}`."
    )


def cuda(files: list[dict]) -> list[str]:
    """What bench/measure_cuda.py wrote, a GPU after the other; without any, what is wanted."""
    if not files:
        return ["On a GPU (`bash bench/gpu_session.sh` measures it):", measure_cuda.bars([])]
    parts = []
    for results in files:
        gpu, versions = results["gpu"], results["versions"]
        commands = ", ".join(f"`{command}`" for command in results["commands"])
        parts += [
            f"On a GPU, {gpu['name']}; times are those of a call, in brackets relative to fused in a CUDA graph, and "
            "the limit is that of an H200:",
            measure_cuda.bars(results["rows"]),
            measure_cuda.table(results["rows"]).strip(),
            f"{results['date'][:10]}, {gpu['name']}, driver {gpu['driver, clock, power']}, torch {versions['torch']}, "
            f"CUDA {gpu['cuda']}: {commands}.",
        ]
    return parts


def figures(
    files: list[dict], sources: list[str], chart: str, training_chart: str | None, gpus: Sequence[dict] = ()
) -> str:
    """Everything between the markers; `sources` and the charts as the README is to name them."""
    results = joined(files)
    parts = [f"![Images a second by engine]({chart})"] if rows_of(results, "network") else []
    for group, heading, section in SECTIONS:
        if rows := rows_of(results, group):
            if group.startswith("training") and training_chart:
                parts.append(f"![A training step by engine: time and memory]({training_chart})")
                training_chart = None
            parts += [heading, section(rows)]
    parts += [
        *cuda(list(gpus)),
        missing(results),
        "Medians of interleaved runs, in one process where nothing else is said; the FMA limit is the multiply-adds at "
        "the rate that was measured on registers alone.",
        *map(provenance, files),
        f"Written here by `python bench/report.py {' '.join(sources)}`.",
    ]
    return "\n\n".join([BEGIN, *filter(None, parts), END])


def joined(files: list[dict]) -> dict:
    return {"benchmarks": [row for results in files for row in results["benchmarks"]]}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "results",
        type=Path,
        nargs="+",
        help="what `pytest bench/ --benchmark-only --benchmark-json FILE` or bench/gpu_session.sh wrote",
    )
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", help="file to write to (default: README.md)")
    options = parser.parse_args(arguments)
    contents = [json.loads(path.read_text(encoding="utf-8")) for path in options.results]
    files, gpus = ([content for content in contents if ("gpu" in content) is gpu] for gpu in (False, True))
    results = joined(files)
    chart = options.results[0].with_suffix(".png")
    if rows := rows_of(results, "network"):
        draw(rows, chart)
    steps = rows_of(results, "training step alone") or rows_of(results, "training step")
    peaks = [row for row in rows_of(results, "training memory") if row["level"] == "peak"]
    training_chart = options.results[0].with_name("training.png") if steps or peaks else None
    if training_chart:
        draw_training(steps, peaks, training_chart)
    before, rest = options.readme.read_text(encoding="utf-8").split(BEGIN)
    *sources, chart_name, training_name = [
        path and os.path.relpath(path, options.readme.parent) for path in (*options.results, chart, training_chart)
    ]
    text = figures(files, sources, chart_name, training_name, gpus)
    options.readme.write_text(before + text + rest.split(END)[1], encoding="utf-8")


if __name__ == "__main__":
    main()
