"""SSDLite: structure, anchors, detections, weights in files, bad input."""

from __future__ import annotations

import copy
import pickle
import re
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from detectors import SSD, Outputs, make, make_images, make_targets
from oracle import check, operators, plain
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode

import mnv2_fused
from mnv2_fused import extras
from mnv2_fused.models import boxes as box_functions
from mnv2_fused.models.ssdlite import AnchorGenerator
from mnv2_fused.models.ssdlite_parts import Backbone, ScoringHead
from mnv2_fused.weights import WeightsError

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "detection.md"
CONVENTIONS = {"torchvision": False, "tensorflow": True}
both = pytest.mark.parametrize("tf", CONVENTIONS.values(), ids=CONVENTIONS)


def as_torchvision(model, monkeypatch):
    """Torchvision's SSD over the same modules. Its suppression needs a compiled library, which may be missing."""
    box_ops = extras.use("torchvision.ops.boxes", "detection")
    monkeypatch.setattr(box_ops, "batched_nms", lambda *a: box_functions.non_maximum_suppression(*a, len(a[0])))
    names = ("score_thresh", "nms_thresh", "detections_per_img", "topk_candidates")
    options = {name: getattr(model, name) for name in names}
    mean, size = model.transform.image_mean, model.transform.fixed_size
    theirs = SSD(
        model.backbone, model.anchor_generator, size, 0, image_mean=mean, image_std=mean, head=model.head, **options
    )
    return theirs.train(model.training)


@pytest.mark.parametrize(("num_classes", "parameters", "products"), [(81, 4337013, 788.8), (91, 4500543, 804.4)])
def test_size_of_the_network(num_classes, parameters, products):
    model = mnv2_fused.ssdlite320_mobilenet_v2(num_classes=num_classes, fused=False).eval()
    assert sum(p.numel() for p in model.parameters()) == parameters
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        outputs = model.head_outputs(torch.zeros(1, 3, 320, 320))
    assert counter.get_total_flops() / 2e6 == pytest.approx(products, abs=0.05)
    assert outputs["bbox_regression"].shape == (1, 2034, 4)
    assert outputs["cls_logits"].shape == (1, 2034, num_classes)


@pytest.mark.parametrize("size", [(320, 320), (300, 300), (224, 350), (33, 64)], ids=str)
def test_anchors_fit_the_maps(size):
    model = mnv2_fused.ssdlite320_mobilenet_v2(width_mult=0.1, size=size).eval()
    x = torch.zeros(1, 3, size[1], size[0])
    maps = list(model.backbone(x).values())
    assert [m.shape[1] for m in maps] == model.backbone.out_channels
    anchors = model.anchor_generator.boxes(size[1], size[0])
    images = extras.use("torchvision.models.detection.image_list", "detection").ImageList(x, [x.shape[-2:]])
    assert torch.equal(anchors, model.anchor_generator(images, maps)[0])
    assert len(anchors) == model.head_outputs(x)["cls_logits"].shape[1]


def test_shapes_of_anchors():
    anchors = AnchorGenerator().boxes(320, 320).double() / 320
    centre, size = (anchors[:, :2] + anchors[:, 2:]) / 2, anchors[:, 2:] - anchors[:, :2]
    torch.testing.assert_close(centre[0], torch.tensor([0.025, 0.025]).double(), atol=1e-6, rtol=0)
    half = 0.5**0.5
    first = [[0.1, 0.1], [0.2 / half, 0.2 * half], [0.2 * half, 0.2 / half]]
    torch.testing.assert_close(size[:3], torch.tensor(first).double(), atol=1e-6, rtol=0)
    last = size[-6:]
    torch.testing.assert_close(
        last[:, 0] * last[:, 1], torch.tensor([0.95**2] * 5 + [0.95]).double(), atol=1e-5, rtol=0
    )
    ratios = torch.tensor([1, 2, 0.5, 3, 0.3333, 1]).double()
    torch.testing.assert_close(last[:, 0] / last[:, 1], ratios, atol=1e-5, rtol=0)
    assert last.max() > 1.6  # not clipped


@both
@torch.no_grad()
def test_outputs_are_right(tf):
    model = make(tf=tf)
    x = torch.randn(2, 3, 96, 96)
    check(Outputs(model), x)
    assert operators(lambda: model.head_outputs(x)) == ["network"]
    model.backbone.extra[0].register_forward_hook(lambda *_: None)
    check(Outputs(model), x)
    one_by_one = operators(lambda: model.head_outputs(x))
    # The stem, block 14's expansion and features.18; 17 blocks, 4 extra layers and 12 predictors.
    assert sorted(set(one_by_one)) == ["dense", "inverted_residual"]
    assert (one_by_one.count("dense"), one_by_one.count("inverted_residual")) == (3, 33)
    model.fused = False
    assert operators(lambda: model.head_outputs(x)) == []
    assert not model.backbone.features[3].fused


@torch.no_grad()
def test_tap_is_the_expansion_of_block_14():
    model = make(tf=True)
    seen = []
    model.backbone.features[14].conv[0].register_forward_hook(lambda module, given, y: seen.append(y))
    maps = list(model.backbone(torch.randn(2, 3, 96, 96)).values())
    assert torch.equal(maps[0], seen[0]) and 0 <= maps[0].min() < maps[0].max() <= 6
    assert [tuple(m.shape[-2:]) for m in maps] == [(6, 6), (3, 3), (2, 2), (1, 1), (1, 1), (1, 1)]


@pytest.mark.parametrize("topk_candidates", [5, 300])
def test_detections_are_torchvision_s(topk_candidates, monkeypatch):
    model = make(topk_candidates=topk_candidates, detections_per_img=40, fused=False)
    images = make_images()
    with torch.inference_mode():
        got, expected = model(images), as_torchvision(model, monkeypatch)(images)
    for ours, theirs, image in zip(got, expected, images, strict=True):
        assert 0 < len(ours["scores"]) <= 40
        assert torch.equal(ours["labels"], theirs["labels"])
        torch.testing.assert_close(ours, theirs)
        assert ours["boxes"][:, 2].max() <= image.shape[2] and ours["boxes"][:, 3].max() <= image.shape[1]


def test_scores_of_tensorflow_s_convention():
    model = make(tf=True, score_thresh=0.4, nms_thresh=1.0, detections_per_img=10**4)
    images = make_images(1)
    with torch.inference_mode():
        batch, _ = model.transform(images)
        scores = model.head_outputs(batch.tensors)["cls_logits"].sigmoid()[0, :, 1:]
        got = model(images)[0]
    torch.testing.assert_close(got["scores"], scores[scores > 0.4].sort(descending=True).values)
    assert set(got["labels"].tolist()) <= {1, 2, 3, 4}


@pytest.mark.parametrize("count", [0, 1, 50, 3000])
def test_non_maximum_suppression(count):
    corner = torch.rand(count, 2) * 3
    boxes = torch.cat([corner, corner + torch.rand(count, 2)], dim=1)
    scores, labels = torch.rand(count).mul(200).round() / 200, torch.randint(0, 3, (count,))  # with equal scores
    iou = extras.use("torchvision.ops.boxes", "detection").box_iou(boxes, boxes) if count else None
    alive, kept = scores.argsort(descending=True, stable=True), []
    while len(alive):
        best = alive[0]
        kept.append(int(best))
        alive = alive[1:]
        alive = alive[(iou[best, alive] <= 0.4) | (labels[alive] != labels[best])]
    for most in (7, count + 1):
        got = box_functions.non_maximum_suppression(boxes, scores, labels, 0.4, most)
        assert got.tolist() == kept[:most]


def test_overridden_arguments():
    options = {"score_thresh": 0.2, "nms_thresh": 0.3, "detections_per_img": 7, "topk_candidates": 9}
    model = mnv2_fused.ssdlite320_mobilenet_v2(
        width_mult=0.1, size=(64, 96), image_mean=[0.4] * 3, image_std=[0.3] * 3, positive_fraction=0.5, **options
    )
    assert {name: getattr(model, name) for name in options} == options
    assert model.transform.image_mean == [0.4] * 3 and model.neg_to_pos_ratio == 1
    assert model.transform([torch.rand(3, 10, 10)])[0].tensors.shape == (1, 3, 96, 64)


@both
def test_conventions(tf):
    model = mnv2_fused.ssdlite320_mobilenet_v2(width_mult=0.1, tf=tf)
    norm = model.backbone.extra[0][0][1]
    got = model.score_thresh, model.nms_thresh, model.detections_per_img, model.transform.fixed_size[0]
    assert got == ((1e-8, 0.6, 100, 300) if tf else (0.001, 0.55, 300, 320))
    assert (norm.eps, norm.momentum) == (1e-3, 3e-4 if tf else 0.03)
    weights = model.backbone.features[5].conv[0][0].weight
    assert 0.02 < weights.std() < 0.04
    assert all((m[1].bias == 0).all() for m in model.head.classification_head.module_list)


@pytest.mark.parametrize(("layers", "frozen"), [(6, 0), (5, 2), (3, 7), (1, 18), (0, 19)])
def test_trainable_layers(layers, frozen):
    backbone = mnv2_fused.ssdlite320_mobilenet_v2(width_mult=0.1, trainable_backbone_layers=layers).backbone
    trains = [{p.requires_grad for p in unit.parameters()} for unit in backbone.features]
    assert trains == [{False}] * frozen + [{True}] * (19 - frozen)
    assert all(p.requires_grad for p in backbone.extra.parameters())


def test_copies_and_pickles():
    model, images = make(tf=True), make_images(2)
    with torch.inference_mode():
        expected = model(images)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), plain(model)):
            torch.testing.assert_close(other(images), expected, rtol=1e-3, atol=1e-3)
        other = mnv2_fused.ssdlite320_mobilenet_v2(num_classes=5, width_mult=0.35, size=96, tf=True).eval()
        other.load_state_dict(model.state_dict())
        torch.testing.assert_close(other(images), expected)


@torch.inference_mode()
def test_no_images():
    model = make()
    for fused in (True, False):
        model.fused = fused
        outputs = model.head_outputs(torch.zeros(0, 3, 96, 96))
        assert outputs["cls_logits"].shape == (0, 204, 5) and outputs["bbox_regression"].shape == (0, 204, 4)


class Doubled(torch.nn.Module):
    """A backbone or a head around another one."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        outputs = self.module(x)
        return type(outputs)((name, 2 * y) for name, y in outputs.items())


class DoubledBackbone(Backbone):
    def forward(self, x):
        maps = super().forward(x)
        return OrderedDict((name, 2 * y) for name, y in maps.items())


class DoubledScores(ScoringHead):
    def forward(self, maps):
        return 2 * super().forward(maps)


@torch.no_grad()
@pytest.mark.parametrize("part", ["backbone", "head"])
def test_other_parts_are_called(part):
    """Also those of a subclass."""
    model, x = make(), torch.randn(1, 3, 96, 96)
    before = model.head_outputs(x)
    setattr(model, part, Doubled(getattr(model, part)))
    wrapped = model.head_outputs(x)
    setattr(model, part, getattr(model, part).module)
    assert torch.equal(model.head_outputs(x)["cls_logits"], before["cls_logits"])
    if part == "backbone":
        model.backbone.__class__ = DoubledBackbone
    else:
        model.head.classification_head.__class__ = model.head.regression_head.__class__ = DoubledScores
    for name, y in model.head_outputs(x).items():
        assert not torch.allclose(y, before[name], rtol=1e-2)
        torch.testing.assert_close(y, wrapped[name], rtol=1e-3, atol=1e-4)


@torch.inference_mode()
def test_16_bits():
    model, images = make(), make_images(2)
    with torch.autocast("cpu", torch.bfloat16):
        got = model(images)
    assert got[0]["boxes"].dtype == got[0]["scores"].dtype == torch.float32 and len(got[0]["scores"])
    half = model.to(torch.bfloat16)
    check(Outputs(half), torch.randn(2, 3, 96, 96).bfloat16())
    assert half([image.bfloat16() for image in images])[0]["boxes"].dtype == torch.float32


# ---------------------------------------------------------------------------------------------------------- weights


def test_weights_say_what_the_network_is(tmp_path):
    model = make(num_classes=7, width_mult=0.5, tf=True)
    for name, save in (("w.safetensors", save_file), ("w.pth", torch.save)):
        save(model.state_dict(), tmp_path / name)
        got = mnv2_fused.ssdlite320_mobilenet_v2(tmp_path / name)
        assert got.num_classes == 7 and not got.tf and got.backbone.out_channels == model.backbone.out_channels
        assert all(
            torch.equal(a, b) for a, b in zip(got.state_dict().values(), model.state_dict().values(), strict=True)
        )
    facts = {"convention": "tensorflow", "resolution": "96"}
    save_file(model.state_dict(), tmp_path / "stated.safetensors", facts)
    got = mnv2_fused.ssdlite320_mobilenet_v2(tmp_path / "stated.safetensors")
    assert got.tf and got.transform.fixed_size == (96, 96)
    got = mnv2_fused.ssdlite320_mobilenet_v2(weights=tmp_path / "stated.safetensors", tf=False, size=128)
    assert not got.tf and got.transform.fixed_size == (128, 128)


@pytest.mark.parametrize("width", [0.1, 0.33, 0.35, 1.4])
def test_width_follows_from_the_weights(tmp_path, width):
    model = mnv2_fused.ssdlite320_mobilenet_v2(num_classes=2, width_mult=width)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    got = mnv2_fused.ssdlite320_mobilenet_v2(tmp_path / "w.safetensors")
    assert got.backbone.out_channels == model.backbone.out_channels


def test_unusual_width_is_given(tmp_path):
    torch.save(mnv2_fused.ssdlite320_mobilenet_v2(width_mult=0.1234).state_dict(), tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="no width multiplier of the standard MobileNetV2 gives these channel"):
        mnv2_fused.ssdlite320_mobilenet_v2(tmp_path / "w.pth")
    mnv2_fused.ssdlite320_mobilenet_v2(tmp_path / "w.pth", width_mult=0.1234)


def test_weights_of_a_classification_network(tmp_path):
    network = mnv2_fused.MobileNetV2(3, 0.35)
    torch.save(network.state_dict(), tmp_path / "c.pth")
    model = mnv2_fused.ssdlite320_mobilenet_v2(weights_backbone=tmp_path / "c.pth", trainable_backbone_layers=0)
    got = model.backbone.features.state_dict()
    assert got.keys() == network.features.state_dict().keys()
    assert all(torch.equal(got[key], value) for key, value in network.features.state_dict().items())
    assert not model.backbone.features[18][0].weight.requires_grad


def test_wrong_weights(tmp_path):
    builder = mnv2_fused.ssdlite320_mobilenet_v2
    with pytest.raises(WeightsError, match=r"no such weights file: DEFAULT .no weights of SSDLite"):
        builder("DEFAULT")
    with pytest.raises(WeightsError, match="must be the path of a file, got 3"):
        builder(3)
    with pytest.raises(WeightsError, match=r"no such weights file: .*gone\.pth"):
        builder(tmp_path / "gone.pth")
    torch.save(mnv2_fused.MobileNetV2(3, 0.1).state_dict(), tmp_path / "c.pth")
    with pytest.raises(WeightsError, match=r"holds no SSDLite on MobileNetV2 .* backbone\.features\.0\.0\.weight is m"):
        builder(tmp_path / "c.pth")
    state_dict = builder(num_classes=5, width_mult=0.1).state_dict()
    torch.save(state_dict, tmp_path / "d.pth")
    with pytest.raises(ValueError, match="num_classes must be that of the weights, 5; got 4"):
        builder(tmp_path / "d.pth", num_classes=4)
    del state_dict["head.regression_head.module_list.2.1.bias"]
    torch.save(state_dict, tmp_path / "e.pth")
    with pytest.raises(WeightsError, match=r"e\.pth does not fit this SSDLite: missing head\.regression_head\.module"):
        builder(tmp_path / "e.pth")
    key = "head.classification_head.module_list.1.1.weight"
    state_dict[key] = state_dict[key][:-1]
    torch.save(state_dict, tmp_path / "f.pth")
    with pytest.raises(WeightsError, match="has 29 outputs, expected a multiple of 6"):
        builder(tmp_path / "f.pth")


def tensorflow_scopes() -> dict[str, tuple[str, str | None]]:
    """TensorFlow's name of every convolution, with the keys of the convolution and its batch norm."""

    def layer(key: str) -> tuple[str, str]:
        return f"{key}.0", f"{key}.1"

    net, features, heads = "FeatureExtractor/MobilenetV2", "backbone.features", {}
    found = {f"{net}/Conv": layer(f"{features}.0"), f"{net}/Conv_1": layer(f"{features}.18")}
    for block in range(17):
        scope, conv = f"{net}/expanded_conv{f'_{block}' if block else ''}", f"{features}.{block + 1}.conv"
        layers = ["expand", "depthwise"][block == 0 :]
        found |= {f"{scope}/{name}": layer(f"{conv}.{i}") for i, name in enumerate(layers)}
        found[f"{scope}/project"] = f"{conv}.{len(layers)}", f"{conv}.{len(layers) + 1}"
    for j, channels in enumerate((512, 256, 256, 128)):
        last = f"{net}/layer_19_2_Conv2d_{j + 2}_3x3_s2_{channels}"
        names = f"{net}/layer_19_1_Conv2d_{j + 2}_1x1_{channels // 2}", f"{last}_depthwise", last
        found |= {name: layer(f"backbone.extra.{j}.{i}") for i, name in enumerate(names)}
    for k in range(6):
        heads[f"BoxPredictor_{k}/ClassPredictor"] = f"head.classification_head.module_list.{k}"
        heads[f"BoxPredictor_{k}/BoxEncodingPredictor"] = f"head.regression_head.module_list.{k}"
    for scope, key in heads.items():
        found |= {f"{scope}_depthwise": layer(f"{key}.0"), scope: (f"{key}.1", None)}
    return found


def test_conversion_from_tensorflow_as_documented():
    blocks = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    code = {}
    exec(next(block for block in blocks if "def convert" in block), code)
    model = make(width_mult=0.1, tf=True)
    expected = {key: value for key, value in model.state_dict().items() if "num_batches" not in key}
    variables = {"MultipleGridAnchorGenerator/Const": np.zeros(3)}
    moments = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_variance": "running_var"}
    for scope, (conv, norm) in tensorflow_scopes().items():
        weight, rows = expected[f"{conv}.weight"], slice(None)
        if "BoxEncodingPredictor" in scope and norm is None:
            rows = torch.arange(len(weight)).view(-1, 4)[:, [1, 0, 3, 2]].flatten()  # y, x, h, w
        if scope.endswith("depthwise"):
            variables[f"{scope}/depthwise_weights"] = weight.permute(2, 3, 0, 1).numpy()
        else:
            variables[f"{scope}/weights"] = weight[rows].permute(2, 3, 1, 0).numpy()
        if norm is None:
            variables[f"{scope}/biases"] = expected[f"{conv}.bias"][rows].numpy()
        else:
            variables |= {
                f"{scope}/BatchNorm/{ours}": expected[f"{norm}.{key}"].numpy() for ours, key in moments.items()
            }
    got = code["convert"](variables)
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[key], value) for key, value in expected.items())


# --------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"num_classes": 1}, ValueError, "num_classes must be at least 2, the background included; got 1"),
        ({"trainable_backbone_layers": 7}, ValueError, "trainable_backbone_layers must be from 0 to 6, got 7"),
        ({"nms_tresh": 0.5}, TypeError, "unknown argument 'nms_tresh': SSDLite takes detections_per_img, image_mean"),
        ({"size": 0}, ValueError, "size must be a positive integer, or a width and a height; got 0"),
        ({"size": 32.0}, ValueError, "size must be a positive integer, or a width and a height; got 32.0"),
        ({"size": (3, 4, 5)}, ValueError, r"size must be .* got \(3, 4, 5\)"),
    ],
)
def test_wrong_arguments(options, kind, message):
    with pytest.raises(kind, match=message):
        mnv2_fused.ssdlite320_mobilenet_v2(**options)


@pytest.fixture(scope="module")
def trained():
    return make().train()


@pytest.mark.parametrize(
    ("images", "kind", "message"),
    [
        (torch.rand(1, 3, 8, 8), TypeError, r"images must be a list of \(3, h, w\) tensors, got a tensor of shape"),
        ([], ValueError, "at least one image, got an empty list"),
        ([None], TypeError, r"images\[0\] must be a tensor, got None"),
        ([torch.rand(3, 8, 8), torch.rand(1, 8, 8)], ValueError, r"images\[1\] .* \(3, h, w\).* got \(1, 8, 8\)"),
        ([torch.rand(3, 0, 8)], ValueError, r"with h, w > 0, got \(3, 0, 8\)"),
        ([torch.zeros(3, 8, 8, dtype=torch.uint8)], TypeError, r"floating-point numbers in 0\.\.1, got torch.uint8"),
        ([torch.rand(3, 8, 8), torch.rand(3, 8, 8).double()], ValueError, r"images\[1\] must have the dtype and dev"),
    ],
)
def test_wrong_images(trained, images, kind, message):
    with pytest.raises(kind, match=message):
        trained(images)


BOX = [1.0, 1.0, 5.0, 6.0]


@pytest.mark.parametrize(
    ("boxes", "labels", "kind", "message"),
    [
        (torch.zeros(4), [], ValueError, r'targets\[2\]\["boxes"\] must have shape \(boxes, 4\), got \(4,\)'),
        (torch.zeros(0), [], ValueError, r"must have shape \(boxes, 4\), got \(0,\)"),
        (torch.tensor([[1, 1, 5, 6]]), [1], TypeError, r'"boxes"\] must hold floating-point numbers, got torch.int64'),
        ([BOX], [1], TypeError, r'targets\[2\]\["boxes"\] must be a tensor, got a list'),
        (torch.tensor([BOX, [5.0, 1, 5, 2]]), [1, 1], ValueError, r"x1 < x2 and y1 < y2, got \[5.0, .*in row 1"),
        (torch.tensor([[float("nan"), 1, 5, 2]]), [1], ValueError, r'"boxes"\] must be finite, got \[nan'),
        (torch.tensor([[1.0, 1, 90, 2]]), [1], ValueError, r"in the image, which is 86 pixels wide and 96 high, got"),
        (torch.tensor([[-3.0, 1, 9, 2]]), [1], ValueError, r"must lie in the image"),
        (torch.tensor([BOX]), [1, 1], ValueError, r'"labels"\] must have shape \(1,\), a label for .* got \(2,\)'),
        (torch.tensor([BOX]), [0], ValueError, r'targets\[2\]\["labels"\] must be from 1 to 4, got 0 in row 0'),
        (torch.tensor([BOX]), [5], ValueError, r"must be from 1 to 4, got 5 in row 0"),
        (torch.tensor([BOX]), [1.0], TypeError, r'"labels"\] must be of torch.int64, got torch.float32'),
    ],
)
def test_wrong_boxes_and_labels(trained, boxes, labels, kind, message):
    images = make_images()
    targets = make_targets(images)
    targets[2] = {"boxes": boxes, "labels": torch.tensor(labels)}
    with pytest.raises(kind, match=message):
        trained(images, targets)


def test_wrong_targets(trained):
    images = make_images()
    targets = make_targets(images)
    with pytest.raises(ValueError, match=r"targets must be given in training mode, got None; call eval\(\)"):
        trained(images)
    with pytest.raises(ValueError, match="one entry for each of the 3 images, got 2"):
        trained(images, targets[:2])
    with pytest.raises(TypeError, match="targets must be a list of dictionaries, got a dict"):
        trained(images, targets[0])
    with pytest.raises(TypeError, match=r"targets\[1\] must be a dictionary, got a list"):
        trained(images, [targets[0], [], targets[2]])
    with pytest.raises(TypeError, match=r'targets\[0\]\["labels"\] must be a tensor, got none'):
        trained(images, [{"boxes": targets[0]["boxes"]}, *targets[1:]])
    with pytest.raises(ValueError, match="recompute should be one of"):
        trained.recompute = "all"
