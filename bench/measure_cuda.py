"""Measures the fused network on a GPU beside the alternatives a user has there: 1.0 at 224x224, all in 16 bits.

    python bench/measure_cuda.py network blocks --json bench/results/gpu.json
    python bench/measure_cuda.py compiled --json bench/results/gpu.json       # minutes of compilation

Parts: network measures the whole network, and its 17 blocks as one chain; launches times each launch of the network
with torch's profiler; blocks measures each block alone, against its limit; compiled measures network and chain under
torch.compile(mode="max-autotune") with frozen weights. Each row is added to the JSON file as soon as it is measured,
and the tables beside the file are rewritten. Subjects that the bars ask for come first.

Times are medians of bursts of calls between two CUDA events; the engines take turns. Calls rotate through several
inputs, so that the L2 cache does not hold them. "graph" is a replay of a CUDA graph. torch.compile replays a graph of
its own and copies the input into it.

All GPU work runs in a child process. If an error such as an illegal memory access leaves that process without its GPU,
a new process measures the failed subject again, one engine at a time, and goes on with the rest.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import math
import multiprocessing
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import cuda_launches
import engines
import torch
from cuda_tables import CHAIN, COMPILED, EAGER, EAGER_GRAPH, FUSED, FUSED_GRAPH, NETWORK, bars, launch_tables, table
from torch import Tensor, nn

import mnv2_fused
from mnv2_fused.tools import measure
from mnv2_fused.tools.rates import block_shapes

RESOLUTION = 224
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
PARTS = ("network", "launches", "blocks", "compiled")

ROTATED_BYTES = 64 * 2**20  # size of all inputs together, more than the L2 cache holds
MOST_INPUTS = 8  # inputs of batch 1 are too small to gain anything from more

Call = Callable[[int], Tensor]  # call(i) runs on input i


def ask_driver(*fields: str) -> str:
    """What nvidia-smi says of the first GPU, or why it says nothing."""
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        return str(error)


# ---------------------------------------------------------------------------------------------------------- limits

# Peak rates: bytes a second of a measured copy, by the GPU's name; multiply-adds a second, of both.
MEMORY = {"H100": 3.0e12, "H200": 4.3e12}
TENSOR_CORES = 790e12 / 2
FLOAT32 = 67e12 / 2


@dataclass(frozen=True)
class Work:
    """The work that every implementation must do: bytes to and from the GPU's memory, multiply-adds on tensor cores and
    in float32.
    """

    bytes: int
    tensor_macs: int
    float32_macs: int = 0


@functools.cache
def memory() -> float:
    """Bytes a second of this machine's GPU; of an H200 if it has none that is known."""
    name = ask_driver("name")
    return next((rate for gpu, rate in MEMORY.items() if gpu in name), MEMORY["H200"])


def limit(work: Work) -> float:
    """Seconds that the scarcest resource needs."""
    return max(work.bytes / memory(), work.tensor_macs / TENSOR_CORES, work.float32_macs / FLOAT32)


def block_work(shape: dict, batch: int, element: int = 2) -> Work:
    """The work of a block, which is a dict of `block_shapes`. Input, output and weights cross memory once, in elements
    of `element` bytes.
    """
    pixels = batch * shape["h"] * shape["w"]
    outputs = batch * math.ceil(shape["h"] / shape["stride"]) * math.ceil(shape["w"] / shape["stride"])
    c_in, c_hidden, c_out, taps = shape["c_in"], shape["c_hidden"], shape["c_out"], shape["kernel"] ** 2
    expand = c_in * c_hidden if shape["has_expand"] else 0
    return Work(
        element * (pixels * c_in + outputs * c_out + expand + c_hidden * (taps + c_out)),
        pixels * expand + outputs * c_hidden * c_out,
        outputs * c_hidden * taps,
    )


def network_works(model: nn.Module, batch: int, element: int = 2) -> list[Work]:
    """The work of stem, blocks and head, in order."""
    stem, last, classifier = model.features[0][0].weight, model.features[-1][0].weight, model.classifier[-1].weight
    shapes = block_shapes(model, RESOLUTION)
    after_stem, after_blocks = shapes[0]["h"] ** 2, math.ceil(shapes[-1]["h"] / shapes[-1]["stride"]) ** 2
    head = batch * (after_blocks * last.numel() + classifier.numel())
    return [
        Work(
            element * (batch * (stem.shape[1] * RESOLUTION**2 + stem.shape[0] * after_stem) + stem.numel()),
            batch * after_stem * stem.numel(),
        ),
        *(block_work(shape, batch, element) for shape in shapes),
        Work(element * (batch * after_blocks * last.shape[1] + last.numel() + classifier.numel()), head),
    ]


def limit_of(what: str, model: nn.Module, batch: int) -> float:
    """Seconds for "network", "17 blocks" or "block 1" to "block 17": the sum of the limits of its units."""
    works = network_works(model, batch)
    chosen = {NETWORK: works, CHAIN: works[1:-1]}
    return sum(map(limit, chosen[what] if what in chosen else [works[int(what.split()[1])]]))


# --------------------------------------------------------------------------------------------------------- engines


def part_of(what: str, model: nn.Module) -> nn.Module:
    if what == NETWORK:
        return model
    return model.features[1:-1] if what == CHAIN else model.features[int(what.split()[1])]


def on_gpu(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    return copy.deepcopy(model).to("cuda", dtype)


def inputs_of(what: str, batch: int, dtype: torch.dtype) -> list[Tensor]:
    """Inputs as inside a network, channels_last. Together they are larger than the L2 cache."""
    model = on_gpu(engines.folded(), dtype)
    x = torch.randn(batch, 3, RESOLUTION, RESOLUTION, device="cuda", dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    if what != NETWORK:
        x = model.features[: 1 if what == CHAIN else int(what.split()[1])](x)
    count = min(MOST_INPUTS, math.ceil(ROTATED_BYTES / (x.numel() * x.element_size())))
    return [x, *(x.clone(memory_format=torch.preserve_format) for _ in range(count - 1))]


def reason(error: Exception) -> str:
    """An error as one line."""
    return f"{type(error).__name__}: {(str(error).strip() or '?').splitlines()[0]}"


def running_fused(module: nn.Module, x: Tensor) -> nn.Module:
    """Returns `module`. Raises RuntimeError if a unit of it takes the plain path, which would be measured instead."""
    for unit, why in mnv2_fused.explain(module, x).items():
        if why is not None:
            raise RuntimeError(f"{unit} runs plain: {why}")
    return module


def called(module: nn.Module, inputs: Sequence[Tensor]) -> Call:
    return lambda i: module(inputs[i])


def captured(module: nn.Module, inputs: Sequence[Tensor]) -> Call:
    """A CUDA graph for each input. The graphs share their memory, so a result holds until the next call."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            module(inputs[0])
    torch.cuda.current_stream().wait_stream(side)
    pool = torch.cuda.graph_pool_handle()
    graphs = []
    for x in inputs:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            y = module(x)
        graphs.append((graph, y))

    def replay(i: int) -> Tensor:
        graphs[i][0].replay()
        return graphs[i][1]

    return replay


def compiled(module: nn.Module, inputs: Sequence[Tensor]) -> Call:
    import torch._inductor.config

    torch._inductor.config.freezing = True
    # 1x1 convolutions are tuned as matrix products. For the others cuDNN was always first: the best of inductor's own
    # kernels took 1.8 times as long for a stem, 95 to 314 times for depthwise convolutions, and most of the minutes.
    torch._inductor.config.max_autotune_conv_backends = "ATEN"
    torch._dynamo.reset()
    function = torch.compile(module, mode="max-autotune", fullgraph=True, dynamic=False)
    for _ in range(3):  # compiles, then records its graph
        function(inputs[0])
    return called(function, inputs)


def build(
    what: str, batch: int, dtype: torch.dtype, names: Sequence[str]
) -> tuple[dict[str, Call], dict[str, str], int]:
    """The engines by name, the reasons why others are missing, by name, and the number of inputs."""
    inputs = inputs_of(what, batch, dtype)
    fused, plain, folded = (
        part_of(what, on_gpu(model, dtype))
        for model in (
            engines.network(fused=True, memory_format=torch.channels_last),
            engines.network(memory_format=torch.channels_last),
            engines.folded(),
        )
    )
    ways = {
        EAGER: lambda: called(folded, inputs),
        EAGER_GRAPH: lambda: captured(folded, inputs),
        FUSED: lambda: called(running_fused(fused, inputs[0]), inputs),
        FUSED_GRAPH: lambda: captured(running_fused(fused, inputs[0]), inputs),
        COMPILED: lambda: compiled(plain, inputs),
    }
    expected = folded(inputs[0])
    found, missing = {}, {}
    for name in names:
        try:
            call = ways[name]()
            _, relative = measure.difference(call(0), expected)
            torch.cuda.synchronize()
        except Exception as error:  # any error: the other engines must still be measured
            missing[name] = reason(error)
            torch.cuda.synchronize()  # raises if the GPU is lost: then this process can measure no engine
            continue
        if relative < 0.05:  # another order of sums in 16 bits gives less than 0.01 after 52 layers
            found[name] = call
        else:
            missing[name] = f"differs from PyTorch by {relative:.2g} of the largest value"
    return found, missing, len(inputs)


# ----------------------------------------------------------------------------------------------------- measurement


def medians(calls: dict[str, Call], inputs: int, seconds: float) -> dict[str, float]:
    """Seconds a call of each engine: medians of bursts of about 5 ms, in turns, for `seconds` an engine."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    next_input = dict.fromkeys(calls, 0)

    def burst(name: str, count: int) -> float:
        call, first = calls[name], next_input[name]
        start.record()
        for i in range(first, first + count):
            call(i % inputs)
        end.record()
        end.synchronize()
        next_input[name] = (first + count) % inputs
        return start.elapsed_time(end) / 1e3 / count

    counts = {}
    for name in calls:
        burst(name, inputs)
        counts[name] = max(1, min(200, math.ceil(0.005 / burst(name, max(3, min(inputs, 20))))))
    times: dict[str, list[float]] = {name: [] for name in calls}
    stop = time.perf_counter() + seconds * len(calls)
    while time.perf_counter() < stop or len(times[next(iter(calls))]) < 5:
        for name, count in counts.items():
            times[name].append(burst(name, count))
    return measure.medians(times)


def latency(call: Call, inputs: int) -> float:
    """Median seconds from a call until its result is there, by the host's clock."""
    times = []
    for i in range(100):
        torch.cuda.synchronize()
        before = time.perf_counter()
        call(i % inputs)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - before)
    return statistics.median(times)


def peak_bytes(call: Call) -> int:
    """Peak bytes that a call allocates on top of what was allocated before it."""
    call(0)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call(0)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@torch.no_grad()
def measured(what: str, batch: int, dtype: torch.dtype, names: Sequence[str], seconds: float) -> dict:
    """A row of the table. Times are in milliseconds."""
    calls, missing, inputs = build(what, batch, dtype, names)
    row = {"what": what, "batch": batch, "inputs": inputs, "missing": missing}
    row["limit_milliseconds"] = 1e3 * limit_of(what, engines.network(), batch)
    times = medians(calls, inputs, seconds) if calls else {}
    row["milliseconds"] = {name: 1e3 * value for name, value in times.items()}
    if FUSED_GRAPH in times:  # the ratios need it measured in the same run
        row["times_as_long"] = {name: value / times[FUSED_GRAPH] for name, value in times.items()}
    if batch == 1 and what == NETWORK:
        row["latency_milliseconds"] = {name: 1e3 * latency(call, inputs) for name, call in calls.items()}
    if not what.startswith("block"):
        row["peak_bytes"] = {name: peak_bytes(calls[name]) for name in (FUSED, EAGER) if name in calls}
    return row


@torch.no_grad()
def measured_launches(batch: int, dtype: torch.dtype, variant: str) -> list[dict]:
    """Rows of the launches of a captured graph of the network."""
    inputs = inputs_of(NETWORK, batch, dtype)
    model = on_gpu(engines.network(fused=True, memory_format=torch.channels_last), dtype)
    replay = captured(running_fused(model, inputs[0]), inputs)
    for i in range(len(inputs)):
        replay(i)
    return cuda_launches.rows_of(replay, inputs, str(dtype).removeprefix("torch."), variant)


# ------------------------------------------------------------------------------------------------------- processes


def _serve(pipe: Connection) -> None:
    """Runs each function that comes through `pipe`; sends back its result, or the reason why there is none."""
    torch.backends.cudnn.benchmark = True
    while True:
        function, arguments = pipe.recv()
        try:
            answer = function(*arguments), None
        except Exception as error:
            answer = None, reason(error)
        pipe.send(answer)


class Apart:
    """Calls functions in a child process. After a failure the next call gets a new process."""

    def __init__(self) -> None:
        self._process = None

    def __call__(self, function: Callable, *arguments: object) -> object:
        """Calls `function`. Raises RuntimeError with the reason if it failed or its process ended."""
        if self._process is None:
            context = multiprocessing.get_context("spawn")
            self._pipe, theirs = context.Pipe()
            self._process = context.Process(target=_serve, args=(theirs,))
            self._process.start()
            theirs.close()
        try:
            self._pipe.send((function, arguments))
            answer, why = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join()
            why = f"the process ended with {self._process.exitcode}"
        if why is not None:
            self.end()
            raise RuntimeError(why)
        return answer

    def end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = None


def rows_of(
    apart: Apart, what: str, batch: int, dtype: torch.dtype, names: Sequence[str], seconds: float
) -> Iterator[dict]:
    """The row of a subject. If that fails, a row for each engine alone; an engine that fails again gets the reason."""
    try:
        yield apart(measured, what, batch, dtype, names, seconds)
    except RuntimeError as error:
        if len(names) > 1:
            for name in names:
                yield from rows_of(apart, what, batch, dtype, [name], seconds)
        else:
            limit_milliseconds = 1e3 * limit_of(what, engines.network(), batch)
            base = {"what": what, "batch": batch, "limit_milliseconds": limit_milliseconds, "milliseconds": {}}
            yield {**base, "missing": {names[0]: str(error)}}


# ----------------------------------------------------------------------------------------------------------------- JSON


def merged(rows: list[dict], new: dict) -> list[dict]:
    """`rows` with `new` merged into the row of the same subject, dtype and batch, or appended."""
    key = ("what", "dtype", "batch")
    for i, row in enumerate(rows):
        if all(row[name] == new[name] for name in key):
            both = {**row, **new}
            for name, value in row.items():
                if isinstance(value, dict):
                    both[name] = {**value, **new.get(name, {})}
            both["missing"] = {k: v for k, v in both["missing"].items() if k not in both["milliseconds"]}
            return [*rows[:i], both, *rows[i + 1 :]]
    return [*rows, new]


def write(path: Path, rows: list[dict], environment: dict, launches: Sequence[dict] = ()) -> None:
    """Writes the JSON file, and the tables beside it."""
    environment = dict(environment)
    commands = [*environment.pop("commands", []), environment["command"]]
    content = {**environment, "commands": list(dict.fromkeys(commands)), "rows": rows, "launches": list(launches)}
    new = path.with_suffix(".new")
    new.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(new, path)
    text = "\n\n".join([bars(rows), table(rows), *launch_tables(launches)])
    path.with_suffix(".md").write_text(text, encoding="utf-8")


def gpu() -> dict:
    """Facts about the GPU and its driver."""
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "driver, clock, power": ask_driver("driver_version", "clocks.max.sm", "power.limit"),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def subjects(part: str, batches: Sequence[int]) -> list[tuple[str, int]]:
    """The subjects of a part, each with its batch size; those that the bars ask for come first."""
    largest, *rest = sorted(batches, reverse=True)
    if part == "launches":
        return [("launches", batch) for batch in (largest, *rest)]
    if part == "blocks":
        return [(f"block {i}", batch) for batch in (largest, *rest) for i in range(1, 18)]
    return [(NETWORK, largest), (CHAIN, largest), *((what, batch) for what in (NETWORK, CHAIN) for batch in rest)]


NAMES = {
    "network": (EAGER, EAGER_GRAPH, FUSED, FUSED_GRAPH),
    "blocks": (EAGER_GRAPH, FUSED_GRAPH),
    "compiled": (COMPILED, FUSED_GRAPH),
}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="+", choices=PARTS)
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    parser.add_argument("--batches", type=lambda text: [int(n) for n in text.split(",")], default=[1, 32, 256])
    parser.add_argument("--dtype", choices=DTYPES, default="float16")
    parser.add_argument("--seconds", type=float, default=0.5, help="an engine, blocks a fifth of it (default 0.5)")
    parser.add_argument("--variant", default="", help="a name for what part launches measures (default: none)")
    parser.add_argument("--missing", action="store_true", help="leave out what the file has already")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    old = json.loads(options.json.read_text(encoding="utf-8")) if options.json.exists() else {}
    rows, launches, dtype, apart = old.get("rows", []), old.get("launches", []), options.dtype, Apart()
    try:
        environment = {**measure.environment(), "gpu": apart(gpu), "commands": old.get("commands", [])}
        for part in options.parts:
            seconds = options.seconds / (5 if part == "blocks" else 1)
            for what, batch in subjects(part, options.batches):
                if part == "launches":
                    try:
                        launches += apart(measured_launches, batch, DTYPES[dtype], options.variant)
                    except RuntimeError as error:
                        print(f"launches, batch {batch}: {error}", flush=True)
                    else:
                        write(options.json, rows, environment, launches)
                        print(f"launches, batch {batch}: {launches[-1]['us']:.1f} us", flush=True)
                    continue
                known = [row for row in rows if (row["what"], row["batch"], row["dtype"]) == (what, batch, dtype)]
                if options.missing and known and set(NAMES[part]) <= set(known[0]["milliseconds"]):
                    continue
                for row in rows_of(apart, what, batch, DTYPES[dtype], NAMES[part], seconds):
                    rows = merged(rows, {**row, "dtype": dtype})
                    write(options.json, rows, environment, launches)
                    figures = [f"{name} {1e3 * ms:.1f} us" for name, ms in row["milliseconds"].items()]
                    lacking = [f"{name}: {why}" for name, why in row["missing"].items()]
                    limit_us = f"limit {1e3 * row['limit_milliseconds']:.1f} us"
                    print(f"{what}, batch {batch}: {'; '.join([*figures, *lacking, limit_us])}", flush=True)
    finally:
        apart.end()


if __name__ == "__main__":
    main()
