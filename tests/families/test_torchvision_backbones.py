"""torchvision's MNASNet, and MobileNetV2 inside detection and segmentation networks with frozen batch norms."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from oracle import check, check_training, operators, plain, randomize
from torch import nn

import mnv2_fused
from mnv2_fused import extras

NETWORK = ["network"]


def use(name: str):
    try:
        return extras.use(f"torchvision.models.{name}", "detection")
    except ImportError as error:
        pytest.skip(str(error))


def reasons(model: nn.Module) -> dict[str, str]:
    return {name: why for name, why in mnv2_fused.explain(model).items() if why is not None}


class Joined(nn.Module):
    """A backbone whose maps are joined into one tensor."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x):
        maps = self.model(x)
        return torch.cat([y.flatten(1) for y in (maps.values() if isinstance(maps, dict) else maps)], 1)


# ----------------------------------------------------------------------------------------------------------- MNASNet


def make_mnasnet(alpha: float = 0.35) -> nn.Module:
    model = use("mnasnet").MNASNet(alpha, num_classes=7, dropout=0.0)
    return randomize(model.eval(), torch.randn(4, 3, 64, 64))


@torch.no_grad()
def test_mnasnet_is_one_operator():
    model, x = make_mnasnet(), torch.randn(4, 3, 64, 64)
    expected, state = model(x), model.state_dict(keep_vars=True)
    kinds = {name: type(m) for name, m in model.named_modules()}
    mnv2_fused.convert(model)
    found = mnv2_fused.explain(model)
    assert len(found) == 19 and set(found.values()) == {None} and mnv2_fused.explain(model, x) == found
    assert list(found)[:3] == ["layers.0", "layers.3", "layers.8.0"] and list(found)[-1] == "layers.14"
    check(model, x, NETWORK)
    assert all(tensor is state[name] for name, tensor in model.state_dict(keep_vars=True).items())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert operators(lambda other=other: other(x)) == NETWORK
    assert torch.equal(torch.jit.script(model)(x), plain(model)(x))
    program = torch.export.export(model, (x,))
    assert torch.equal(program.module()(x), model(x)) and "cached_network" in program.graph_module.code
    assert torch.equal(mnv2_fused.revert(model)(x), expected)
    assert {name: type(m) for name, m in model.named_modules()} == kinds


@torch.no_grad()
def test_mnasnet_with_another_classifier_or_hooks():
    x, model, seen = torch.randn(16, 3, 64, 64), mnv2_fused.convert(make_mnasnet()), []
    model.classifier = nn.Sequential(nn.Linear(1280, 64), nn.ReLU(), nn.Linear(64, 32))
    check(model, x, NETWORK)
    handle = model.layers[9].register_forward_hook(lambda *arguments: seen.append(1))
    check(model, x, ["dense", *["inverted_residual"] * 17, "dense"])
    assert seen
    handle.remove()
    model.layers[1].register_forward_hook(lambda *arguments: None)
    assert reasons(model) == {"layers.0": "layers.1 has hooks"}
    check(model, x, [*["inverted_residual"] * 17, "dense"])
    model.layers = model.layers[:14]
    assert set(reasons(model)) == {"layers.0", "layers.3", "layers.14"}
    model.classifier = nn.Identity()
    check(model, x, ["inverted_residual"] * 16)


def test_mnasnet_trains():
    model = make_mnasnet().train()
    kept = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {norm.momentum for norm in kept} == {1 - 0.9997}
    model.layers = nn.Sequential(
        *model.layers[:8], *(nn.Sequential(stack[0]) for stack in model.layers[8:14]), *model.layers[14:]
    )
    units = ["train_dense", *["train_block"] * 7, "train_dense"]
    mnv2_fused.convert(model)
    assert reasons(model) == {}
    x = torch.randn(4, 3, 64, 64)
    assert operators(lambda: model(x).sum().backward()) == [*units, *[f"{name}_backward" for name in units]]
    block = mnv2_fused.convert(use("mnasnet")._InvertedResidual(8, 8, 5, 1, 3, bn_momentum=0.2))
    randomize(block, torch.randn(4, 8, 12, 12))
    check_training(block.train(), torch.randn(4, 8, 12, 12))


# ------------------------------------------------------------------------------------------------------- MobileNetV3


def make_v3_block(**options) -> nn.Module:
    file = use("mobilenetv3")
    config = {"input_channels": 8, "kernel": 5, "expanded_channels": 24, "out_channels": 8, "use_se": False}
    config |= {"activation": "RE", "stride": 1, "dilation": 1, "width_mult": 1.0, **options}
    block = file.InvertedResidual(file.InvertedResidualConfig(*config.values()), nn.BatchNorm2d)
    return randomize(block, torch.randn(4, 8, 12, 12))


@pytest.mark.parametrize(
    "options", [{}, {"expanded_channels": 8}, {"stride": 2}, {"stride": 2, "dilation": 2}, {"out_channels": 16}]
)
def test_a_mobilenetv3_block(options):
    block = mnv2_fused.convert(make_v3_block(**options))
    check(block, torch.randn(4, 8, 12, 12), ["inverted_residual"])
    check_training(block.train(), torch.randn(4, 8, 12, 12))


@torch.no_grad()
def test_mobilenetv3_runs_block_by_block():
    model, x = use("mobilenetv3").mobilenet_v3_large(num_classes=7), torch.randn(2, 3, 64, 64)
    randomize(model, x)
    before = model(x)
    found = mnv2_fused.explain(mnv2_fused.convert(model))
    assert [name for name, why in found.items() if why is None] == [f"features.{i}" for i in (1, 2, 3)]
    assert "block.2 is a SqueezeExcitation" in found["features.4"] and "Hardswish" in found["features.0"]
    torch.testing.assert_close(model(x), before, rtol=1e-2, atol=1e-2 * before.abs().max().item())
    assert torch.equal(mnv2_fused.revert(model)(x), before)


# --------------------------------------------------------------------------------------------------------- backbones


@torch.no_grad()
def freeze(model: nn.Module) -> nn.Module:
    """Random statistics and parameters of frozen norms, near those of the data."""
    frozen = use("_utils") and [m for m in model.modules() if type(m).__name__ == "FrozenBatchNorm2d"]
    assert frozen
    for norm in frozen:
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.normal_(std=0.5)
        norm.running_mean.normal_(std=0.1)
        norm.running_var.uniform_(0.5, 1.5)
    return model


def make_fpn(**options) -> nn.Module:
    utils = use("detection.backbone_utils")
    model = utils.mobilenet_backbone(backbone_name="mobilenet_v2", weights=None, fpn=True, **options)
    return freeze(model).eval()


@torch.no_grad()
def test_a_pyramid_on_frozen_norms():
    model = mnv2_fused.convert(make_fpn())
    found = mnv2_fused.explain(model)
    assert len(found) >= 18 and set(found.values()) == {None}
    check(Joined(model), torch.randn(2, 3, 64, 96))


@pytest.mark.parametrize("trainable", [2, 6])
def test_a_pyramid_trains(trainable):
    # torchvision freezes the first stages.
    model = mnv2_fused.convert(make_fpn(trainable_layers=trainable)).train()
    assert reasons(model) == {}
    x = torch.randn(2, 3, 64, 64)
    run = operators(lambda: Joined(model)(x).sum().backward())
    assert run.count("train_block_backward") == {2: 4, 6: 17}[trainable]

    def gradients(model, x):
        model.zero_grad()
        Joined(model)(x).square().mean().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    reference = plain(model)
    ours, theirs, exact = (
        gradients(model, x),
        gradients(reference, x),
        gradients(copy.deepcopy(reference).double(), x.double()),
    )
    assert ours.keys() == theirs.keys()

    def error(found):
        each = [(found[name] - right).norm() / right.norm() for name, right in exact.items()]
        return torch.stack(each).median().item()

    assert error(ours) <= 3 * error(theirs)


@pytest.mark.parametrize("name", ["faster_rcnn.FasterRCNN", "retinanet.RetinaNet"])
@torch.no_grad()
def test_detectors(name):
    file, _, kind = name.partition(".")
    model = getattr(use(f"detection.{file}"), kind)(make_fpn(), 3, min_size=64, max_size=96).eval()
    mnv2_fused.convert(model)

    class Network(nn.Module):
        """What comes before the boxes are chosen."""

        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            head = self.model.rpn.head if hasattr(self.model, "rpn") else self.model.head
            outputs = head(list(self.model.backbone(x).values()))
            outputs = outputs.values() if isinstance(outputs, dict) else [*outputs[0], *outputs[1]]
            return torch.cat([y.flatten(1) for y in outputs], 1)

    check(Network().eval(), torch.randn(2, 3, 64, 96))
    assert operators(lambda: model.backbone(torch.randn(1, 3, 64, 96)))
    assert reasons(model) == {}


@pytest.mark.parametrize("kind", ["deeplab", "lraspp"])
@pytest.mark.parametrize("frozen", [False, True])
def test_segmentation(torchvision_mobilenetv2, kind, frozen):
    options = {"norm_layer": use("_utils") and pytest.importorskip("torchvision.ops.misc").FrozenBatchNorm2d}
    features = torchvision_mobilenetv2.MobileNetV2(width_mult=0.35, **(options if frozen else {})).features
    channels = features[3].out_channels, features[17].out_channels
    getter = use("_utils").IntermediateLayerGetter
    if kind == "deeplab":
        file = use("segmentation.deeplabv3")
        backbone = getter(features, {"17": "out"})
        model = file.DeepLabV3(backbone, file.DeepLabHead(channels[1], 5, (2, 4)))
    else:
        backbone = getter(features, {"3": "low", "17": "high"})
        model = use("segmentation.lraspp").LRASPP(backbone, *channels, num_classes=5, inter_channels=16)
    if frozen:
        freeze(model)
    x = torch.randn(4, 3, 64, 64)
    randomize(Joined(model.eval()), x)
    mnv2_fused.convert(model)
    with torch.no_grad():
        assert set(mnv2_fused.explain(model).values()) == {None}
        check(Joined(model).eval(), x)
    model.train()
    run = operators(lambda: model(x)["out"].sum().backward())
    assert run.count("train_block") == run.count("train_block_backward") == 17


@torch.no_grad()
def test_a_network_cut_inside_a_block(torchvision_mobilenetv2):
    # As SSDLite takes the expansion of a block.
    features = torchvision_mobilenetv2.MobileNetV2(width_mult=0.35).features
    randomize(features.eval(), torch.randn(4, 3, 64, 64))
    cut = features[14].conv
    first = nn.Sequential(*features[:14], cut[0])
    second = nn.Sequential(cut[1:], *features[15:])
    model = mnv2_fused.convert(nn.Sequential(first, second))
    check(model, torch.randn(4, 3, 64, 64))
    assert len(mnv2_fused.explain(model)) >= 17 and reasons(model) == {}


# --------------------------------------------------------------------------------------------------------- the trap


class InvertedResidual(nn.Module):
    """A block with torchvision's names and attributes that pads before its expansion, as some public code does."""

    def __init__(self, layers: nn.Sequential, shortcut: bool):
        super().__init__()
        self.conv, self.use_res_connect, self.stride, self.out_channels = layers, shortcut, 1, 8

    def forward(self, x):
        padded = F.pad(x, (1, 1, 1, 1))
        return x + self.conv(padded) if self.use_res_connect else self.conv(padded)


@torch.no_grad()
def test_a_block_with_the_same_attributes_is_left_alone(torchvision_mobilenetv2):
    theirs = torchvision_mobilenetv2.InvertedResidual(8, 8, 1, 6)
    theirs.conv[1][0].padding = (0, 0)
    block = randomize(InvertedResidual(theirs.conv, True), torch.randn(4, 8, 12, 12))
    x = torch.randn(4, 8, 12, 12)
    expected = block(x)
    model = nn.Sequential(block, torchvision_mobilenetv2.InvertedResidual(8, 8, 1, 6).eval())
    mnv2_fused.convert(model)
    assert type(block) is InvertedResidual and list(mnv2_fused.explain(model)) == ["1"]
    assert torch.equal(block(x), expected)
