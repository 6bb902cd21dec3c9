"""Training from weights with another library's key names."""

from __future__ import annotations

import pytest
import torch
from runs import OPTIONS, checkpoint, run
from torch import nn

import mnv2_fused
from mnv2_fused import MobileNetV2, weights
from mnv2_fused import trainer as train
from mnv2_fused.weights import CONVENTIONS, layouts


@pytest.mark.parametrize("layout", [layouts.TIMM, layouts.TRANSFORMERS], ids=["timm", "transformers"])
def test_the_convention_goes_from_the_file_through_training(layout, pictures, tmp_path):
    convention = CONVENTIONS[layout.convention]
    torch.manual_seed(0)
    start = MobileNetV2(1001, 0.1, **convention.network())
    weights.randomize_batch_norm(start)
    names = {ours: name for name, ours in layout.modules.items()}
    theirs = {}
    for key, value in start.state_dict().items():
        module, _, leaf = key.rpartition(".")
        theirs[f"{names[module]}.{leaf}"] = value
    torch.save(theirs, tmp_path / "start.bin")
    out = tmp_path / "out"
    assert run("--data", str(pictures), "--output", str(out), *OPTIONS, "--weights", str(tmp_path / "start.bin")) == 0
    assert checkpoint(out)["arguments"]["convention"] == convention.name
    model = mnv2_fused.mobilenet_v2(weights=out / train.MODEL)
    norms = {(m.eps, m.momentum) for m in model.modules() if isinstance(m, nn.BatchNorm2d)}
    assert norms == {(convention.eps, convention.momentum)}
    assert weights.load(out / train.MODEL).convention.interpolation == convention.interpolation
    moved = (model.features[0][1].running_mean - start.features[0][1].running_mean).abs().max()
    assert moved > 0
