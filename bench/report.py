"""Writes docs/figures.md and the table in README.md: ``python bench/report.py bench/results/*.json``.

docs/figures.md is written whole. README.md gets one chart and seven rows between its figures markers. The charts are
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
from cpu_tables import (
    CHECKPOINTED,
    FROZEN,
    PLAIN,
    Row,
    avx2,
    blocks,
    engines_of,
    grid,
    latency,
    memory,
    network,
    overhead,
    scaling,
    serving,
    table,
    tasks,
    tasks_memory,
    tasks_training,
    timed,
    training,
    training_memory,
)

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- figures:begin -->", "<!-- figures:end -->"
OURS_TRAINING = "fused balanced"  # balanced is the default of `recompute`
PEERS = ("ONNX Runtime", "OpenVINO", "LiteRT")
PACKAGES = ("onnxruntime", "openvino", "ai-edge-litert")  # versions that are reported


class Section(NamedTuple):
    """The figures of one group of benchmarks."""

    group: str
    heading: str  # above the figures; may be empty
    write: Callable[[list[Row]], str]


INFERENCE = (
    Section(
        "network",
        "The whole network, 1.0 at 224x224 in fp32. *Live* looks at every call whether a weight has changed, *frozen* "
        "does not; no peer does. In brackets: the time relative to the first engine.",
        network,
    ),
    Section(
        "grid",
        "By width, resolution and batch. The last columns compare with the fastest peer: above 1 fused is faster.",
        grid,
    ),
    Section(
        "serving",
        "Images a second with callers in threads of one process, each with one image at a time. In brackets: relative "
        "to the first engine. OpenVINO has the hint LATENCY for one caller, and THROUGHPUT with as many requests as "
        "callers for several.",
        serving,
    ),
    Section(
        "latency",
        "Latency on two threads, median / 99th percentile in ms, by the number of other processes that keep a "
        "processor busy:",
        latency,
    ),
    Section("scaling", "Two threads against one, fused:", scaling),
    Section(
        "overhead",
        "Time outside the kernels, batch 1, one thread. *check* is the check that no weight has changed, *call* is "
        "everything else.",
        overhead,
    ),
    Section(
        "graphs",
        "The same network in graphs, batch 1, one thread. In brackets: the time relative to the live model, eager.",
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
            f"CUDA {gpu['cuda']}{of_commit(results)}: {commands}.",
        ]
    return parts


def of_commit(results: dict) -> str:
    """Which kernels were measured, if the file of results says so."""
    return f", kernels of commit {results['commit']}" if "commit" in results else ""


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
    """The seven rows: inference at three batch sizes; a training step at the least and the largest batch, and at that
    measured in another way; its memory.
    """
    found = []
    networks = rows_of(results, "network")
    threads = max((row["threads"] for row in networks), default=0)
    for row in sorted(networks, key=lambda r: r["batch"]):
        if row["threads"] == threads and row["batch"] in (1, 8, 32):
            ours = engines_of([row])[0]
            found.append(Line(f"inference, batch {row['batch']}, ms", threads, row["milliseconds"], ours))
    for group, how in (("training step", "freed memory kept"), ("training step alone", "C library's defaults")):
        if rows := [row for row in rows_of(results, group) if OURS_TRAINING in row["milliseconds"]]:
            rows = sorted(rows, key=lambda r: r["batch"])
            for row in (rows[0], rows[-1]) if group == "training step" and len(rows) > 1 else rows[-1:]:
                name = f"training step, batch {row['batch']}, {how}, ms"
                found.append(Line(name, row["threads"], row["milliseconds"], OURS_TRAINING))
    for row in rows_of(results, "training memory"):
        if row["level"] == "peak" and OURS_TRAINING in row["bytes"]:
            sizes = {name: size / 1e6 for name, size in row["bytes"].items()}
            name = f"peak memory of a training step, batch {row['batch']}, MB"
            found.append(Line(name, row["threads"], sizes, OURS_TRAINING))
    return found


def spread(results: dict) -> str:
    """A sentence with the range of every peer's ratio to ours over all widths and resolutions."""
    rows = [row for row in rows_of(results, "grid") if row["batch"] == 1]
    texts = []
    for ours in dict.fromkeys((*engines_of(rows, "times_as_long")[:1], FROZEN)):
        ratios = {
            name: [row["times_as_long"][name] / row["times_as_long"][ours] for row in rows]
            for name in PEERS
            if all({ours, name} <= set(row["times_as_long"]) for row in rows)
        }
        ranges = [f"{min(r):.2f} to {max(r):.2f} for {name}" for name, r in ratios.items() if r]
        if ranges:
            subject = "mnv2_fused (frozen)" if ours == FROZEN else "mnv2_fused"
            texts.append(f"relative to {subject} is {' and '.join(ranges)}")
    if not texts:
        return ""
    widths, resolutions, threads = ({row[key] for row in rows} for key in ("width", "resolution", "threads"))
    return (
        f"Over widths {min(widths)} to {max(widths)} and resolutions {min(resolutions)} to {max(resolutions)} "
        f"(batch 1, {threads_text(threads)}) the time {', and '.join(texts)}. Below 1 the peer is faster."
    )


def threads_text(counts: set[int]) -> str:
    return " or ".join(map(str, sorted(counts))) + (" thread" if counts == {1} else " threads")


def summary(files: list[dict], chart: str | None, details: str) -> str:
    """The README's chart and table; empty if neither inference nor training was measured."""
    results = joined(files)
    rows = lines(results)
    if not rows:
        return ""
    threads = threads_text({line.threads for line in rows})
    columns = {
        f"MobileNetV2 1.0, 224x224, fp32, {threads}": lambda line: line.name,
        "mnv2_fused": lambda line: line.cell(line.ours),
        "mnv2_fused, frozen": lambda line: line.cell(FROZEN),
        "PyTorch": lambda line: line.cell(PLAIN),
        "torch.compile": lambda line: line.cell("torch.compile") or line.cell("torch.compile frozen"),
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
