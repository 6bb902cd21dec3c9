"""Blocks that SSDLite adds: one that hands out its expansion, extra layers with an activation, predictors."""

from __future__ import annotations

import copy

import pytest
import torch
from oracle import check, check_training, operators, randomize
from torch import nn

import mnv2_fused
from mnv2_fused.models.ssdlite_parts import ExtraLayer, Predictor
from mnv2_fused.models.units import InvertedResidual, TappedInvertedResidual

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ONE = ["inverted_residual"]


class Both(nn.Module):
    """A tapped block whose output is both of its maps, the same number of pixels of each."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x):
        y, expanded = self.block(x, with_expansion=True)
        return torch.cat([y, 0.5 * expanded[:, :, : y.shape[2], : y.shape[3]]], 1)


VARIANTS = {
    "extra": lambda: (ExtraLayer(20, 10, 24, nn.BatchNorm2d, False), 20),
    "extra, SAME": lambda: (ExtraLayer(50, 49, 17, nn.BatchNorm2d, True), 50),
    "predictor": lambda: (Predictor(60, 24, nn.BatchNorm2d), 60),
    "wide predictor": lambda: (Predictor(24, 546, nn.BatchNorm2d), 24),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(10, 9), (3, 2), (1, 1)], ids=str)
@pytest.mark.parametrize("name", VARIANTS)
def test_inference(name, size, dtype):
    block, channels = VARIANTS[name]()
    x = torch.randn(3, channels, *size)
    block = randomize(block, torch.randn(4, channels, 12, 12)).to(dtype)
    check(block, x.to(dtype), ONE)
    check(block, x.to(dtype).to(memory_format=torch.channels_last), ONE)


@pytest.mark.parametrize("frozen", [False, True], ids=["batch", "frozen"])
@pytest.mark.parametrize("name", VARIANTS)
def test_training(name, frozen):
    block, channels = VARIANTS[name]()
    block = randomize(block, torch.randn(4, channels, 12, 12)).train()
    if frozen:
        for module in block.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
    x = torch.randn(4, channels, 12, 11).to(memory_format=torch.channels_last)
    found = check_training(block, x)
    assert ("gradient of 1.bias" in found) == ("predictor" in name)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tapped_block(dtype, stride):
    block = randomize(TappedInvertedResidual(24, 24, stride, 6), torch.randn(4, 24, 12, 12)).to(dtype)
    x = torch.randn(2, 24, 9, 10).to(dtype)
    check(Both(block), x, ["dense", *ONE])
    check(block, x, ONE)
    check(Both(block), x, ["dense", *ONE])  # the cache of the whole block is not taken for that of its second part
    same = InvertedResidual(24, 24, stride, 6).to(dtype).eval()
    same.load_state_dict(block.state_dict())
    with torch.no_grad():
        assert torch.equal(same(x), block(x))


@pytest.mark.parametrize("stride", [1, 2])
def test_gradient_of_the_tap(stride):
    block = randomize(Both(TappedInvertedResidual(24, 24, stride, 6)), torch.randn(4, 24, 12, 12)).train()
    x = torch.randn(4, 24, 12, 11).to(memory_format=torch.channels_last)
    found = check_training(
        block, x, ["train_dense", "train_block", "train_block_backward", "train_dense_backward"], formats=False
    )
    alone = copy.deepcopy(block.block)
    alone.zero_grad()
    given = x.clone().requires_grad_(True)
    y, _ = alone(given, with_expansion=True)
    y.sum().backward()
    assert not torch.allclose(given.grad, found["gradient of the input"])  # the tap has a share


def test_hooks_on_the_expansion_fire():
    block, seen = TappedInvertedResidual(8, 8, 1, 6).eval(), []
    block.conv[0].register_forward_hook(lambda module, given, y: seen.append(y))
    with torch.no_grad():
        _, expanded = block(torch.randn(1, 8, 5, 5), with_expansion=True)
        assert torch.equal(seen[0], expanded)
        block(torch.randn(1, 8, 5, 5))
    assert len(seen) == 2


def test_explain_names_what_is_unusual():
    block = Predictor(8, 6, nn.BatchNorm2d).eval().requires_grad_(False)
    assert mnv2_fused.explain(block) == {"Predictor": None}
    block[1].stride = (2, 2)
    assert mnv2_fused.explain(block)["Predictor"] == "1 is grouped or strided"
    assert operators(lambda: block(torch.randn(1, 8, 4, 4))) == []
