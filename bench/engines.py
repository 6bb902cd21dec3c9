"""The same network in every engine that a user could run it with. Each gets weights and input in its fastest form."""

from __future__ import annotations

import functools
import tempfile
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import mnv2_fused
from mnv2_fused.tools import measure
from mnv2_fused.weights import randomize_batch_norm

Engine = Callable[[], Tensor]

CLASSES = 1000

_exported = tempfile.TemporaryDirectory(prefix="mnv2_fused_bench_")


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


def _fused(case: Case) -> Engine:
    return _module(network(case.width, fused=True), case.images_channels_last())


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


def onnx_runtime(path: str, x: Tensor, outputs: list[Tensor], threads: int) -> Callable[[], list[Tensor]]:
    """Runs the network in `path` on `x` with ONNX Runtime. It writes into `outputs` and returns them."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    places = [(binding.bind_output, value, t) for value, t in zip(session.get_outputs(), outputs, strict=True)]
    for bind, value, t in ((binding.bind_input, session.get_inputs()[0], x), *places):
        bind(value.name, "cpu", 0, t.numpy().dtype, list(t.shape), t.data_ptr())

    def run(_held: Tensor = x) -> list[Tensor]:  # keeps x alive: the binding has only its address
        session.run_with_iobinding(binding)
        return outputs

    return run


def openvino(path: str, x: Tensor, outputs: list[Tensor], threads: int) -> Callable[[], list[Tensor]]:
    """The same with OpenVINO, in fp32."""
    import openvino

    options = {
        "INFERENCE_PRECISION_HINT": "f32",  # the default is bfloat16 if the processor has it
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
    }
    request = openvino.Core().compile_model(path, "CPU", options).create_infer_request()
    request.set_input_tensor(openvino.Tensor(x.numpy(), shared_memory=True))
    for i, t in enumerate(outputs):
        request.set_output_tensor(i, openvino.Tensor(t.numpy(), shared_memory=True))

    def run(_held: Tensor = x) -> list[Tensor]:  # keeps x alive: the request has only its address
        request.infer(share_outputs=True)
        return outputs

    return run


def export(model: nn.Module, x: Tensor, name: str) -> str:
    """The path of an ONNX file of `model`, which exists until this process ends."""
    path = Path(_exported.name, f"{name}.onnx")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (x,), path, dynamo=True, external_data=False, verbose=False)
    return str(path)


@functools.cache
def _onnx(width: float, resolution: int, batch: int) -> str:
    return export(network(width), Case(width, resolution, batch).images(), f"{width}-{resolution}-{batch}")


def _exported_engine(run: Callable) -> Callable[[Case], Engine]:
    def build(case: Case) -> Engine:
        path = _onnx(case.width, case.resolution, case.batch)
        engine = run(path, case.images(), [torch.empty(case.batch, CLASSES)], case.threads)
        return lambda: engine()[0]

    return build


OURS = "fused"
_BUILD: dict[str, Callable[[Case], Engine]] = {
    OURS: _fused,
    "eager channels_last": _eager_channels_last,
    "eager contiguous": _eager_contiguous,
    "folded channels_last": _folded,
    "torch.compile frozen": _compiled,
    "ONNX Runtime": _exported_engine(onnx_runtime),
    "OpenVINO": _exported_engine(openvino),
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
                if name == OURS:
                    raise
                missing[name] = reason_of(error)
                continue
            _, relative = measure.difference(got, expected)
            if not relative < 1e-4:  # another order of fp32 sums gives 1e-6, bfloat16 inside gives 1e-2
                raise RuntimeError(f"{name} differs from plain PyTorch by {relative:.1g} of the largest value: {case}")
            engines[name] = engine
    return engines, missing
