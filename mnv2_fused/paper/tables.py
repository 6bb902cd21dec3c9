"""The rows of each table: what the paper prints beside what is counted and measured here.

A table is a dictionary of plain values, for JSON: parameters, multiply-adds, bytes, milliseconds. A row has `printed`,
the paper's figures, and `here`, or `missing`: why the row has none.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mnv2_fused import extras, weights
from mnv2_fused.models.deeplab import multiscale
from mnv2_fused.paper import memory, networks, printed
from mnv2_fused.tools import counts, measure

WIDTHS = (1.4, 1.3, 1.0, 0.75, 0.5, 0.35)
RESOLUTIONS = (224, 192, 160, 128, 96)
QUOTED = "quoted"
_IMAGE = 224


class Measuring(NamedTuple):
    """How to measure latencies: for each number of `threads`, `seconds` a network. `seed`: of weights and images.

    `advance` gets the share of a step that is done; `step` is called with the name of a step that begins.
    """

    threads: Sequence[int]
    seconds: float
    seed: int
    step: Callable[[str], None]
    advance: Callable[[float], None]

    def latencies(self, what: str, models: dict[str, nn.Module], resolution: int) -> Iterator[dict[str, float]]:
        """Median milliseconds of one image, for each number of threads in turn."""
        x = image(resolution, self.seed)
        calls = {name: (lambda model=model: model(x)) for name, model in models.items()}
        for threads in self.threads:
            self.step(f"{what}, {threads} thread{'s' if threads > 1 else ''}")
            with measure.threads(threads), torch.inference_mode():
                times = measure.interleaved(calls, seconds=self.seconds, progress=self.advance)
            yield {name: 1e3 * median for name, median in measure.medians(times).items()}


def steps(names: Sequence[str], threads: Sequence[int]) -> int:
    """How many steps of measuring the tables `names` have."""
    measured = {"3": 1, "4": len(threads), "figure5": len(WIDTHS) * len(RESOLUTIONS) * len(threads)}
    return sum(measured.get(name, 0) for name in names)


def image(resolution: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A channels_last image of random numbers."""
    x = torch.randn(1, 3, resolution, resolution, generator=torch.Generator().manual_seed(seed))
    return x.to(dtype, memory_format=torch.channels_last)


def _counted(model: nn.Module, function: Callable[..., object], *arguments: object) -> dict:
    return {
        "parameters": counts.parameters(model),
        "multiply_adds": counts.multiply_adds(function, *arguments),
    }


def _found(network: networks.Network | None, count: Callable[[networks.Network], dict]) -> dict:
    """The part of a row that tells who defines its network, and what `count` finds there or why there is nothing."""
    if network is None:
        return {"missing": QUOTED}
    try:
        return {"source": network.source, "here": count(network)}
    except extras.MissingExtraError:
        return {"source": network.source, "missing": network.needs}


def _on_meta(resolution: int) -> Tensor:
    return torch.empty(1, 3, resolution, resolution, device="meta")


def _contender(network: networks.Network, seed: int, **options: object) -> nn.Module:
    """A network to measure. Its statistics are random: those of a new network make activations vanish."""
    torch.manual_seed(seed)
    model = network.make(**options)
    weights.randomize_batch_norm(model, seed)
    return model.to(memory_format=torch.channels_last)


# ------------------------------------------------------------------------------------------------------------- tables


def table_3(measuring: Measuring | None, threads: int) -> dict:
    """Memory of activations in 16 bits, at 224. `threads`: of the plans and of what is measured."""
    if measuring is not None:
        measuring.step("memory")
    rows, sums = [], []
    for done, (name, lines) in enumerate(printed.TABLE_3.items()):
        network = networks.CLASSIFIERS[name]
        resolutions = [r for r in lines if r != "max"]
        kinds: dict[str, list[memory.Operation]] = {}
        missing = None
        try:
            kinds["convolutions"] = memory.convolutions(network.make("meta"), _on_meta(_IMAGE))
        except extras.MissingExtraError:
            missing = network.needs
        if name == "MobileNetV2":
            kinds["blocks"] = memory.blocks(network.make(), _IMAGE, threads)
        rows += _resolutions(name, network.source, lines, resolutions, kinds, missing)
        for kind, operations in kinds.items():
            largest = memory.largest(operations)
            row = {"network": name, "source": network.source, "operations": kind, "largest": largest.name}
            row |= {"in_and_out_bytes": largest.bytes, "plan_scratch_bytes": largest.scratch}
            if measuring is not None:
                row |= _measured_memory(network, measuring.seed, kind == "blocks", threads)
            sums.append(row)
        if missing is not None:
            sums.append({"network": name, "source": network.source, "missing": missing})
        if measuring is not None:
            measuring.advance((done + 1) / len(printed.TABLE_3))
    return {"threads": threads, "rows": rows, "memory": sums}


def _resolutions(
    name: str,
    source: str,
    lines: dict,
    resolutions: list[int],
    kinds: dict[str, list[memory.Operation]],
    missing: str | None,
) -> list[dict]:
    """A row for each resolution, and one for the maximum."""
    found = {kind: memory.channels_by_resolution(operations, resolutions) for kind, operations in kinds.items()}
    rows = []
    for r in resolutions:
        channels, kilobytes = lines[r]
        here = {kind: {"channels": c[r], "kilobytes": memory.kilobytes(c[r], r)} for kind, c in found.items()}
        row = {"network": name, "source": source, "resolution": r, "printed": {"channels": channels}}
        row["printed"]["kilobytes"] = kilobytes
        row |= {"by_arithmetic": memory.kilobytes(channels, r), "here": here}
        rows.append(row)
    greatest = {"network": name, "source": source, "resolution": "max", "printed": {"kilobytes": lines["max"][1]}}
    greatest["by_arithmetic"] = max(row["by_arithmetic"] for row in rows)
    greatest["here"] = {kind: {"kilobytes": max(row["here"][kind]["kilobytes"] for row in rows)} for kind in found}
    rows.append(greatest)
    return [row | ({} if missing is None else {"missing": missing}) for row in rows]


def _measured_memory(network: networks.Network, seed: int, fused: bool, threads: int) -> dict:
    options = {"fused": fused} if network.extra is None else {}
    model = _contender(network, seed, **options).half()
    # PyTorch's activations do not depend on the number of threads, and its 16-bit convolutions are slow.
    peak, scratch = memory.measured(model, image(_IMAGE, seed, torch.float16), threads if fused else 1)
    return {"peak_bytes": peak} | ({"scratch_bytes": scratch} if fused else {})


def table_4(measuring: Measuring | None) -> dict:
    """Classification at 224: parameters, multiply-adds, latency."""
    rows, contenders = [], {}
    for name, line in printed.TABLE_4.items():
        network = networks.CLASSIFIERS[name]
        row = {"network": name, "source": network.source, "printed": line._asdict()}
        try:
            model = network.make("meta")
            row["here"] = _counted(model, model, _on_meta(_IMAGE))
            if measuring is not None:
                if network.extra is None:
                    contenders[name, "fused"] = _contender(network, measuring.seed)
                    contenders[name, "plain"] = _contender(network, measuring.seed, fused=False)
                else:
                    contenders[name, "plain"] = _contender(network, measuring.seed)
        except extras.MissingExtraError:
            row["missing"] = network.needs
        rows.append(row)
    if measuring is not None:
        for threads, times in zip(measuring.threads, measuring.latencies("Table 4", contenders, _IMAGE), strict=True):
            for row in rows:
                found = {kind: times[name, kind] for name, kind in times if name == row["network"]}
                if found:
                    row.setdefault("milliseconds", {})[str(threads)] = found
    return {"rows": rows}


def table_6() -> dict:
    """Detection: parameters, and multiply-adds of backbone and heads."""
    rows = []
    for name, line in printed.TABLE_6.items():
        size = 300 if name == "SSD300" else 320

        def count(network: networks.Network, size: int = size) -> dict:
            model = network.make("meta")
            return _counted(model, _maps_and_heads, model, _on_meta(size))

        row = {"network": name, "source": None, "printed": line._asdict()}
        rows.append(row | _found(networks.DETECTORS.get(name), count))
    return {"rows": rows}


def _maps_and_heads(model: nn.Module, x: Tensor) -> object:
    return model.head(list(model.backbone(x).values()))


def table_7() -> dict:
    """Segmentation at 513, the size with 16 k + 1 pixels that PASCAL's 512 stands for."""
    rows = []
    for inference, line in printed.TABLE_7.items():

        def count(network: networks.Network, inference: printed.Inference = inference) -> dict:
            model = network.make("meta", output_stride=inference.output_stride, aspp=inference.aspp)
            call = (multiscale, model) if inference.several else (model,)
            return _counted(model, *call, _on_meta(513))

        row = {"network": inference.backbone, "source": None, **inference._asdict(), "printed": line._asdict()}
        rows.append(row | _found(networks.segmenter(inference), count))
    return {"rows": rows}


def figure_5(measuring: Measuring | None) -> dict:
    """MobileNetV2 over widths and resolutions."""
    rows = []
    for width, resolution in itertools.product(WIDTHS, RESOLUTIONS):
        network = networks.CLASSIFIERS["MobileNetV2"]
        model = network.make("meta", width_mult=width)
        line = printed.FIGURE_5.get((width, resolution))
        row = {"width": width, "resolution": resolution, "source": network.source}
        row["printed"] = None if line is None else line._asdict()
        row["here"] = _counted(model, model, _on_meta(resolution))
        if measuring is not None:
            contenders = {
                kind: _contender(network, measuring.seed, width_mult=width, fused=kind == "fused")
                for kind in ("fused", "plain")
            }
            times = measuring.latencies(f"Figure 5: {width}, {resolution}", contenders, resolution)
            row["milliseconds"] = {str(threads): found for threads, found in zip(measuring.threads, times, strict=True)}
        rows.append(row)
    return {"rows": rows}
