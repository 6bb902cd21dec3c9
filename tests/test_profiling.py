"""Profiles name units, by path in `unit_by_unit`, else by class and channels."""

from __future__ import annotations

import pytest
import torch
from oracle import operators, randomize
from torch import nn

import mnv2_fused
from mnv2_fused._core import profile as names

SMALL = [[1, 8, 1, 1], [6, 16, 2, 2]]


def make() -> nn.Module:
    return randomize(mnv2_fused.MobileNetV2(7, 0.5, SMALL), torch.randn(4, 3, 40, 40))


def rows(call) -> list[str]:
    """Names of the outermost rows of a profile that are no operator of PyTorch."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    return [e.name for e in profile.events() if e.cpu_parent is None and not e.name.startswith(("aten::", "["))]


@torch.no_grad()
def test_units_by_path():
    class Task(nn.Module):
        def __init__(self):
            super().__init__()
            self.trunk = make()

        def forward(self, x):
            return self.trunk(x)

    model, x = Task().eval(), torch.randn(2, 3, 40, 40)
    y = model(x)
    assert rows(lambda: model(x)) == ["mnv2_fused::network"]
    with mnv2_fused.unit_by_unit(model):
        with mnv2_fused.unit_by_unit(model):
            pass
        assert rows(lambda: model(x)) == [*(f"trunk.features.{i}" for i in range(4)), "trunk.head"]
        assert torch.equal(model(x), y)
        model.trunk.features[2].fused = False  # a unit that runs plain has a row, too
        assert rows(lambda: model(x)) == [*(f"trunk.features.{i}" for i in range(4)), "trunk.head"]
        del model.trunk.features[2].fused
    assert operators(lambda: model(x)) == ["network"]
    assert "_unit_by_unit" not in vars(model.trunk) and len(names.names) == 0


@torch.no_grad()
def test_units_alone_have_class_and_channels():
    model, x = make(), torch.randn(2, 3, 40, 40)
    assert rows(lambda: model.features[:](x)) == [
        "FusedConv2dNormActivation(3, 16)",
        "InvertedResidual(16, 8)",
        "InvertedResidual(8, 8)",
        "InvertedResidual(8, 8)",
        "FusedConv2dNormActivation(8, 1280)",
    ]
    block = model.features[1]
    assert rows(lambda: block(torch.randn(1, 16, 9, 9))) == ["InvertedResidual(16, 8)"]
    with mnv2_fused.unit_by_unit(block):
        assert rows(lambda: block(torch.randn(1, 16, 9, 9))) == ["InvertedResidual(16, 8)"]


def test_training():
    model, x = make().train(), torch.randn(2, 3, 40, 40)
    with mnv2_fused.unit_by_unit(model):
        found = rows(lambda: model(x).sum())
    assert [name for name in found if "features" in name] == [f"features.{i}" for i in range(4)]


@torch.no_grad()
def test_nothing_without_a_profiler():
    assert names.region(make().features[1]) is names.region(make())


def test_the_model_is_restored_after_an_error():
    model = make()
    with pytest.raises(ZeroDivisionError), mnv2_fused.unit_by_unit(model):
        raise ZeroDivisionError
    with torch.no_grad():
        assert operators(lambda: model(torch.randn(1, 3, 40, 40))) == ["network"]
    with pytest.raises(TypeError, match=r"unit_by_unit: model must be a torch.nn.Module; got a int"):
        mnv2_fused.unit_by_unit(3).__enter__()
