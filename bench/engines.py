"""The same network in every engine that a user could run it with. Each gets weights and input in its fastest form."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import runtimes
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import mnv2_fused
from mnv2_fused.tools import measure
from mnv2_fused.weights import randomize_batch_norm

Engine = Callable[[], Tensor]

CLASSES = 1000
FILES = Path(__file__).resolve().parent / "files"  # networks for other libraries; git ignores them
TOLERANCE = {"f32": 1e-4, "bf16": 2e-2}  # another order of sums gives 1e-6 in f32; bf16 gives up to 7e-3


@dataclass(frozen=True)
class Case:
    """A network of `width` on `batch` images of `resolution` x `resolution`, on `threads` threads, in fp32."""

    width: float = 1.0
    resolution: int = 224
    batch: int = 1
    threads: int = 1

    def images(self) -> Tensor:
        """(batch, 3, resolution, resolution), contiguous; the same numbers every time."""
        generator = torch.Generator().manual_seed(self.batch)
        return torch.randn(self.batch, 3, self.resolution, self.resolution, generator=generator)

    def images_channels_last(self) -> Tensor:
        return self.images().contiguous(memory_format=torch.channels_last)


# Width, resolution and batch of bench/test_grid.py.
GRID = [(width, side, 1) for width in (0.35, 0.5, 0.75, 1.0, 1.4) for side in (96, 128, 160, 192, 224)]
GRID += [(0.35, 96, batch) for batch in (8, 32)]


@functools.cache
def network(width: float = 1.0, *, fused: bool = False, memory_format: torch.memory_format = torch.contiguous_format):
    """The network in eval mode, with the same weights for every `fused` and `memory_format`. It is shared: callers must
    not change it.
    """
    torch.manual_seed(0)
    model = mnv2_fused.MobileNetV2(CLASSES, width, fused=fused).eval()
    randomize_batch_norm(model)
    return model.to(memory_format=memory_format)


def _module(model: nn.Module, x: Tensor) -> Engine:
    return lambda: model(x)


def _live(case: Case) -> Engine:
    return _module(network(case.width, fused=True), case.images_channels_last())


@functools.cache
def frozen(width: float = 1.0) -> nn.Module:
    """The fused network, frozen: its weights are not checked for changes. It is shared."""
    return mnv2_fused.freeze(copy.deepcopy(network(width, fused=True)))


def _frozen(case: Case) -> Engine:
    return _module(frozen(case.width), case.images_channels_last())


def _eager_channels_last(case: Case) -> Engine:
    return _module(network(case.width, memory_format=torch.channels_last), case.images_channels_last())


def _eager_contiguous(case: Case) -> Engine:
    return _module(network(case.width), case.images())


@functools.cache
def folded(width: float = 1.0) -> nn.Module:
    """The plain network with batch norm folded into the convolutions, channels_last. It is shared: callers must not
    change it.
    """
    model = mnv2_fused.MobileNetV2(CLASSES, width, fused=False).eval()
    model.load_state_dict(network(width).state_dict())
    for layers in [module for module in model.modules() if isinstance(module, nn.Sequential)]:
        for i in reversed(range(1, len(layers))):
            if isinstance(layers[i], nn.BatchNorm2d):
                layers[i - 1] = fuse_conv_bn_eval(layers[i - 1], layers[i])
                del layers[i]
    return model.to(memory_format=torch.channels_last)


def _folded(case: Case) -> Engine:
    return _module(folded(case.width), case.images_channels_last())


def _compiled(case: Case) -> Engine:
    # Recompiled for each thread count, because the generated code holds it as a constant.
    torch._dynamo.reset()
    model = network(case.width, memory_format=torch.channels_last)
    model = torch.compile(model, fullgraph=True, dynamic=False, options={"freezing": True})
    return _module(model, case.images_channels_last())


def _onednn_graph(case: Case) -> Engine:
    torch.jit.enable_onednn_fusion(True)
    x = case.images_channels_last()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing is deprecated
        traced = torch.jit.freeze(torch.jit.trace(network(case.width, memory_format=torch.channels_last), x))
    for _ in range(2):  # the first call records shapes, the second compiles
        traced(x)
    return _module(traced, x)


def _file(width: float, resolution: int, batch: int, ending: str) -> Path:
    FILES.mkdir(exist_ok=True)
    return FILES / f"{width}-{resolution}-{batch}.{ending}"


def export(model: nn.Module, x: Tensor, path: Path) -> str:
    """Writes `model` to `path` in ONNX's format unless the file exists. Returns the path."""
    if not path.exists():
        unfinished = path.with_suffix(".part")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(model, (x,), unfinished, dynamo=True, external_data=False, verbose=False)
        unfinished.replace(path)
    return str(path)


def onnx_file(case: Case) -> str:
    """The ONNX file of the network for `case.batch` images of `case.resolution`, exported if it does not exist."""
    path = _file(case.width, case.resolution, case.batch, "onnx")
    return export(network(case.width), case.images(), path)


def litert_file(width: float, resolution: int, batch: int) -> Path:
    """Where bench/litert_files.py puts the network for `batch` images of `resolution`."""
    return _file(width, resolution, batch, "tflite")


def _exported_engine(run: Callable, **options: str) -> Callable[[Case], Engine]:
    def build(case: Case) -> Engine:
        outputs = [torch.empty(case.batch, CLASSES)]
        engine = run(onnx_file(case), case.images(), outputs, case.threads, **options)
        return lambda: engine()[0]

    return build


def _litert(case: Case) -> Engine:
    engine = runtimes.litert(litert_file(case.width, case.resolution, case.batch), case.images(), case.threads)
    return lambda: engine()[0]


LIVE, FROZEN = "fused (live)", "fused (frozen)"
OURS = (LIVE, FROZEN)
PLAIN, ONNX, OPENVINO, LITERT = "eager channels_last", "ONNX Runtime", "OpenVINO", "LiteRT"
_BF16 = "OpenVINO bf16"
_BUILD: dict[str, Callable[[Case], Engine]] = {
    LIVE: _live,
    FROZEN: _frozen,
    PLAIN: _eager_channels_last,
    "eager contiguous": _eager_contiguous,
    "folded channels_last": _folded,
    "torch.compile frozen": _compiled,
    "torch.jit, oneDNN Graph": _onednn_graph,
    ONNX: _exported_engine(runtimes.onnx_runtime),
    OPENVINO: _exported_engine(runtimes.openvino),
    _BF16: _exported_engine(runtimes.openvino, precision="bf16"),
    LITERT: _litert,
}
ALL = tuple(_BUILD)


def reason_of(error: Exception) -> str:
    """The first line of an error, with its kind."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"


def build(case: Case, names: Iterable[str] = ALL) -> tuple[dict[str, Engine], dict[str, str]]:
    """The engines by name, ready to run, and the reasons why others could not be built, by name.

    Raises:
        RuntimeError: an engine's result differs from the plain network's.
    """
    engines: dict[str, Engine] = {}
    missing: dict[str, str] = {}
    with measure.threads(case.threads), torch.no_grad():
        expected = _eager_contiguous(case)()
        for name in names:
            try:
                engine = _BUILD[name](case)
                got = engine()
            except Exception as error:
                if name in OURS:
                    raise
                missing[name] = reason_of(error)
                continue
            _, relative = measure.difference(got, expected)
            if not relative < TOLERANCE["bf16" if name == _BF16 else "f32"]:
                raise RuntimeError(f"{name} differs from plain PyTorch by {relative:.1g} of the largest value: {case}")
            engines[name] = engine
    return engines, missing
