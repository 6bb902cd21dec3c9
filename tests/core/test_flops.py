"""FLOP formulas of the operators against what PyTorch counts for plain modules: the same numbers, exactly."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils import flop_counter
from torch.utils.flop_counter import FlopCounterMode

import mnv2_fused
from mnv2_fused import functional
from mnv2_fused._core import call, flops


def count(function) -> tuple[int, set[str]]:
    """FLOPs of a call, and the operators that have them."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops(), {str(operator) for operator in counter.get_flop_counts()["Global"]}


@pytest.fixture
def runs_fused(monkeypatch):
    """Modules run fused under a FlopCounterMode, as they do in an exported graph. By themselves they run plain there,
    because it is a TorchDispatchMode.
    """
    monkeypatch.setattr(call, "call_reason", lambda x: None)


def check(model: nn.Module, function, operators: set[str]) -> None:
    """Fused and plain count the same. `operators`: those that the fused call counts."""
    model.fused = True
    fused, counted = count(function)
    assert counted == operators
    model.fused = False
    assert (fused, {"aten.convolution"}) == (count(function)[0], count(function)[1] & {"aten.convolution"})
    assert fused > 0


# ---------------------------------------------------------------------------------------------------------- inference


@pytest.mark.parametrize("size", [(2, 3, 32, 32), (1, 3, 33, 65)], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"width_mult": 1.4}, {"output_stride": 16}, {"output_stride": 8, "tf_padding": True}], ids=str
)
def test_network_in_one_operator(runs_fused, options, size):
    model = mnv2_fused.MobileNetV2(**({"width_mult": 0.1, "num_classes": 7} | options)).eval()
    x = torch.randn(size)
    with torch.inference_mode():
        check(model, lambda: model(x), {"mnv2_fused.network"})


def test_network_unit_by_unit(runs_fused):
    model = mnv2_fused.MobileNetV2(width_mult=0.1, num_classes=7).eval()
    model.avgpool = nn.Identity()  # a child that a MobileNetV2 does not have: no operator for the whole network
    model.features[3].register_forward_hook(lambda *_: None)
    x = torch.randn(2, 3, 33, 33)
    with torch.inference_mode():
        check(model, lambda: model(x), {f"mnv2_fused.{name}" for name in ("dense", "inverted_residual", "head")})


@pytest.mark.parametrize("expansion", [1, 6])
@pytest.mark.parametrize("window", [{}, {"dilation": 2}, {"tf_padding": True}], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
def test_block(runs_fused, expansion, window, stride):
    block = mnv2_fused.InvertedResidual(8, 8, stride, expansion, **window).eval()
    x = torch.randn(2, 8, 13, 10)
    with torch.inference_mode():
        check(block, lambda: block(x), {"mnv2_fused.inverted_residual"})


@pytest.mark.parametrize("padding", [(0, 0), (3, 1)], ids=str)
def test_block_with_another_padding(runs_fused, padding):
    block = mnv2_fused.InvertedResidual(8, 16, 2, 6).eval()
    block.conv[1][0].padding = padding
    x = torch.randn(2, 8, 13, 10)
    with torch.inference_mode():
        check(block, lambda: block(x), {"mnv2_fused.inverted_residual"})


def test_taps_of_a_detector(runs_fused, torchvision_mobilenetv2):
    model = mnv2_fused.ssdlite320_mobilenet_v2(num_classes=5, width_mult=0.1, size=(96, 96)).eval()
    x = torch.randn(1, 3, 96, 96)
    with torch.inference_mode():
        check(model, lambda: model.head_outputs(x), {"mnv2_fused.network"})


def test_taps_of_a_segmentation_backbone(runs_fused):
    model = mnv2_fused.deeplabv3_mobilenet_v2(width_mult=0.35, tf=True, output_stride=8).eval()
    x = torch.randn(1, 3, 65, 65)
    with torch.inference_mode():
        check(model.backbone, lambda: model.backbone(x), {"mnv2_fused.network"})


def test_functions_on_packed_weights():
    x, weight = torch.randn(2, 6, 9, 9), torch.randn(12, 6, 3, 3)
    packed = functional.pack_dense(weight, None)
    fused, counted = count(lambda: functional.run_dense(x, packed, stride=2))
    assert counted == {"mnv2_fused.dense"}
    assert fused == count(lambda: torch.conv2d(x, weight, stride=2, padding=1))[0]


def test_exported_graph():
    model = mnv2_fused.MobileNetV2(width_mult=0.1, num_classes=7).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        exported = torch.export.export(model, (x,)).module()
        fused, counted = count(lambda: exported(x))
        model.fused = False
        assert fused == count(lambda: model(x))[0]
    assert counted == {"mnv2_fused.cached_network"}


def test_exported_units():
    model = mnv2_fused.deeplabv3_mobilenet_v2(width_mult=0.35, num_classes=7).eval()
    x = torch.randn(1, 320, 9, 9)[:, :112]
    head = model.classifier
    with torch.no_grad():
        exported = torch.export.export(head, (x,)).module()
        fused, counted = count(lambda: exported(x))
        plain, _ = count(lambda: head(x))
    assert fused == plain and "mnv2_fused.cached_dense" in counted


# ----------------------------------------------------------------------------------------------------------- training

TRAINED = {f"mnv2_fused.train_{name}" for name in ("block", "block_backward", "dense", "dense_backward")}


@pytest.mark.parametrize("options", [{}, {"output_stride": 8, "tf_padding": True}], ids=str)
@pytest.mark.parametrize("from_input", [False, True], ids=["weights", "weights and input"])
def test_training_step(runs_fused, options, from_input):
    model = mnv2_fused.MobileNetV2(width_mult=0.1, num_classes=7, **options).train()
    x = torch.randn(2, 3, 65, 33, requires_grad=from_input)
    check(model, lambda: model(x).sum().backward(), TRAINED | {"aten.addmm", "aten.mm"})


def names(text: str) -> set[str]:
    return {f"conv.{name}" for name in text.split()}


@pytest.mark.parametrize("trained", ["", "0.0.weight", "0.1.bias", "1.0.weight", "1.1.weight", "2.weight", "3.bias"])
@pytest.mark.parametrize("from_input", [False, True], ids=["weights", "weights and input"])
@pytest.mark.parametrize("evaluates", [False, True], ids=["batch", "fixed"])
def test_only_gradients_that_are_needed_count(runs_fused, trained, from_input, evaluates):
    """What is frozen in front of a convolution saves the gradient of its input, in both."""
    block = mnv2_fused.InvertedResidual(8, 16, 2, 6).train(not evaluates)
    for name, parameter in block.named_parameters():
        parameter.requires_grad_(name in names(trained))
    x = torch.randn(2, 8, 9, 9, requires_grad=from_input)
    if not from_input and not trained:
        return
    check(block, lambda: block(x).sum().backward(), {"mnv2_fused.train_block", "mnv2_fused.train_block_backward"})


# ------------------------------------------------------------------------------------------------------- registration


def test_every_operator_that_computes_convolutions_has_a_formula():
    registered = {str(operator) for operator in flop_counter.flop_registry if "mnv2_fused" in str(operator)}
    assert registered == {f"mnv2_fused.{name}" for name in flops._FORMULAS}


def run(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


REGISTERED = "assert torch.ops.mnv2_fused.network in counter.flop_registry, 'not registered'\n"


def test_the_package_does_not_import_the_counter():
    run(
        "import importlib, importlib.util, sys, torch, mnv2_fused\n"
        "assert 'torch.utils.flop_counter' not in sys.modules, 'imported'\n"
        "assert importlib.util.find_spec('torch.utils.flop_counter')\n"
        "import torch.utils.flop_counter as counter\n" + REGISTERED + "importlib.reload(counter)\n" + REGISTERED
    )


def test_a_counter_that_was_imported_first_gets_the_formulas():
    run("import torch.utils.flop_counter as counter\nimport torch, mnv2_fused\n" + REGISTERED)
