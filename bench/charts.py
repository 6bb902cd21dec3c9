"""The charts of bench/report.py."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def draw_inference(rows: list[dict], path: Path, note: str = "") -> None:
    """Draws images a second: a group of bars for each batch size and thread count, a bar for each engine, and the FMA
    limit as a line. `note` is small print below the chart.
    """
    rows = sorted(rows, key=lambda r: (r["threads"], r["batch"]))
    engines = list(dict.fromkeys(name for row in rows for name in row["milliseconds"]))
    figure, axes = plt.subplots(figsize=(11, 4.5), layout="constrained")
    width = 0.84 / len(engines)
    for i, engine in enumerate(engines):
        bars = [(group, row) for group, row in enumerate(rows) if engine in row["milliseconds"]]
        places = [group + (i - (len(engines) - 1) / 2) * width for group, _ in bars]
        heights = [1e3 * r["batch"] / r["milliseconds"][engine] for _, r in bars]
        axes.bar(places, heights, width, label=engine, color=plt.get_cmap("tab20")(i))
    for group, row in enumerate(rows):
        limit = 1e3 * row["batch"] / row["limit_milliseconds"]
        axes.hlines(limit, group - 0.44, group + 0.44, colors="black", label="FMA limit" if group == 0 else None)
    axes.set_xticks(
        range(len(rows)), [f"batch {r['batch']}\n{r['threads']} thread{'s'[: r['threads'] - 1]}" for r in rows]
    )
    axes.set_ylabel("images a second")
    axes.set_title("MobileNetV2 1.0, 224x224, fp32 unless named")
    axes.legend(ncols=4, loc="upper left")
    axes.set_ylim(top=1.3 * axes.get_ylim()[1])
    _save(figure, path, note)


def draw_training(steps: list[dict], peaks: list[dict], path: Path, note: str = "") -> None:
    """Draws a bar for each engine: the time of a step of the largest batch, with the FMA limit as a line, and the peak
    memory of the process.
    """
    panels = []
    if steps:
        row = max(steps, key=lambda r: r["batch"])
        panels.append(
            (f"a step of {row['batch']} images, freed memory kept, ms", row["milliseconds"], row["limit_milliseconds"])
        )
    for row in peaks:
        sizes = {name: size / 1e6 for name, size in row["bytes"].items()}
        panels.append((f"peak memory of {row['batch']} images, MB", sizes, None))
    figure, several = plt.subplots(1, len(panels), figsize=(11, 3.5), layout="constrained", squeeze=False)
    for axes, (label, values, limit) in zip(several[0], panels, strict=True):
        colors = ["C0" if name.startswith("fused") else "C1" for name in values]
        bars = axes.barh(list(values), list(values.values()), color=colors)
        axes.bar_label(bars, fmt="%.0f", padding=3)
        axes.set_xlim(right=1.2 * max(values.values()))
        axes.invert_yaxis()
        axes.set_xlabel(label)
        if limit is not None:
            axes.axvline(limit, color="black", label="FMA limit")
            axes.legend()
    figure.suptitle("Training MobileNetV2 1.0, 224x224, fp32")
    _save(figure, path, note)


def _save(figure: plt.Figure, path: Path, note: str) -> None:
    figure.supxlabel(note, fontsize="small", color="gray")
    figure.savefig(path, dpi=120)
    plt.close(figure)
