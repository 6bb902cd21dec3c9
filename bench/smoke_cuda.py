"""One line for each kernel variant: whether it is right on this GPU. ``python bench/smoke_cuda.py [TEXT...]``

Every variant of output channels runs at stride 1 and 2 in every arithmetic against float64, then a small network at
batch 1, 3 and 32, and a captured graph 200 times. The first error of CUDA ends the run, as nothing after it would be
true. Exits with 1 if a line is wrong.

With TEXT only lines that contain one of the texts run. ``--next`` prints the name of the line that follows those of
standard input. ``--calls BATCH`` calls MobileNetV2 1.0 twice in float16, for a profiler, and prints nothing.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

import mnv2_fused
from mnv2_fused import functional as ops
from mnv2_fused import reference

# The largest error relative to the largest value: several times what each arithmetic's rounding gives.
TOLERANCES = {"float16": 5e-3, "bfloat16": 3e-2, "tf32": 5e-3, "float32": 1e-5}
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "tf32": torch.float32, "float32": torch.float32}
OUTPUT_CHANNELS = (16, 24, 32, 64, 96, 160)  # one for each variant of the block's kernel
SMALL = [[1, 16, 1, 1], [6, 24, 2, 2], [6, 32, 1, 2]]


def error(got: Tensor, expected: Tensor) -> float:
    return ((got.double() - expected).abs().max() / expected.abs().max()).item()


def block_weights(c_in: int, c_hidden: int, c_out: int, dtype: torch.dtype) -> list[Tensor]:
    """Weights and biases on the GPU that keep activations of order one, so that both bounds of the clamps apply."""
    shapes = ((c_hidden, c_in, 1, 1), (c_hidden, 1, 3, 3), (c_out, c_hidden, 1, 1))
    return [
        tensor.cuda().to(dtype)
        for shape in shapes
        for tensor in (2 * torch.randn(shape) / (shape[1] * shape[2] * shape[3]) ** 0.5, torch.randn(shape[0]))
    ]


def block(arithmetic: str, c_out: int, stride: int) -> float:
    torch.manual_seed(c_out + stride)
    c_in, dtype = c_out, DTYPES[arithmetic]
    weights = block_weights(c_in, 3 * c_out, c_out, dtype)
    x = torch.randn(2, c_in, 19, 23).cuda().to(dtype).contiguous(memory_format=torch.channels_last)
    options = {"stride": stride, "residual": stride == 1}
    torch.backends.cudnn.allow_tf32 = arithmetic == "tf32"
    got = ops.run_block(x, ops.pack_block(*weights), **options)
    exact = [w.double() for w in weights]
    return error(got, reference.inverted_residual(x.double(), *exact, padding=(1,) * 4, **options))


def small_network(dtype: torch.dtype) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The network on the GPU, and the plain one in float64 with the same weights."""
    torch.manual_seed(0)
    model = mnv2_fused.MobileNetV2(10, 1.0, SMALL).eval().cuda().to(dtype)
    exact = mnv2_fused.MobileNetV2(10, 1.0, SMALL, fused=False).eval().cuda().double()
    exact.load_state_dict({name: value.double() for name, value in model.state_dict().items()})
    return model, exact


def network(arithmetic: str, batch: int) -> float:
    model, exact = small_network(DTYPES[arithmetic])
    torch.backends.cudnn.allow_tf32 = arithmetic == "tf32"
    x = torch.randn(batch, 3, 65, 70, device="cuda", dtype=DTYPES[arithmetic])
    return error(model(x), exact(x.double()))


def replays() -> float:
    """How many of 200 replays of a graph differ in any bit from the first."""
    model, _ = small_network(torch.float16)
    x = torch.randn(3, 3, 65, 70, device="cuda", dtype=torch.float16)
    model(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = model(x)
    graph.replay()
    first, different = y.clone(), 0
    for _ in range(200):
        y.fill_(float("nan"))
        graph.replay()
        different += not torch.equal(y, first)
    return float(different)


def lines() -> Iterator[tuple[str, Callable[[], float], float]]:
    """Name, error and its bound."""
    for arithmetic, c_out, stride in itertools.product(TOLERANCES, OUTPUT_CHANNELS, (1, 2)):
        name = f"block {arithmetic} to {c_out} channels, stride {stride}"
        yield name, partial(block, arithmetic, c_out, stride), TOLERANCES[arithmetic]
    for arithmetic, batch in itertools.product(("float16", "float32"), (1, 3, 32)):
        yield f"network {arithmetic}, batch {batch}", partial(network, arithmetic, batch), 4 * TOLERANCES[arithmetic]
    yield "network, 200 replays of a graph", replays, 0.5


def call_twice(batch: int) -> None:
    model = mnv2_fused.MobileNetV2().eval().cuda().half()
    x = torch.randn(batch, 3, 224, 224, device="cuda", dtype=torch.float16).to(memory_format=torch.channels_last)
    for _ in range(2):
        model(x)
    torch.cuda.synchronize()


@torch.no_grad()
def main(words: list[str]) -> int:
    if words[:1] == ["--calls"]:
        call_twice(int(words[1]))
        return 0
    if words[:1] == ["--next"]:
        seen = {line.split(":")[0] for line in sys.stdin}
        print(next((name for name, *_ in lines() if name not in seen), ""))
        return 0
    wrong = 0
    for name, value, bound in lines():
        if words and not any(word in name for word in words):
            continue
        found = value()
        right = found < bound  # not so for NaN
        wrong += not right
        print(f"{name}: {'right' if right else 'WRONG'}, {found:.2g}", flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
