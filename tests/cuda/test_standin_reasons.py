"""What runs fused on a GPU, and why not, with the CPU in its place."""

from __future__ import annotations

import types

import pytest
import torch
from standin import SMALL, image
from torch import Tensor

import mnv2_fused
from mnv2_fused import MobileNetV2
from mnv2_fused._core import call, fit
from mnv2_fused.models import fused, network
from mnv2_fused.models.fused import NETWORK


def test_explain_counts_the_device_of_the_weights(monkeypatch):
    with torch.device("meta"):
        model = MobileNetV2(7, 0.5, SMALL).eval()
    with torch.no_grad():
        assert all("on meta" in why for why in mnv2_fused.explain(model).values())
    monkeypatch.setattr(call, "device_reason", lambda device: None)
    with torch.no_grad():
        assert mnv2_fused.explain(model) == dict.fromkeys(mnv2_fused.explain(model))
        model.features[1].conv[0][1].train()
        expected = "conv.0.1 is in training mode, and training has kernels for the CPU alone"
        assert mnv2_fused.explain(model)["features.1"] == expected
    for name, why in mnv2_fused.explain(model).items():
        assert name == "features.1" or why == "gradients are needed, and training has kernels for the CPU alone"


def test_training_on_a_gpu_reads_no_unit_in_vain(monkeypatch):
    with torch.device("meta"):
        model, x = MobileNetV2(7, 0.5, SMALL), torch.empty(4, 3, 33, 33)
    monkeypatch.setattr(call, "device_reason", lambda device: None)
    read_dense, reads = fused.read_dense, []
    monkeypatch.setattr(fused, "read_dense", lambda *arguments: reads.append(arguments[1]) or read_dense(*arguments))
    for module, name in ((fused, "read_block"), (network, "read_head"), (network, "read_dense")):
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("there is nothing to read"))
    assert model(x).requires_grad
    assert reads == [False]  # only the stem is read: its input needs no gradient
    model.features[1](torch.empty(2, 16, 9, 9, device="meta", requires_grad=True))


def test_a_network_asks_once_whether_it_fits(monkeypatch):
    with torch.device("meta"):
        model = MobileNetV2(7, 0.5, SMALL).eval()
    with torch.no_grad():
        spec = NETWORK.read(model, False)
    asked = []

    def gpu_reason(operator: str, fields: list[int], x: Tensor) -> str | None:
        asked.append((x.shape[0], *x.shape[2:]))
        return "it is too wide" if x.shape[3] == 65 else None

    def reason(x: Tensor) -> str | None:
        return fit.shape_reason("network", spec, x)

    monkeypatch.setattr(fit, "gpu_reason", gpu_reason)
    for width, why in ((33, None), (65, "it is too wide"), (33, None), (65, "it is too wide")):
        assert reason(torch.empty(2, 3, 33, width, device="meta")) == why
    assert asked == [(2, 33, 33), (2, 33, 65)]
    for n in range(1, 101):
        reason(torch.empty(n, 3, 9, 9, device="meta"))
    assert len(asked) == 102 and len(spec.fits) == 64


@pytest.mark.parametrize("conv", ["tf32", "ieee"])
@pytest.mark.parametrize("matmul", ["tf32", "ieee"])
def test_tf32_is_what_convolutions_would_use(conv, matmul, monkeypatch):
    def setting(precision: str) -> types.SimpleNamespace:
        return types.SimpleNamespace(fp32_precision=precision)

    backends = types.SimpleNamespace(
        cudnn=types.SimpleNamespace(enabled=True, conv=setting(conv)),
        cuda=types.SimpleNamespace(matmul=setting(matmul)),
    )
    assert {torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision} <= {
        "none",
        "ieee",
        "tf32",
    }
    monkeypatch.setattr(torch, "backends", backends)
    x = image(2, 3, 9, 9)
    assert call.tf32(x) == (conv == "tf32") and not call.tf32(x.half())
    backends.cudnn.enabled = False
    assert call.tf32(x) == (matmul == "tf32") and not call.tf32(x.half())
