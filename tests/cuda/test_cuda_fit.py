"""Which shapes and GPUs take the plain path, as far as a test without a GPU can tell."""

from __future__ import annotations

import re
import types

import pytest
import torch
from oracle import assert_close, operators, plain, randomize
from torch._subclasses import FakeTensorMode

import mnv2_fused
from mnv2_fused import _C, InvertedResidual, MobileNetV2, cli, explain
from mnv2_fused._core import call, fit
from mnv2_fused._core import library as _library
from mnv2_fused._core.decide import Unit
from mnv2_fused._core.geometry import BlockShape
from mnv2_fused.models.fused import BLOCK, DENSE, NETWORK
from mnv2_fused.models.network import HEAD
from mnv2_fused.training import modules as training

A10, H200 = 99 << 10, 227 << 10  # shared memory of a thread block


@pytest.fixture
def shared_memory(monkeypatch):
    """Sets the shared memory of every GPU."""
    return lambda size: monkeypatch.setattr(call, "shared_memory", lambda index: size)


@torch.no_grad()
def read(unit: Unit, module):
    """The spec of `module` as if it were on a GPU."""
    spec = unit.read(module.eval(), False)
    if unit is NETWORK:
        first, *rest = spec.steps
        return spec._replace(steps=(first._replace(spec=on_gpu(first.spec, "conv")), *rest))
    return on_gpu(spec, "project" if unit is BLOCK else "conv")


def on_gpu(spec, conv: str):
    """`spec` as if it were on a GPU. A spec takes its device from its convolution `conv`."""
    found = getattr(spec, conv)
    return spec._replace(**{conv: found._replace(weight=image(*found.weight.shape, dtype=found.weight.dtype))})


def reason(unit: Unit, spec, x: torch.Tensor) -> str | None:
    return fit.shape_reason(unit.operator.name, spec, x)


def image(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    with FakeTensorMode():
        return torch.empty(shape, dtype=dtype, device="cuda")


def test_a_block_that_does_not_fit_has_a_reason(shared_memory):
    block, x = InvertedResidual(500, 500, 1, 2), image(2, 500, 14, 14)
    shared_memory(H200)
    assert reason(BLOCK, read(BLOCK, block), x) is None
    shared_memory(A10)
    spec, expected = read(BLOCK, block), "it does not fit cuda:0: it needs 123344 bytes of shared memory, and a "
    assert reason(BLOCK, spec, x) == expected + "thread block can have 101376"
    assert reason(BLOCK, read(BLOCK, InvertedResidual(224, 224, 1, 6)), image(2, 224, 14, 14)) is None
    fields = BlockShape(500, 1000, 500, 3, 1, 1, (1, 1, 1, 1), True, False).fields()
    assert fit.gpu_reason("inverted_residual", fields, x).startswith(expected)
    assert fit.gpu_reason("inverted_residual", fields, x.half()) is None


def test_padding_of_a_block_may_follow_from_its_input(shared_memory):
    shared_memory(A10)
    spec = read(BLOCK, InvertedResidual(16, 16, 2, 2, tf_padding=True))
    assert spec.shape.padding is None and reason(BLOCK, spec, image(1, 16, 9, 12)) is None


def test_counters_of_32_bits(shared_memory):
    shared_memory(H200)
    model = MobileNetV2(width_mult=0.35).eval()
    for unit, module, huge, fine in (
        (DENSE, model.features[0], (1 << 33, 3, 1, 1), (1 << 20, 3, 224, 224)),
        (HEAD, model, (1 << 35, 112, 1, 1), (1 << 20, 112, 7, 7)),
    ):
        spec = read(unit, module)
        assert "32-bit counters" in reason(unit, spec, image(*huge))
        assert reason(unit, spec, image(*fine)) is None


def test_a_network_does_not_fit_where_a_unit_does_not(shared_memory):
    model, x = MobileNetV2(output_stride=8), image(1, 3, 224, 224)
    shared_memory(H200)
    assert reason(NETWORK, read(NETWORK, model), x) is None
    assert "4 channels" in reason(NETWORK, read(NETWORK, model), image(1, 4, 224, 224))
    shared_memory(A10)
    expected = "it does not fit cuda:0: block 15: it needs 123088 bytes"
    assert reason(NETWORK, read(NETWORK, model), x).startswith(expected)


@pytest.mark.parametrize("device", ["sm_80", "sm_86", "sm_90"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_detection_and_segmentation_fit_every_gpu(device, dtype, torchvision_mobilenetv2):
    bytes_ = _C.cuda_device(device)["shared_block_bytes"]
    detector = mnv2_fused.ssdlite320_mobilenet_v2().eval().requires_grad_(False)
    backbone = mnv2_fused.deeplabv3_mobilenet_v2().eval().requires_grad_(False).backbone
    for model, size in ((detector, 320), (backbone, 513)):
        units, _ = NETWORK.read(model, False).flat().arguments
        assert _C.cuda_unfit("network", (1, size, size, 3), units, dtype, bytes_) is None


@pytest.fixture
def one_block_does_not_fit(monkeypatch):
    """Makes the block with 96 hidden channels not fit, as if the CPU were a GPU."""
    shape_reason = fit.shape_reason

    def found(operator, spec, x, dtype=None):
        if operator == "network" or getattr(spec.shape, "c_hidden", 0) == 96:
            return "it does not fit"
        return shape_reason(operator, spec, x, dtype)

    for module in (fit, training):
        monkeypatch.setattr(module, "shape_reason", found)


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
    """`gpu(capability, refused)` sets the only GPU, and CUDA's error if no kernel was built for it."""

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
        assert call.device_reason(torch.device("cuda", 0)) is None
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
    assert re.match(f"the input is on cuda:0: {reason}", call.device_reason(device))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert re.match(f"the input is on cuda: {reason}", call.device_reason(torch.device("cuda")))
    assert cli.main(["info"]) == 0
    assert "A GPU: " in capsys.readouterr().out


@pytest.mark.filterwarnings("error")
def test_graphs_hold_the_reasons_as_constants(gpu, shared_memory):
    gpu((8, 6))
    shared_memory(A10)
    torch._dynamo.reset()

    def function(x, wide):
        device = torch.device("cuda", 0)
        if call._gpu_reason(device.index) is not None:
            return x - 1
        channels = 500 if wide else 224
        shape = BlockShape(channels, 2 * channels, channels, 3, 1, 1, (1, 1, 1, 1), True, False)
        key = ("inverted_residual", (1, 64, 64, channels), tuple(shape.fields()), "float32")
        reason = fit._gpu_reason(key, device)
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
            lambda x: x + 1 if call._tf32_convolutions() else x - 1, fullgraph=True, backend="eager"
        )
        assert compiled(torch.zeros(1)).item() == (1 if precision == "tf32" else -1)
    finally:
        setting.fp32_precision = before
        torch._dynamo.reset()
