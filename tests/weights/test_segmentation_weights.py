"""Segmentation networks from files: what follows from the weights, and wrong files."""

from __future__ import annotations

import re

import pytest
import torch
from safetensors.torch import save_file

from mnv2_fused import MobileNetV2, deeplabv3_mobilenet_v2, weights
from mnv2_fused.weights import WeightsError

SMALL = {"num_classes": 4, "width_mult": 0.1}


def saved(path, model, metadata=None):
    """Writes the weights as converters do: without counters of batches."""
    state_dict = {k: v for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}
    save_file(state_dict, path, metadata)
    return path


def random_norms(model):
    weights.randomize_batch_norm(model)
    return model.eval()


@pytest.mark.parametrize(
    "options",
    [SMALL, {"width_mult": 0.5, "round_nearest": 4}, SMALL | {"aspp": True, "aux_loss": True}],
    ids=str,
)
@torch.no_grad()
def test_arguments_follow_from_the_file(tmp_path, options):
    ours, x = random_norms(deeplabv3_mobilenet_v2(**options)), torch.randn(1, 3, 33, 33)
    path = saved(tmp_path / "weights.safetensors", ours)
    found = deeplabv3_mobilenet_v2(path)
    assert found.training and (found.aux_classifier is not None) == options.get("aux_loss", False)
    assert torch.equal(found.eval()(x)["out"], ours(x)["out"])
    torch.save({"state_dict": ours.state_dict()}, tmp_path / "weights.pth")
    assert torch.equal(deeplabv3_mobilenet_v2(tmp_path / "weights.pth").eval()(x)["out"], ours(x)["out"])


@torch.no_grad()
def test_metadata_and_arguments(tmp_path):
    ours = random_norms(deeplabv3_mobilenet_v2(**SMALL, tf=True, output_stride=8))
    x = torch.randn(1, 3, 34, 34)
    facts = {"convention": "tensorflow", "output_stride": "8", "resolution": "257"}
    found = deeplabv3_mobilenet_v2(saved(tmp_path / "stated.safetensors", ours, facts)).eval()
    assert torch.equal(found(x)["out"], ours(x)["out"])
    assert (found.preprocessing.name, found.preprocessing.crop) == ("tensorflow", 257)
    assert found.backbone.features[0][1].eps == 1e-3
    silent = saved(tmp_path / "silent.safetensors", ours)
    given = deeplabv3_mobilenet_v2(silent, tf=True, output_stride=8).eval()
    assert torch.equal(given(x)["out"], ours(x)["out"])
    assert not torch.equal(deeplabv3_mobilenet_v2(silent).eval()(x)["out"], ours(x)["out"])


@torch.no_grad()
def test_identities_keep_their_eps(tmp_path):
    """Folded networks have batch norms that are identities with one eps only."""
    ours = deeplabv3_mobilenet_v2(**SMALL, tf=True, eps=1e-4)
    for norm in ours.backbone.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            norm.running_var.fill_(1 - 1e-4)
            norm.bias.normal_()
    path = saved(tmp_path / "folded.safetensors", ours)
    eps = {m.eps for m in deeplabv3_mobilenet_v2(path, tf=True).backbone.modules() if hasattr(m, "eps")}
    assert eps == {1e-4}
    assert deeplabv3_mobilenet_v2(path, eps=1e-5).backbone.features[0][1].eps == 1e-5
    ours.backbone.features[3].conv[3].running_mean[0] = 0.1
    path = saved(tmp_path / "trained.safetensors", ours)
    assert deeplabv3_mobilenet_v2(path, tf=True).backbone.features[0][1].eps == 1e-3


def test_backbone_from_a_classification_network(tmp_path):
    theirs = MobileNetV2(width_mult=0.1)
    torch.save(theirs.state_dict(), tmp_path / "imagenet.pth")
    model = deeplabv3_mobilenet_v2(weights_backbone=tmp_path / "imagenet.pth", **SMALL)
    assert torch.equal(model.backbone.features[17].conv[2].weight, theirs.features[17].conv[2].weight)
    with pytest.raises(WeightsError, match=r"imagenet.pth does not fit this Backbone: features.0"):
        deeplabv3_mobilenet_v2(weights_backbone=tmp_path / "imagenet.pth", width_mult=1.0)


def test_wrong_files(tmp_path):
    ours = deeplabv3_mobilenet_v2(**SMALL)
    path = saved(tmp_path / "weights.safetensors", ours)
    with pytest.raises(ValueError, match="deeplabv3_mobilenet_v2: num_classes must be that of the weights, 4; got 5"):
        deeplabv3_mobilenet_v2(path, num_classes=5)
    with pytest.raises(WeightsError, match=r"no standard MobileNetV2 with width_mult=1.0 has these channel counts"):
        deeplabv3_mobilenet_v2(path, width_mult=1.0)
    with pytest.raises(WeightsError, match=r"does not fit this DeepLabV3: missing classifier.aspp1.0.weight;"):
        deeplabv3_mobilenet_v2(path, aspp=True)
    torch.save(MobileNetV2(width_mult=0.1).state_dict(), tmp_path / "imagenet.pth")
    with pytest.raises(WeightsError, match=r"imagenet.pth holds no DeepLabv3 on MobileNetV2 .*backbone.features.0.0"):
        deeplabv3_mobilenet_v2(tmp_path / "imagenet.pth")
    for facts, message in (
        ({"output_stride": "32"}, "output_stride in its metadata: expected 8 or 16, got '32'"),
        ({"convention": "caffe"}, "convention in its metadata: expected one of"),
    ):
        stated = saved(tmp_path / "stated.safetensors", ours, facts)
        with pytest.raises(WeightsError, match=re.escape(f"{stated}: {message}")):
            deeplabv3_mobilenet_v2(stated)
    with pytest.raises(WeightsError, match=r"IMAGENET1K_V1 \(no weights of DeepLabv3 on MobileNetV2 are published\)"):
        deeplabv3_mobilenet_v2("IMAGENET1K_V1")
    with pytest.raises(WeightsError, match="weights must be the path of a file, got 5"):
        deeplabv3_mobilenet_v2(5)
    with pytest.raises(WeightsError, match="no such weights file"):
        deeplabv3_mobilenet_v2(tmp_path / "nothing.pth")
