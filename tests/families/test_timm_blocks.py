"""timm: single blocks and norms of its EfficientNet family."""

from __future__ import annotations

import pytest
import torch
from oracle import check, check_training, operators, randomize
from test_timm import NETWORK, TRAINED, make_small, reasons
from torch import nn

import mnv2_fused

# ------------------------------------------------------------------------------------------------------------ blocks


def make_block(blocks, name: str = "InvertedResidual", stride: int = 1, c_out: int = 8, **options) -> nn.Module:
    options = {"dw_kernel_size": 3, "act_layer": nn.ReLU6, **options}
    if name == "InvertedResidual":
        options["exp_ratio"] = 4
    return randomize(getattr(blocks, name)(8, c_out, stride=stride, **options), torch.randn(4, 8, 12, 12))


def timm_layers():
    return pytest.importorskip("timm.layers")


@pytest.mark.parametrize("name", ["InvertedResidual", "DepthwiseSeparableConv"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": 2, "pad_type": "same"},
        {"noskip": True, "dw_kernel_size": 5},
        {"dilation": 2},
        {"c_out": 12, "act_layer": nn.ReLU},
        {"drop_path_rate": 0.3, "noskip": True},  # it has nothing to drop
    ],
)
def test_a_block(blocks, name, options):
    block = mnv2_fused.convert(make_block(blocks, name, **options))
    x = torch.randn(4, 8, 12, 13)
    check(block, x, ["inverted_residual"])
    check_training(block.train(), x)
    assert reasons(block) == {}


def test_a_block_with_an_activation_behind_its_projection(blocks):
    block = mnv2_fused.convert(make_block(blocks, "DepthwiseSeparableConv", pw_act=True))
    check(block, torch.randn(4, 8, 12, 12), ["inverted_residual"])
    check_training(block.train(), torch.randn(4, 8, 12, 12))


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"se_layer": "SqueezeExcite"}, "se is a SqueezeExcite"),
        ({"act_layer": nn.Hardswish}, "bn2.act is a Hardswish"),
        ({"aa_layer": "blurpool", "stride": 2}, "aa is a BlurPool2d"),
        ({"s2d": 1, "noskip": True}, "conv_s2d"),
        ({"norm_layer": nn.GroupNorm}, "is a GroupNorm"),
    ],
)
@torch.no_grad()
def test_blocks_that_run_plain(timm, blocks, options, why):
    options = {name: getattr(blocks, o) if o == "SqueezeExcite" else o for name, o in options.items()}
    if options.get("norm_layer") is nn.GroupNorm:
        options["norm_layer"] = lambda channels, **_: nn.GroupNorm(2, channels)
    if "aa_layer" in options:
        options["aa_layer"] = timm_layers().BlurPool2d
    block = blocks.InvertedResidual(8, 8, exp_ratio=4, **options).eval()
    x = torch.randn(4, 8, 12, 12)
    expected = block(x)
    mnv2_fused.convert(block)
    assert why in reasons(block)["FusedInvertedResidual"]
    assert operators(lambda: block(x)) == [] and torch.equal(block(x), expected)


def test_a_drop_path_matters_in_training_alone(blocks):
    block = mnv2_fused.convert(make_block(blocks, drop_path_rate=0.5))
    x = torch.randn(4, 8, 12, 12)
    check(block, x, ["inverted_residual"])
    block.train()
    assert reasons(block) == {"FusedInvertedResidual": "drop_path is active"}
    assert operators(lambda: block(x)) == []
    block.drop_path.drop_prob = 0.0
    assert operators(lambda: block(x)) == ["train_block"]
    block.drop_path = nn.Dropout(0.5)
    assert "drop_path is a Dropout" in reasons(block)["FusedInvertedResidual"]


def test_a_dense_block(blocks):
    options = {"kernel_size": 3, "stride": 2, "pad_type": "same", "act_layer": nn.ReLU6}
    block = randomize(blocks.ConvBnAct(8, 12, **options), torch.randn(4, 8, 12, 12))
    check(mnv2_fused.convert(block), torch.randn(4, 8, 13, 12), ["dense"])
    check_training(block.train(), torch.randn(4, 8, 13, 12), ["train_dense", "train_dense_backward"])
    skip = mnv2_fused.convert(blocks.ConvBnAct(8, 8, 3, skip=True))
    assert reasons(skip) == {"FusedConvBnAct": "it has a shortcut"}


# ------------------------------------------------------------------------------------------------------------ norms


def test_frozen_norms(timm):
    model = timm_layers().freeze_batch_norm_2d(make_small(timm))
    frozen = [m for m in model.modules() if type(m).__name__ == "FrozenBatchNormAct2d"]
    assert len(frozen) > 10
    mnv2_fused.convert(model)
    check(model, torch.randn(4, 3, 40, 40), NETWORK)
    model.drop_rate = 0.0
    check_training(model.train(), torch.randn(4, 3, 40, 40), TRAINED, margin=1e-6)


def test_synchronised_norms(timm):
    model = timm_layers().convert_sync_batchnorm(make_small(timm))
    assert any(type(m).__name__ == "SyncBatchNormAct" for m in model.modules())
    check(mnv2_fused.convert(model), torch.randn(4, 3, 40, 40), NETWORK)


@torch.no_grad()
def test_a_norm_that_drops_runs_plain(blocks):
    block = make_block(blocks)
    block.bn2.drop = nn.Dropout(0.5)
    mnv2_fused.convert(block.eval())
    assert reasons(block) == {"FusedInvertedResidual": "bn2.drop is a Dropout"}


@torch.no_grad()
def test_two_activations_in_a_row_run_plain(timm, torchvision_mobilenetv2):
    model = torchvision_mobilenetv2.MobileNetV2(7, 0.5, [[6, 8, 1, 1]], norm_layer=timm_layers().BatchNormAct2d)
    model = mnv2_fused.convert(randomize(model, torch.randn(4, 3, 40, 40)))
    assert "has an activation of its own" in reasons(model)["features.1"]
    check(model, torch.randn(4, 3, 40, 40), [])
