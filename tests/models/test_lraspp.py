"""torchvision's LR-ASPP on the fused backbone."""

from __future__ import annotations

import sys

import pytest
import torch
from oracle import check, randomize
from segmentation import Out, assert_trains, remove_clamps

from mnv2_fused import extras, lraspp_mobilenet_v2
from mnv2_fused.weights import WeightsError


@pytest.fixture(autouse=True)
def _needs_torchvision(torchvision_mobilenetv2):
    pass


def test_inference():
    model = randomize(Out(lraspp_mobilenet_v2(width_mult=0.35, num_classes=5)), torch.randn(4, 3, 65, 65))
    y = check(model, torch.randn(2, 3, 65, 97), ["network"])
    assert y.shape == (2, 5, 65, 97) and y.is_contiguous()
    handle = model.model.backbone.features[3].register_forward_hook(lambda *_: None)
    with torch.no_grad():
        assert all(y.is_contiguous() for y in model.model.backbone(torch.randn(2, 3, 65, 97)).values())
    handle.remove()
    model.model.backbone.fused = False
    check(model, torch.randn(2, 3, 65, 97), [])


def test_head_takes_strides_8_and_16():
    model, x = lraspp_mobilenet_v2().eval(), torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        maps = model.backbone(x)
    assert {name: tuple(y.shape) for name, y in maps.items()} == {"low": (1, 32, 8, 12), "high": (1, 320, 4, 6)}
    assert model.classifier.cbr[0].weight.shape == (128, 320, 1, 1)
    assert model.classifier.low_classifier.weight.shape == (21, 32, 1, 1)


def test_training():
    def network():
        model = Out(lraspp_mobilenet_v2(width_mult=0.1, num_classes=5))
        return remove_clamps(randomize(model, torch.randn(4, 3, 33, 33)).train())

    assert_trains(network, (49, 49))


@torch.no_grad()
def test_weights_from_a_file(tmp_path):
    ours, x = lraspp_mobilenet_v2(num_classes=3, width_mult=0.35).eval(), torch.randn(1, 3, 33, 33)
    torch.save(ours.state_dict(), tmp_path / "lraspp.pth")
    assert torch.equal(lraspp_mobilenet_v2(tmp_path / "lraspp.pth").eval()(x)["out"], ours(x)["out"])
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(WeightsError, match=r"other.pth holds no LR-ASPP on MobileNetV2"):
        lraspp_mobilenet_v2(tmp_path / "other.pth")


def test_missing_torchvision_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.models.segmentation.lraspp", None)
    with pytest.raises(extras.MissingExtraError, match=r'pip install "mnv2_fused\[segmentation\]"'):
        lraspp_mobilenet_v2(width_mult=0.1)
