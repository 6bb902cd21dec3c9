"""Figure 5 as a picture."""

from __future__ import annotations

import textwrap
from pathlib import Path

from mnv2_fused import extras


def draw(rows: list[dict], path: Path, note: str) -> None:
    """Draws accuracy, and latency if it was measured, over multiply-adds, and writes the picture.

    Args:
        rows: of `tables.figure_5`.
        path: the file.
        note: small print below the picture.

    Raises:
        extras.MissingExtraError: matplotlib is missing.
    """
    threads = list(dict.fromkeys(n for row in rows for n in row.get("milliseconds", {})))
    panels = 1 + len(threads)
    figure = extras.use("matplotlib.figure", "tables").Figure(figsize=(5.5 * panels, 4.5), layout="constrained")
    accuracy, *latencies = figure.subplots(1, panels, squeeze=False)[0]
    resolutions = sorted({row["resolution"] for row in rows})
    for i, resolution in enumerate(resolutions):
        points = [row for row in rows if row["resolution"] == resolution]
        known = [row for row in points if row["printed"] is not None]
        accuracy.plot(
            [row["here"]["multiply_adds"] / 1e6 for row in known],
            [row["printed"]["accuracy"] for row in known],
            marker="o",
            color=f"C{i}",
            label=f"{resolution} x {resolution}",
        )
        for axes, n in zip(latencies, threads, strict=True):
            for kind, marker in (("fused", "o"), ("plain", "x")):
                axes.scatter(
                    [row["here"]["multiply_adds"] / 1e6 for row in points],
                    [row["milliseconds"][n][kind] for row in points],
                    marker=marker,
                    color=f"C{i}",
                    label=f"{kind}, {resolution}",
                )
    accuracy.set_ylabel("top-1 on ImageNet, %: the authors' checkpoints")
    for axes, n in zip(latencies, threads, strict=True):
        axes.set_ylabel(f"ms an image, measured, {n} thread{'s' if n != '1' else ''}; plain: PyTorch")
        axes.set_yscale("log")
    for axes in (accuracy, *latencies):
        axes.set_xscale("log")
        axes.set_xlabel("millions of multiply-adds")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small", ncols=1 if axes is accuracy else 2)
    figure.suptitle("MobileNetV2, widths 0.35 to 1.4")
    figure.supxlabel(textwrap.fill(note, 75 * panels), fontsize="small", color="gray")
    figure.savefig(path, dpi=110)
