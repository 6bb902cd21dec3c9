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


# ---------------------------------------------------------------------------------------------- encoders from timm

ENCODERS = {"timm-tf_efficientnet_lite0": 17, "tu-mobilenetv2_035": 18, "tu-efficientnet_lite0": 17}


def make_with(smp, encoder: str, name: str = "Unet", **options):
    pytest.importorskip("timm")
    options = {"decoder_channels": (32, 16, 16, 8, 8)[: options.get("encoder_depth", 5)], **options}
    model = getattr(smp, name)(encoder, encoder_weights=None, classes=5, **options)
    return randomize(model, torch.randn(4, 3, 64, 64))


@pytest.mark.parametrize("encoder", ENCODERS)
def test_encoders_of_timm(smp, encoder):
    model, x = make_with(smp, encoder), torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        before = model(x)
    mnv2_fused.convert(model)
    with torch.no_grad():
        found = mnv2_fused.explain(model, x)
    assert len(found) == ENCODERS[encoder] and set(found.values()) == {None}
    check(model, x, ["network"])
    assert torch.equal(mnv2_fused.revert(model)(x), before)


@pytest.mark.parametrize("encoder", ["timm-tf_efficientnet_lite0", "tu-mobilenetv2_035"])
@pytest.mark.parametrize("options", [{"encoder_depth": 3}, {"name": "DeepLabV3", "decoder_channels": 32}])
def test_depths_and_output_strides_of_encoders_of_timm(smp, encoder, options):
    model = mnv2_fused.convert(make_with(smp, encoder, **options))
    check(model, torch.randn(2, 3, 64, 96), ["network"])


def test_training_of_encoders_of_timm(smp):
    model = mnv2_fused.convert(make_with(smp, "timm-tf_efficientnet_lite0").train())
    plain_units = {name: why for name, why in mnv2_fused.explain(model).items() if why is not None}
    assert set(plain_units.values()) == {"drop_path is active"} and len(plain_units) < 16
    for module in model.modules():
        if type(module).__name__ == "DropPath":
            module.drop_prob = 0.0
    assert operators(lambda: model(torch.randn(2, 3, 64, 64))) == ["train_dense", *["train_block"] * 16]


@torch.no_grad()
def test_scripts_with_encoders_of_timm(smp):
    model = mnv2_fused.convert(make_with(smp, "timm-tf_efficientnet_lite0").encoder)
    x = torch.randn(2, 3, 64, 64)
    for ours, theirs in zip(torch.jit.script(model)(x), model(x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
