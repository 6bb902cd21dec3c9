"""Other libraries' runtimes: each function loads a network from a file and returns a function that runs it.

`extras.use` raises an error with the install command if the library is missing.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from mnv2_fused.extras import use

Run = Callable[[], list[Tensor]]


def onnx_session(path: str, threads: int):
    """An ONNX Runtime session of the network in `path`. Several threads may run it at the same time."""
    onnxruntime = use("onnxruntime", "bench")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def onnx_runtime(path: str, x: Tensor, outputs: list[Tensor], threads: int) -> Run:
    """Runs the network in `path` on `x` with ONNX Runtime. It writes into `outputs` and returns them."""
    session = onnx_session(path, threads)
    binding = session.io_binding()
    places = [(binding.bind_output, value, t) for value, t in zip(session.get_outputs(), outputs, strict=True)]
    for bind, value, t in ((binding.bind_input, session.get_inputs()[0], x), *places):
        bind(value.name, "cpu", 0, t.numpy().dtype, list(t.shape), t.data_ptr())

    def run(_held: Tensor = x) -> list[Tensor]:  # keeps x alive: the binding has only its address
        session.run_with_iobinding(binding)
        return outputs

    return run


def openvino_model(path: str, hint: str, precision: str = "f32", **options: object):
    """The network in `path` compiled by OpenVINO. `hint`: LATENCY or THROUGHPUT. `precision`: f32 or bf16."""
    # Without a precision OpenVINO computes in bfloat16 if the processor has it.
    settings = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": hint, **options}
    return use("openvino", "bench").Core().compile_model(path, "CPU", settings)


def openvino(path: str, x: Tensor, outputs: list[Tensor], threads: int, precision: str = "f32") -> Run:
    """The same with OpenVINO."""
    model = openvino_model(path, "LATENCY", precision, INFERENCE_NUM_THREADS=threads, NUM_STREAMS=1)
    tensor = use("openvino", "bench").Tensor
    request = model.create_infer_request()
    request.set_input_tensor(tensor(x.numpy(), shared_memory=True))
    for i, t in enumerate(outputs):
        request.set_output_tensor(i, tensor(t.numpy(), shared_memory=True))

    def run(_held: Tensor = x) -> list[Tensor]:  # keeps x alive: the request has only its address
        request.infer(share_outputs=True)
        return outputs

    return run


def litert(path: Path, x: Tensor, threads: int) -> Run:
    """Runs the network in `path`, which has one output, on the contiguous `x` with LiteRT. The file's input is NHWC."""
    interpreter = use("ai_edge_litert.interpreter", "bench").Interpreter
    if not path.is_file():
        raise FileNotFoundError(
            'LiteRT\'s files are missing. Make them with: pip install "mnv2_fused[litert]" && python '
            "bench/litert_files.py"
        )
    network = interpreter(str(path), num_threads=threads)
    network.allocate_tensors()
    network.set_tensor(network.get_input_details()[0]["index"], x.permute(0, 2, 3, 1).contiguous().numpy())
    place = network.get_output_details()[0]["index"]

    def run() -> list[Tensor]:
        network.invoke()
        return [torch.from_numpy(network.get_tensor(place))]

    return run
