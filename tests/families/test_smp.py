"""segmentation_models_pytorch: its MobileNetV2 encoder runs fused, its decoders stay what they are."""

from __future__ import annotations

import pytest
import torch
from oracle import check, operators, randomize
from segmentation import assert_trains, remove_clamps
from torch import nn

import mnv2_fused


@pytest.fixture(scope="module")
def smp(torchvision_mobilenetv2):
    return pytest.importorskip("segmentation_models_pytorch")


NETWORKS = {
    "Unet": {"decoder_channels": (32, 16, 16, 8, 8)},
    "DeepLabV3Plus": {"decoder_channels": 32},  # its encoder has output stride 16
    "DeepLabV3": {"decoder_channels": 32},  # 8
}


def make(smp, name):
    model = getattr(smp, name)("mobilenet_v2", encoder_weights=None, classes=5, **NETWORKS[name])
    return randomize(model, torch.randn(4, 3, 64, 64))


@pytest.mark.parametrize("name", NETWORKS)
def test_inference(smp, name):
    model, x = make(smp, name), torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        before = model(x)
    dilations = {m.dilation for m in model.encoder.features.modules() if isinstance(m, nn.Conv2d)}
    assert len(dilations) == {"Unet": 1, "DeepLabV3Plus": 2, "DeepLabV3": 3}[name]
    encoder = type(model.encoder)
    mnv2_fused.convert(model)
    after = check(model, x, ["network"])
    assert isinstance(model.encoder, encoder)
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-3)
    assert torch.equal(mnv2_fused.revert(model)(x), before) and type(model.encoder) is encoder


@pytest.mark.parametrize("name", NETWORKS)
def test_training(smp, name):
    def network():
        model = make(smp, name).train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        return mnv2_fused.convert(remove_clamps(model))

    assert_trains(network, (32, 32), seeds=1)
    model = mnv2_fused.convert(make(smp, name)).train()
    trained = operators(lambda: model(torch.randn(2, 3, 64, 64)))
    assert trained == ["train_dense", *["train_block"] * 17, "train_dense"]
