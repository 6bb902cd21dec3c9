"""Writes docs/figures.md and the table in README.md: ``python bench/report.py bench/results/*.json``.

docs/figures.md is written whole. README.md gets one chart and six rows between its figures markers. The charts are
saved beside the first JSON file. Rows that were not measured are left out, except the goals for a GPU. Needs the extra
``bench``.
"""

from __future__ import annotations

import argparse
import json
import os
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import charts
import cuda_tables
from tabulate import tabulate

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- figures:begin -->", "<!-- figures:end -->"
OURS, OURS_TRAINING = "fused", "fused balanced"  # balanced is the default of `recompute`
PLAIN = "eager channels_last"
CHECKPOINTED = "checkpointed channels_last"
PEERS = ("ONNX Runtime", "OpenVINO")
PACKAGES = ("onnxruntime", "openvino")  # versions that are reported

Row = dict
Columns = dict[str, Callable[..., object]]


def table(rows: Sequence, columns: Columns, first: str = "right") -> str:
    """Markdown: a line for each of `rows`, a cell for each of `columns`. `first` is the first column's alignment."""
    cells = [[cell(row) for cell in columns.values()] for row in rows]
    align = (first, *["right"] * (len(columns) - 1))
    return tabulate(cells, list(columns), tablefmt="github", disable_numparse=True, colalign=align)


def milliseconds(value: float) -> str:
    return f"{value:.{1 if value >= 10 else 2}f}"


def engines_of(rows: list[Row], key: str = "milliseconds") -> list[str]:
    """The engines in `rows`, in the order of measurement."""
    return list(dict.fromkeys(name for row in rows for name in row[key]))


def timed(rows: list[Row]) -> Columns:
    """A column for each engine: milliseconds and, in brackets, their ratio to the first engine's."""

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
    """A line for each batch size and engine, with a column for each peer that was measured."""

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


def tasks(rows: list[Row]) -> str:
    columns = {"network": at("network"), "threads": at("threads"), **timed(rows)}
    columns |= {"FMA limit, ms": lambda row: milliseconds(row["limit_milliseconds"]), **PEAK}
    return table(sorted(rows, key=lambda r: (r["network"], r["threads"])), columns, first="left")


def tasks_memory(rows: list[Row]) -> str:
    columns: Columns = {"network": at("network")}
    for name in engines_of(rows, "bytes"):

        def cell(row: Row, name: str = name) -> str:
            return f"{row['bytes'][name] / 1e6:.1f} ({row['share'][name]:.2f})" if name in row["bytes"] else ""

        columns[f"{name}, MB"] = cell
    return table(rows, columns, first="left")


def tasks_training(rows: list[Row]) -> str:
    columns = {"network": at("network"), "batch": at("batch"), "threads": at("threads"), **timed(rows)}
    for name in engines_of(rows, "saved"):
        columns[f"{name}, saved, MB an image"] = lambda row, n=name: f"{row['saved'][n] / row['batch'] / 1e6:.1f}"
    columns["share"] = lambda row: f"{row['saved'][OURS] / row['saved'][PLAIN]:.2f}"
    return table(rows, columns, first="left")


class Section(NamedTuple):
    """The figures of one group of benchmarks."""

    group: str
    heading: str  # above the figures; may be empty
    write: Callable[[list[Row]], str]


INFERENCE = (
    Section("network", "The whole network, 1.0 at 224x224. In brackets: the time relative to fused.", network),
    Section("grid", "By width and resolution, batch 1, one thread:", grid),
    Section("scaling", "Two threads against one, fused:", scaling),
    Section(
        "overhead",
        "Time outside the kernels, batch 1, one thread. *check* is the check that no weight has changed, *call* is "
        "everything else.",
        overhead,
    ),
    Section(
        "graphs",
        "The same network in graphs, batch 1, one thread. In brackets: the time relative to eager.",
        lambda rows: table(rows, timed(rows)),
    ),
    Section("memory", "Peak activation memory:", memory),
    Section("blocks", "Block by block, batch 1, one thread:", blocks),
    Section("blocks avx2", "", avx2),
)
TASKS = (
    Section(
        "tasks",
        "One image, without boxes and their suppression; DeepLabv3 has output stride 16 and resizes its logits to the "
        "image. In brackets: the time relative to fused.",
        tasks,
    ),
    Section("tasks memory", "Peak activation memory; in brackets the share of plain PyTorch's:", tasks_memory),
    Section(
        "tasks training",
        "A training step in one process that keeps freed memory, and what its forward saves for the backward:",
        tasks_training,
    ),
)
TRAINING = (
    Section(
        "training step",
        "A step is forward, loss, backward and SGD with momentum; 1.0 at 224x224 in fp32 on two threads. *fused* comes "
        "with each setting of `recompute`; *checkpointed* recomputes every block by itself. The limit is three forward "
        "passes of multiply-adds.\n\n"
        "### All engines in one process that keeps freed memory\n\n"
        "The engines run in turns, and none waits for new pages. This is plain PyTorch at its best. A step:",
        training,
    ),
    Section("training frozen", "Fine-tuning, with the statistics of batch norm fixed:", training),
    Section("training forward", "The forward pass alone, with statistics of the batch but no gradients:", training),
    Section(
        "training step alone",
        "### Every engine in processes of its own, with the C library's defaults\n\n"
        "This is what a script sees by default. The C library returns freed memory to the system, and plain PyTorch "
        "waits for new pages at every step. A step:",
        training,
    ),
    Section("training frozen alone", "Fine-tuning:", training),
    Section("training forward alone", "The forward pass alone:", training),
    Section(
        "training memory",
        f"### Memory of a step\n\nThe peak is the process's, above model, optimizer and images. Shares are of {PLAIN}.",
        training_memory,
    ),
)


def rows_of(results: dict, group: str) -> list[Row]:
    return [row["extra_info"] for row in results["benchmarks"] if row["group"] == group]


def missing(results: dict) -> str:
    """Every peer that some benchmark could not measure, and why."""
    reasons = {
        f"{name}: {reason}"
        for row in results["benchmarks"]
        for name, reason in row["extra_info"].get("missing", {}).items()
    }
    return "Not measured: " + "; ".join(sorted(reasons)) + "." if reasons else ""


def machine(results: dict) -> str:
    """Date, machine and versions of one file of results."""
    environment = results["machine_info"]["mnv2_fused"]
    machine, versions = environment["machine"], environment["versions"]
    parts = [environment["date"][:10], machine["cpu"], f"{machine['cpus']} cores", machine["isa"]]
    parts += [f"{package} {versions[package]}" for package in ("torch", *PACKAGES) if package in versions]
    return ", ".join(filter(None, parts))


def provenance(results: dict) -> str:
    """`machine`, and the command that measured."""
    return f"{machine(results)}: `{results['machine_info']['mnv2_fused']['command']}`."


# ------------------------------------------------------------------------------------------------ docs/figures.md


def cuda(files: Sequence[dict]) -> list[str]:
    """The figures of bench/measure_cuda.py, GPU after GPU; the goals alone if there are none."""
    if not files:
        return ["Not measured yet. `bash bench/gpu_session.sh` measures:", cuda_tables.bars([])]
    parts = []
    for results in files:
        gpu, versions = results["gpu"], results["versions"]
        commands = ", ".join(f"`{command}`" for command in results["commands"])
        parts += [
            f"{gpu['name']}. Times are of one call, in brackets relative to fused in a CUDA graph. The limit is an "
            "H200's.",
            cuda_tables.bars(results["rows"]),
            cuda_tables.table(results["rows"]).strip(),
            f"{results['date'][:10]}, {gpu['name']}, driver {gpu['driver, clock, power']}, torch {versions['torch']}, "
            f"CUDA {gpu['cuda']}: {commands}.",
        ]
    return parts


def sections(results: dict, chosen: Iterable[Section]) -> list[str]:
    """Headings and figures of the sections that were measured."""
    found = [(section, rows_of(results, section.group)) for section in chosen]
    return [part for section, rows in found if rows for part in (section.heading, section.write(rows))]


def figures(
    files: list[dict], gpus: Sequence[dict], sources: list[str], chart: str | None, training_chart: str | None
) -> str:
    """The text of docs/figures.md. `sources` and the charts are paths relative to that file."""
    results = joined(files)
    inference, tasks, training = (sections(results, chosen) for chosen in (INFERENCE, TASKS, TRAINING))
    parts = [
        "# Figures",
        f"Written by `python bench/report.py {' '.join(sources)}`; CONTRIBUTING.md says how to measure. Times are "
        "medians. Engines take turns in one process unless a section says otherwise. The FMA limit is the time of the "
        "multiply-adds alone, at the rate measured on registers.",
        *map(provenance, files),
        missing(results),
        inference and "## Inference",
        chart and f"![Images a second by engine]({chart})",
        *inference,
        tasks and "## Detection and segmentation",
        *tasks,
        training and "## Training",
        training_chart and f"![A training step by engine: time and memory]({training_chart})",
        *training,
        "## GPU",
        *cuda(gpus),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


# ------------------------------------------------------------------------------------------------------ README.md


class Line(NamedTuple):
    """A row of the README's table: `values` by engine, and the name of our engine."""

    name: str
    threads: int
    values: dict[str, float]
    ours: str

    def cell(self, engine: str) -> str:
        """The value with its ratio to ours; empty if the engine was not measured."""
        value = self.values.get(engine)
        if value is None:
            return ""
        text = f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"
        return text if engine == self.ours else f"{text} ({value / self.values[self.ours]:.2f}x)"


def lines(results: dict) -> list[Line]:
    """The six rows: inference at three batch sizes, and at the largest batch a training step, measured in two ways, and
    its memory.
    """
    found = []
    networks = rows_of(results, "network")
    threads = max((row["threads"] for row in networks), default=0)
    for row in sorted(networks, key=lambda r: r["batch"]):
        if row["threads"] == threads and row["batch"] in (1, 8, 32):
            found.append(Line(f"inference, batch {row['batch']}, ms", threads, row["milliseconds"], OURS))
    for group, how in (("training step", "freed memory kept"), ("training step alone", "C library's defaults")):
        if rows := [row for row in rows_of(results, group) if OURS_TRAINING in row["milliseconds"]]:
            row = max(rows, key=lambda r: r["batch"])
            name = f"training step, batch {row['batch']}, {how}, ms"
            found.append(Line(name, row["threads"], row["milliseconds"], OURS_TRAINING))
    for row in rows_of(results, "training memory"):
        if row["level"] == "peak" and OURS_TRAINING in row["bytes"]:
            sizes = {name: size / 1e6 for name, size in row["bytes"].items()}
            name = f"peak memory of a training step, batch {row['batch']}, MB"
            found.append(Line(name, row["threads"], sizes, OURS_TRAINING))
    return found


def spread(results: dict) -> str:
    """A sentence with the range of every peer's ratio over all widths and resolutions."""
    rows = rows_of(results, "grid")
    ratios = {name: [row["times_as_long"][name] for row in rows if name in row["times_as_long"]] for name in PEERS}
    texts = [f"{min(r):.2f} to {max(r):.2f} for {name}" for name, r in ratios.items() if r]
    if not texts:
        return ""
    widths, resolutions = ({row[key] for row in rows} for key in ("width", "resolution"))
    return (
        f"Over widths {min(widths)} to {max(widths)} and resolutions {min(resolutions)} to {max(resolutions)} "
        f"(batch 1, one thread) the time relative to mnv2_fused is {' and '.join(texts)}. Below 1 the peer is faster."
    )


def summary(files: list[dict], chart: str | None, details: str) -> str:
    """The README's chart and table; empty if neither inference nor training was measured."""
    results = joined(files)
    rows = lines(results)
    if not rows:
        return ""
    threads = " or ".join(str(n) for n in sorted({line.threads for line in rows}))
    columns = {
        f"MobileNetV2 1.0, 224x224, fp32, {threads} threads": lambda line: line.name,
        "mnv2_fused": lambda line: line.cell(line.ours),
        "PyTorch": lambda line: line.cell(PLAIN),
        "PyTorch, checkpointed": lambda line: line.cell(CHECKPOINTED),
        **{name: (lambda line, n=name: line.cell(n)) for name in PEERS},
    }
    measured = machines(files)
    parts = [
        chart and f"![Images a second by engine]({chart})",
        table(rows, columns, first="left"),
        textwrap.fill(spread(results), 120),
        textwrap.fill(f"{'; '.join(measured)}. [All figures and their commands]({details}).", 120),
    ]
    return "\n\n".join(filter(None, parts))


def machines(files: list[dict]) -> list[str]:
    """`machine` of each file that the README and the charts show, without repetitions."""
    return list(dict.fromkeys(machine(results) for results in files if lines(results)))


def insert(path: Path, text: str) -> None:
    """Puts `text` between the markers of the file at `path`."""
    before, begin, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"report.py: {path} must hold the markers {BEGIN} and {END}")
    path.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}", encoding="utf-8")


def joined(files: list[dict]) -> dict:
    return {"benchmarks": [row for results in files for row in results["benchmarks"]]}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "results",
        type=Path,
        nargs="+",
        help="JSON of `pytest bench/ --benchmark-only --benchmark-json FILE` or of bench/gpu_session.sh",
    )
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", help="file with markers to write between")
    parser.add_argument("--figures", type=Path, default=ROOT / "docs" / "figures.md", help="file to write whole")
    options = parser.parse_args(arguments)
    contents = [json.loads(path.read_text(encoding="utf-8")) for path in options.results]
    files, gpus = ([content for content in contents if ("gpu" in content) is gpu] for gpu in (False, True))
    results, note = joined(files), "; ".join(machines(files))
    chart = training_chart = None
    if rows := rows_of(results, "network"):
        chart = options.results[0].with_suffix(".png")
        charts.draw_inference(rows, chart, note)
    steps = rows_of(results, "training step")
    peaks = [row for row in rows_of(results, "training memory") if row["level"] == "peak"]
    if steps or peaks:
        training_chart = options.results[0].with_name("training.png")
        charts.draw_training(steps, peaks, training_chart, note)

    def seen_from(page: Path, path: Path | None) -> str | None:
        return path and Path(os.path.relpath(path, page.parent)).as_posix()

    pictures = [seen_from(options.figures, path) for path in (chart, training_chart)]
    sources = [Path(os.path.relpath(path, ROOT)).as_posix() for path in options.results]
    options.figures.write_text(figures(files, gpus, sources, *pictures), encoding="utf-8")
    if text := summary(files, seen_from(options.readme, chart), seen_from(options.readme, options.figures)):
        insert(options.readme, text)


if __name__ == "__main__":
    main()
