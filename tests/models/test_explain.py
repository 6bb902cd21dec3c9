"""explain and report_fusion say what runs fused, what runs plain, and why."""

from __future__ import annotations

import pytest
import torch
from oracle import check, operators
from test_model import NETWORK, make_small
from torch import nn

import mnv2_fused


def test_explain():
    model, x = make_small(), torch.randn(8, 3, 40, 40)
    names = [*(f"features.{i}" for i in range(6)), "head"]
    found = mnv2_fused.explain(model)
    assert list(found) == names and set(found.values()) == {None}  # with gradients they train fused
    assert set(mnv2_fused.explain(model.train()).values()) == {None}
    model.eval()
    with torch.inference_mode():
        assert mnv2_fused.explain(model) == dict.fromkeys(names)
        assert mnv2_fused.explain(model, x) == dict.fromkeys(names)
        model.features[3].conv[0][2] = nn.SiLU()
        model.classifier[1].register_forward_hook(lambda *arguments: None)
        found = mnv2_fused.explain(model, x)
        assert {name for name, why in found.items() if why} == {"features.3"}  # the classifier runs as it is
        assert "SiLU" in found["features.3"]
        assert "features.3  plain: conv.0.2 is a SiLU" in str(found) and "features.2  fused" in str(found)
        check(model, x, ["dense", *["inverted_residual"] * 3, "dense"])
    with torch.no_grad():
        assert set(mnv2_fused.explain(model.double(), x.double()).values()).isdisjoint({None})
        assert "float64" in mnv2_fused.explain(model)["features.1"]
    assert "no mnv2_fused unit" in str(mnv2_fused.explain(nn.Linear(1, 1)))
    with pytest.raises(TypeError, match=r"explain: model must be a torch.nn.Module; got a int"):
        mnv2_fused.explain(3)


@pytest.mark.parametrize("count", [0, 1, 3, 5])
@torch.no_grad()
def test_explain_of_a_cut_backbone(count):
    model, x = make_small(), torch.randn(8, 3, 40, 40)
    model.features, model.classifier = model.features[:count], nn.Identity()
    for found in (mnv2_fused.explain(model), mnv2_fused.explain(model, x)):
        assert list(found) == [*(f"features.{i}" for i in range(count)), "head"]
        assert {name for name, why in found.items() if why} == {"head"}
    check(model, x, {0: [], 1: ["dense"]}.get(count, ["network"]))


@torch.no_grad()
def test_explain_says_what_happens():
    """After any change the units that `explain` calls fused run their operators, and no others do."""
    x = torch.randn(8, 3, 40, 40)

    changes = {
        "hook on features": lambda m: m.features.register_forward_hook(lambda *_: None),
        "hook on a unit": lambda m: m.features[2].register_forward_hook(lambda *_: None),
        "hook on the last": lambda m: m.features[-1].register_forward_hook(lambda *_: None),
        "activation": lambda m: setattr(m.features[2].conv[0], "2", nn.SiLU()),
        "unit off": lambda m: setattr(m.features[1], "fused", False),
        "last off": lambda m: setattr(m.features[-1], "fused", False),
        "all off": lambda m: setattr(m, "fused", False),
        "own classifier": lambda m: setattr(m, "classifier", nn.Linear(m.last_channel, 3)),
        "one norm trains": lambda m: m.features[3].conv[0][1].train(),
    }
    for name, change in changes.items():
        model = make_small()
        change(model)
        found = mnv2_fused.explain(model, x)
        run = operators(lambda model=model: model(x))
        if run == NETWORK:
            assert set(found.values()) == {None}, name
            continue
        fused = [unit for unit, why in found.items() if why is None]
        if found["head"] is None:  # the head's operator includes the last convolution
            fused.remove("features.5")
        assert len(run) == len(fused), (name, run, found)
