"""Which shapes and GPUs take the plain path, as far as that can be seen without a GPU."""

from __future__ import annotations

import re
import types

import pytest
import torch
from oracle import assert_close, operators, plain, randomize
from torch._subclasses import FakeTensorMode

from mnv2_fused import InvertedResidual, MobileNetV2, cli, explain
from mnv2_fused._core import inspect as _inspect
from mnv2_fused._core import library as _library
from mnv2_fused.training import operators as training

A10, H200 = 99 << 10, 227 << 10  # shared memory of a thread block


@pytest.fixture
def shared_memory(monkeypatch):
    """Sets what every GPU has."""
    return lambda size: monkeypatch.setattr(_inspect, "_shared_memory", lambda index: size)


def on_gpu(spec):
    """The spec and tensors on a GPU that is not there."""
    return spec._replace(tensors=tuple(None if t is None else image(*t.shape, dtype=t.dtype) for t in spec.tensors))


def image(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    with FakeTensorMode():
        return torch.empty(shape, dtype=dtype, device="cuda")


@torch.no_grad()
def read(block):
    return _inspect.read_block(block.eval())


def test_a_block_that_does_not_fit_has_a_reason(shared_memory):
    spec, x = on_gpu(read(InvertedResidual(500, 500, 1, 2))), image(2, 500, 14, 14)
    shared_memory(H200)
    assert _inspect.shape_reason(spec, x) is None
    shared_memory(A10)
    reason = "it does not fit cuda:0: it needs 123072 bytes of shared memory, and a thread block can have 101376"
    assert _inspect.shape_reason(spec, x) == reason
    assert _inspect.shape_reason(on_gpu(read(InvertedResidual(224, 224, 1, 6))), image(2, 224, 14, 14)) is None
    args = (500, 1000, 500, 3, 1, 1, (1, 1, 1, 1), True)
    assert _inspect.block_fit_reason(x, *args) == reason
    assert _inspect.block_fit_reason(x.half(), *args) is None


def test_padding_of_a_block_may_follow_from_its_input(shared_memory):
    shared_memory(A10)
    spec = on_gpu(read(InvertedResidual(16, 16, 2, 2, tf_padding=True)))
    assert spec.padding == () and _inspect.shape_reason(spec, image(1, 16, 9, 12)) is None


def test_counters_of_32_bits(shared_memory):
    shared_memory(H200)
    with torch.no_grad():
        model = MobileNetV2(width_mult=0.35).eval()
        stem = on_gpu(_inspect.read_stem(model.features[0]))
        head = on_gpu(_inspect.read_head(model.features[-1], model.classifier))
    for spec, huge, fine in (
        (stem, (1 << 33, 3, 1, 1), (1 << 20, 3, 224, 224)),
        (head, (1 << 35, 112, 1, 1), (1 << 20, 112, 7, 7)),
    ):
        assert "32-bit counters" in _inspect.shape_reason(spec, image(*huge))
        assert _inspect.shape_reason(spec, image(*fine)) is None


def test_a_network_does_not_fit_where_a_unit_does_not(shared_memory):
    spec = network_spec(MobileNetV2(output_stride=8))
    x = image(1, 3, 224, 224)
    shared_memory(H200)
    assert _inspect.network_reason(spec, x) is None
    assert "4 channels" in _inspect.network_reason(spec, image(1, 4, 224, 224))
    shared_memory(A10)
    assert _inspect.network_reason(spec._replace(unfit={}), x).startswith(
        "it does not fit cuda:0: block 15: it needs 122816 bytes"
    )


@torch.no_grad()
def network_spec(model):
    stem, *blocks, last = model.eval().features
    units = (_inspect.read_stem(stem), *map(_inspect.read_block, blocks), _inspect.read_head(last, model.classifier))
    spec = _inspect.join(units[0], list(units[1:-1]), units[-1])
    return spec._replace(stem=on_gpu(spec.stem))


@pytest.fixture
def one_block_does_not_fit(monkeypatch):
    """On the CPU, as if it were a GPU: the block with 96 hidden channels."""
    shape_reason = _inspect.shape_reason

    def reason(spec, x, dtype=None):
        return "it does not fit" if getattr(spec, "c_hidden", 0) == 96 else shape_reason(spec, x, dtype)

    for module in (_inspect, training):
        monkeypatch.setattr(module, "shape_reason", reason)
    monkeypatch.setattr(_inspect, "network_reason", lambda spec, x, dtype=None: "block 2: it does not fit")


@pytest.mark.usefixtures("one_block_does_not_fit")
@torch.no_grad()
def test_the_other_units_of_such_a_network_run_fused():
    settings = [[1, 16, 1, 1], [6, 24, 2, 2]]
    x = torch.randn(2, 3, 32, 32)
    model = randomize(MobileNetV2(10, inverted_residual_setting=settings), x)
    assert operators(lambda: model(x)) == ["dense", *["inverted_residual"] * 2, "head"]
    assert_close(model(x), plain(model)(x), plain(model).double()(x.double()))
    assert explain(model, x)["features.2"] == "it does not fit"
    assert explain(model, x)["features.3"] is None


# ------------------------------------------------------------------------------------------------------- the GPU


@pytest.fixture
def gpu(monkeypatch):
    """`gpu(capability, refused)`: the only GPU, and CUDA's error where no kernel was built for it."""

    def set_(capability, refused=""):
        calls = []

        def ask(index):
            calls.append(index)
            return refused

        operator = types.SimpleNamespace(default=ask)
        monkeypatch.setattr(torch.ops.mnv2_fused, "cuda_kernels_refused", operator, raising=False)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "A GPU")
        monkeypatch.setattr(_library, "cuda_missing", None)
        _library.gpu_reason.cache_clear()
        return calls

    yield set_
    _library.gpu_reason.cache_clear()


def test_a_gpu_that_runs_the_kernels_is_asked_once(gpu):
    calls = gpu((9, 0))
    for _ in range(3):
        assert _inspect.device_reason(torch.device("cuda", 0)) is None
    assert calls == [0]


@pytest.mark.parametrize(
    ("capability", "refused", "reason"),
    [
        ((7, 5), "", r"its compute capability is 7\.5, below 8\.0"),
        (
            (10, 0),
            "cudaErrorNoKernelImageForDevice",
            r"none of the kernels .* runs on compute capability 10\.0: cudaEr",
        ),
    ],
)
def test_a_gpu_that_does_not_has_a_reason(gpu, capability, refused, reason, monkeypatch, capsys):
    gpu(capability, refused)
    device = torch.device("cuda", 0)
    assert re.match(f"the input is on cuda:0: {reason}", _inspect.device_reason(device))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert re.match(f"the input is on cuda: {reason}", _inspect.device_reason(torch.device("cuda")))
    assert cli.main(["info"]) == 0
    assert "A GPU: " in capsys.readouterr().out


@pytest.mark.filterwarnings("error")
def test_graphs_hold_the_reasons_as_constants(gpu, shared_memory):
    gpu((8, 6))
    shared_memory(A10)
    torch._dynamo.reset()

    def function(x, wide):
        device = torch.device("cuda", 0)
        if _inspect._gpu_reason(device.index) is not None:
            return x - 1
        channels = 500 if wide else 224
        sizes = (1, 64, 64, channels, 2 * channels, channels, 3, 1, 1, (1, 1, 1, 1), True, "float32")
        reason = _inspect._fit_reason("cuda_block_unfit", sizes, device, limited=True)
        return x + 1 if reason is None else x * 2

    compiled = torch.compile(function, fullgraph=True, backend="eager")
    x = torch.full((3,), 5.0)
    assert compiled(x, False).tolist() == [6.0] * 3 and compiled(x, True).tolist() == [10.0] * 3
    torch._dynamo.reset()


@pytest.mark.parametrize("precision", ["tf32", "ieee"])
def test_graphs_hold_the_setting_of_tf32(precision):
    setting = torch.backends.cudnn.conv
    before, setting.fp32_precision = setting.fp32_precision, precision
    torch._dynamo.reset()
    try:
        compiled = torch.compile(
            lambda x: x + 1 if _inspect._tf32_convolutions() else x - 1, fullgraph=True, backend="eager"
        )
        assert compiled(torch.zeros(1)).item() == (1 if precision == "tf32" else -1)
    finally:
        setting.fp32_precision = before
        torch._dynamo.reset()
