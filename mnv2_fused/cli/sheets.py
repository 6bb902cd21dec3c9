"""The tables of `mnv2_fused.paper.tables` as text: columns, rows and notes, drawn by Rich or as Markdown."""

from __future__ import annotations

from collections.abc import Iterator

from mnv2_fused.cli.output import Sheet
from mnv2_fused.paper import printed

_NONE = "-"


_QUOTED = "Quoted: the paper's figures alone, because no maintained library has this network."


def sheets(tables: dict[str, dict]) -> Iterator[Sheet]:
    """The sheets of all `tables`, the results of `mnv2_fused.paper.tables` by name."""
    makers = {"3": _table_3, "4": _table_4, "6": _table_6, "7": _table_7, "figure5": _figure_5}
    for name, content in tables.items():
        yield from makers[name](content)


# ------------------------------------------------------------------------------------------------------------- numbers


_MILLIONS, _BILLIONS = (1e6, " M", ".1f"), (1e9, " B", ".4g")  # unit, its name, form of what was counted


def _difference(here: float, on_paper: float) -> str:
    return f"{100 * (here / on_paper - 1):+.1f} %"


def _number(value: float | None, form: str = "g") -> str:
    return _NONE if value is None else f"{value:{form}}"


def _kilobytes(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}"


def _counts(row: dict, unit: tuple[float, str, str]) -> list[str]:
    """Printed, counted and difference, of parameters and then of multiply-adds, which are in `unit`."""
    on_paper, here = row["printed"], row.get("here")
    size, name, form = unit
    cells = []
    for key, given, counted in (
        ("parameters", lambda n: f"{n / 1e6:g} M", lambda n: f"{n:,}"),
        ("multiply_adds", lambda n: f"{n / size:g}{name}", lambda n: f"{n / size:{form}}{name}"),
    ):
        cells.append(_NONE if on_paper is None else given(on_paper[key]))
        cells.append(_NONE if here is None else counted(here[key]))
        cells.append(_NONE if here is None or on_paper is None else _difference(here[key], on_paper[key]))
    return cells


_COUNTS = ("params, paper", "here", "difference", "MAdds, paper", "here", "difference")


def _source(row: dict) -> str:
    return row.get("missing") or row["source"]


def _latencies(rows: list[dict]) -> tuple[list[str], list[list[str]]]:
    """Columns and cells of the milliseconds measured here."""
    threads = list(dict.fromkeys(n for row in rows for n in row.get("milliseconds", {})))
    columns = [f"{name} ms, {n} thr." for n in threads for name in ("PyTorch", "fused")]
    cells = [
        [
            _number(row.get("milliseconds", {}).get(n, {}).get(kind), ".2f")
            for n in threads
            for kind in ("plain", "fused")
        ]
        for row in rows
    ]
    return columns, cells


# -------------------------------------------------------------------------------------------------------------- sheets


def _table_3(content: dict) -> Iterator[Sheet]:
    rows = []
    for row in content["rows"]:
        size = row["resolution"]
        on_paper, here = row["printed"], row["here"]
        tensors = [
            f"{here[kind].get('channels', '')} / {_kilobytes(here[kind]['kilobytes'])}".removeprefix(" / ")
            if kind in here
            else _NONE
            for kind in ("convolutions", "blocks")
        ]
        rows.append(
            [
                row["network"],
                size if size == "max" else f"{size}x{size}",
                _number(on_paper.get("channels")),
                _number(on_paper["kilobytes"]),
                _kilobytes(row["by_arithmetic"]),
                _difference(row["by_arithmetic"], on_paper["kilobytes"]),
                *tensors,
                _source(row),
            ]
        )
    yield Sheet(
        "Table 3: the largest tensor at each resolution, in 16 bits",
        (
            "<network",
            "size",
            "channels, paper",
            "KB, paper",
            "KB by its channels",
            "difference",
            "channels / KB here: convolutions",
            "blocks",
            "<from",
        ),
        rows,
        (
            "The paper's arithmetic is channels x height x width x 2 bytes of one tensor, in thousands.",
            "Here: the most channels of an input or output, if each convolution is an operation, or each block. Some "
            "rows of the paper have the channels of the next stage (MobileNetV2 at 56, 28 and 14), those of two groups "
            "instead of three (ShuffleNet at 28, 14 and 7), or twice the bytes (MobileNetV1 at 7). Its maximum of "
            "ShuffleNet leaves out the first layer.",
        ),
    )
    yield _memory(content)


def _memory(content: dict) -> Sheet:
    rows = []
    for row in content["memory"]:
        cells = [_NONE] * 6
        if "missing" not in row:
            keys = ("in_and_out_bytes", "plan_scratch_bytes", "peak_bytes", "scratch_bytes")
            sizes = [f"{row[key] / 1e6:.2f}" if row.get(key) else _NONE for key in keys]
            cells = [row["operations"], row["largest"], *sizes]
        rows.append([row["network"], *cells, _source(row)])
    plural = "s" if content["threads"] > 1 else ""
    return Sheet(
        "Section 5.1: the largest sum of an operation's inputs and outputs, in 16 bits",
        (
            "<network",
            "<operations",
            "<largest",
            "in + out, MB",
            "+ slice of the plan, MB",
            "measured peak, MB",
            "of it scratch, MB",
            "<from",
        ),
        rows,
        (
            f"One image of 224 x 224 in float16, {content['threads']} thread{plural}. Measured: what PyTorch allocates "
            "beyond weights and image, and the high-water mark of the kernels' scratch memory. `blocks` is what this "
            "package computes.",
            "Why they differ: the paper's 400 KB is one 16-bit tensor. The kernels also hold the tensor on the other "
            "side of a block, and for each thread a slice of the expanded tensor, in float32 and many channels wide; "
            "the stem's output never exists as a whole, because the stem is fused into block 1.",
        ),
    )


def _table_4(content: dict) -> Iterator[Sheet]:
    columns, latencies = _latencies(content["rows"])
    rows = [
        [
            row["network"],
            _number(row["printed"]["accuracy"], ".1f"),
            *_counts(row, _MILLIONS),
            _number(row["printed"]["milliseconds"]),
            *cells,
            _source(row),
        ]
        for row, cells in zip(content["rows"], latencies, strict=True)
    ]
    notes = ["Top-1 is the paper's. Pixel 1: one large core of the phone, TF-Lite, the paper's."]
    if columns:
        notes.append(
            "The last columns were measured here on one image: PyTorch is eager and channels_last, fused is this "
            "package. All networks took turns."
        )
    yield Sheet(
        "Table 4: ImageNet, 224 x 224",
        ("<network", "top-1, paper", *_COUNTS, "Pixel 1 ms, paper", *columns, "<from"),
        rows,
        notes,
    )


def _table_6(content: dict) -> Iterator[Sheet]:
    rows = [
        [
            row["network"],
            _number(row["printed"]["accuracy"], ".1f"),
            *_counts(row, _BILLIONS),
            _number(row["printed"]["milliseconds"]),
            _source(row),
        ]
        for row in content["rows"]
    ]
    yield Sheet(
        "Table 6: detection, COCO",
        ("<network", "mAP, paper", *_COUNTS, "Pixel 1 ms, paper", "<from"),
        rows,
        ("Counted for backbone and heads, with 80 classes and the background; SSD300 at 300 x 300.", _QUOTED),
    )


def _table_7(content: dict) -> Iterator[Sheet]:
    rows = [
        [
            row["network"],
            str(row["output_stride"]),
            "yes" if row["aspp"] else "",
            "yes" if row["several"] else "",
            _number(row["printed"]["accuracy"], ".2f"),
            *_counts(row, _BILLIONS),
            _source(row),
        ]
        for row in content["rows"]
    ]
    yield Sheet(
        "Table 7: segmentation, PASCAL VOC 2012",
        ("<network", "output stride", "ASPP", "scales and mirrored", "mIOU, paper", *_COUNTS, "<from"),
        rows,
        (
            _QUOTED,
            "Counted at 513 x 513 up to the logits. Scales and mirrored: six scales from 0.5 to 1.75, each also "
            "mirrored, by `mnv2_fused.multiscale`; with exact sizes that is 17.375 times the multiply-adds, and with "
            "sizes of 16 k + 1 about 17.2.",
        ),
    )


def _figure_5(content: dict) -> Iterator[Sheet]:
    columns, latencies = _latencies(content["rows"])
    rows = []
    for row, cells in zip(content["rows"], latencies, strict=True):
        on_paper = row["printed"] or {}
        rows.append(
            [
                f"{row['width']:g}",
                str(row["resolution"]),
                _number(on_paper.get("accuracy"), ".1f"),
                *_counts(row, _MILLIONS),
                _number(on_paper.get("milliseconds")),
                *cells,
            ]
        )
    yield Sheet(
        "Figure 5: MobileNetV2 over widths and resolutions",
        (
            "width",
            "size",
            "top-1, authors",
            *(c.replace("paper", "authors") for c in _COUNTS),
            "Pixel 1 ms, authors",
            *columns,
        ),
        rows,
        (f"The figure has no numbers. Authors: their checkpoints ({printed.POINTS}).",),
    )
