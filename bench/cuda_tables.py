"""The tables of bench/measure_cuda.py, and its bars: the goals of the fused network on an H200 in fp16.

A row is one subject at one batch size, as it stands in bench/results/gpu.json.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

# Subjects and engines.
NETWORK, CHAIN = "network", "17 blocks"
FUSED, FUSED_GRAPH, COMPILED = "fused", "fused, graph", "torch.compile"
EAGER, EAGER_GRAPH = "eager", "eager, graph"


def markdown(names: Sequence[str], rows: list[Sequence[str]]) -> str:
    """A table in the format of tabulate's "github", right-aligned. A machine with a GPU may lack tabulate."""
    widths = [max(map(len, column)) for column in zip(names, *rows, strict=True)]
    head, *lines = [f"| {' | '.join(map(str.rjust, cells, widths))} |" for cells in (names, *rows)]
    return "\n".join([head, f"|{'|'.join('-' * (width + 2) for width in widths)}|", *lines])


@dataclass(frozen=True)
class Bar:
    """A goal for an H200 in fp16. `value` returns the figure from a subject's row, or None if it was not measured."""

    what: str
    batch: int
    text: str
    bound: float
    value: Callable[[dict], float | None]
    form: str
    most: bool = False  # whether `bound` is an upper bound

    def line(self, rows: list[dict]) -> list[str]:
        chosen = [r for r in rows if (r["what"], r["batch"], r["dtype"]) == (self.what, self.batch, "float16")]
        value = self.value(chosen[0]) if chosen else None
        return [self.what, str(self.batch), self.text, *self.verdict(value)]

    def verdict(self, value: float | None) -> list[str]:
        wanted = f"at {'most' if self.most else 'least'} {self.form.format(self.bound)}"
        if value is None:
            return [wanted, "not yet measured"]
        reached = value <= self.bound if self.most else value >= self.bound
        return [wanted, self.form.format(value) + ("" if reached else ", missed")]


class LeastShare(Bar):
    """A goal for the smallest share among all blocks. Unless every block was measured there is no figure."""

    def line(self, rows: list[dict]) -> list[str]:
        blocks = {r["what"]: r for r in rows if r["batch"] == self.batch and r["dtype"] == "float16"}
        values = [self.value(blocks[name]) if (name := f"block {i}") in blocks else None for i in range(1, 18)]
        return [self.what, str(self.batch), self.text, *self.verdict(None if None in values else min(values))]


def _against(name: str) -> Callable[[dict], float | None]:
    return lambda row: row.get("times_as_long", {}).get(name)


def _ours(scale: Callable[[dict, float], float]) -> Callable[[dict], float | None]:
    return lambda row: scale(row, row["milliseconds"][FUSED_GRAPH]) if FUSED_GRAPH in row["milliseconds"] else None


def _memory(row: dict) -> float | None:
    peak = row.get("peak_bytes", {})
    return peak[FUSED] / peak[EAGER] if FUSED in peak and EAGER in peak else None


_microseconds = _ours(lambda row, ms: 1e3 * ms)
_images = _ours(lambda row, ms: row["batch"] / ms)
_share = _ours(lambda row, ms: row["limit_milliseconds"] / ms)
_AS_FAST = "times as fast as"
BARS = (
    Bar(CHAIN, 256, f"{_AS_FAST} torch.compile, max-autotune", 3.0, _against(COMPILED), "{:.2f}"),
    Bar(CHAIN, 256, f"{_AS_FAST} eager, folded, in a CUDA graph", 5.0, _against(EAGER_GRAPH), "{:.2f}"),
    Bar(CHAIN, 256, "time", 1000, _microseconds, "{:.0f} us", most=True),
    Bar(NETWORK, 256, f"{_AS_FAST} torch.compile, max-autotune", 2.5, _against(COMPILED), "{:.2f}"),
    Bar(NETWORK, 256, "images a second", 200, _images, "{:.0f} thousand"),
    Bar(NETWORK, 256, "peak memory of eager's", 0.25, _memory, "{:.0%}", most=True),
    Bar(NETWORK, 32, f"{_AS_FAST} torch.compile, max-autotune", 2.5, _against(COMPILED), "{:.2f}"),
    Bar(NETWORK, 1, f"{_AS_FAST} torch.compile, max-autotune", 2.0, _against(COMPILED), "{:.2f}"),
    Bar(NETWORK, 1, "time", 120, _microseconds, "{:.0f} us", most=True),
    LeastShare("each block", 256, "of its own limit", 0.25, _share, "{:.0%}"),
)


def bars(rows: list[dict]) -> str:
    """Markdown: every bar with its measured figure."""
    names = ["1.0, 224x224, fp16", "batch", "fused, in a CUDA graph", "wanted on an H200", "measured"]
    return markdown(names, [bar.line(rows) for bar in BARS])


def table(rows: list[dict]) -> str:
    """Markdown: the rows of networks, then of blocks."""

    def text(row: dict, name: str) -> str:
        value = row["milliseconds"].get(name)
        if value is None:
            return "missing" if name in row["missing"] else ""
        ratio = row.get("times_as_long", {}).get(name)
        return f"{1e3 * value:.1f}" + ("" if ratio is None or name.startswith(FUSED) else f" ({ratio:.2f}x)")

    def columns(row: dict) -> dict:
        cells = {"": row["what"], "dtype": row["dtype"], "batch": str(row["batch"])}
        cells |= {f"{name}, us": text(row, name) for name in (FUSED_GRAPH, FUSED, COMPILED, EAGER_GRAPH, EAGER)}
        ours = row["milliseconds"].get(FUSED_GRAPH)
        cells["limit, us"] = f"{1e3 * row['limit_milliseconds']:.3g}"
        cells["of the limit"] = "" if ours is None else f"{row['limit_milliseconds'] / ours:.0%}"
        if row["what"].startswith("block"):
            return cells
        cells["fused, images/s"] = "" if ours is None else f"{1e3 * row['batch'] / ours:.0f}"
        for name, value in row.get("peak_bytes", {}).items():
            cells[f"{name}, MB"] = f"{value / 1e6:.1f}"
        return cells

    tables = []
    for blocks in (False, True):
        chosen = [columns(row) for row in rows if row["what"].startswith("block") is blocks]
        names = list(dict.fromkeys(name for cells in chosen for name in cells))
        if chosen:
            tables.append(markdown(names, [[row.get(name, "") for name in names] for row in chosen]))
    missing = {f"{name}: {why}": None for row in rows for name, why in row["missing"].items()}
    return "\n\n".join([*tables, *(f"Not measured: {text}." for text in missing)]) + "\n"


def launch_tables(rows: Sequence[dict]) -> list[str]:
    """Markdown, a table for each batch: microseconds that each launch was predicted to take, and that it took in each
    variant. A variant that was measured several times has its least time.
    """
    tables = []
    for batch in dict.fromkeys(row["batch"] for row in rows):
        chosen = [row for row in rows if row["batch"] == batch]
        variants = list(dict.fromkeys(row["variant"] for row in chosen))
        lines = []
        for launch in dict.fromkeys(row["launch"] for row in chosen):
            same = [row for row in chosen if row["launch"] == launch]
            predicted = same[-1]["predicted_us"]
            times = [[row["us"] for row in same if row["variant"] == variant] for variant in variants]
            cells = [f"{min(t):.1f} ({min(t) / predicted:.2f}x)" if t else "" for t in times]
            lines.append([launch, f"{predicted:.1f}", *cells])
        names = [f"launch, batch {batch}", "predicted, us", *(f"{variant or 'measured'}, us" for variant in variants)]
        tables.append(markdown(names, lines))
    return tables
