"""The tables of the figures on CPUs. A row is what a benchmark stored as extra_info."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tabulate import tabulate

FROZEN = "fused (frozen)"
PLAIN = "eager channels_last"
CHECKPOINTED = "checkpointed channels_last"

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
    def fastest_peer(ours: str) -> Callable[[Row], str]:
        def cell(row: Row) -> str:
            times = row["milliseconds"]
            peers = [ms for name, ms in times.items() if not name.startswith("fused")]
            return f"{min(peers) / times[ours]:.2f}x" if peers and ours in times else "missing"

        return cell

    columns = {key: at(key) for key in ("threads", "batch", "width", "resolution")}
    columns |= timed(rows)
    columns |= {f"fastest peer / {name}": fastest_peer(name) for name in engines_of(rows) if name.startswith("fused")}
    columns |= PEAK
    return table(sorted(rows, key=lambda r: (r["threads"], r["batch"], r["width"], r["resolution"])), columns)


def _name(row: Row) -> str:
    return f"{row['width']}, {row['resolution']}x{row['resolution']}"


def serving(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        for callers, rates in row["images_per_second"].items():
            threads = row["threads"] if callers == "1" else 1
            lines.append({"network": _name(row), "callers": int(callers), "threads": threads, "rates": rates})

    def column(name: str) -> Callable[[Row], str]:
        def cell(line: Row) -> str:
            rate, first = line["rates"].get(name), next(iter(line["rates"].values()))
            return "missing" if rate is None else f"{rate:.0f} ({rate / first:.2f}x)"

        return cell

    columns = {"network": at("network"), "callers": at("callers"), "threads of a call": at("threads")}
    columns |= {name: column(name) for name in engines_of(lines, "rates")}
    return table(lines, columns, first="left")


def latency(rows: list[Row]) -> str:
    def column(name: str) -> Callable[[Row], str]:
        def cell(row: Row) -> str:
            if name not in row["milliseconds"]:
                return "missing"
            return f"{milliseconds(row['milliseconds'][name])} / {milliseconds(row['p99'][name])}"

        return cell

    columns = {"network": _name, "busy processes": at("busy")}
    columns |= {name: column(name) for name in engines_of(rows)}
    return table(sorted(rows, key=lambda r: (-r["width"], r["busy"])), columns, first="left")


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
    ours = engines_of(rows, "bytes")[0]
    columns["share"] = lambda row: f"{row['share'][ours]:.2f}"
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
    ours = engines_of(rows, "saved")[0]
    columns["share"] = lambda row: f"{row['saved'][ours] / row['saved'][PLAIN]:.2f}"
    return table(rows, columns, first="left")
