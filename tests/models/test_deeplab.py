"""DeepLabv3: its sizes, fused against plain in inference and training, masks, several scales, and its errors."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from oracle import check, check_training, operators, randomize, step
from segmentation import Out, assert_trains, remove_clamps
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import mnv2_fused
from mnv2_fused import deeplabv3_mobilenet_v2, weights
from mnv2_fused.models.backbone import Backbone
from mnv2_fused.models.deeplab import DeepLabHead

FUSED = ["network", *["dense"] * 3]  # backbone; 1x1 branch, projection and logits


class Shapes(TorchDispatchMode):
    """Notes the shapes of all floating-point tensors that operators return."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                self.seen.append(tuple(tensor.shape))
        return result


def make(**options) -> Out:
    """A small network in eval mode, with random batch norms."""
    options = {"width_mult": 0.35, "num_classes": 5} | options
    return randomize(Out(deeplabv3_mobilenet_v2(**options)), torch.randn(4, 3, 65, 65))


# -------------------------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    "stride, aspp, parameters, products",
    [
        (16, False, 2_113_557, 2_740.7),
        (16, True, 4_523_541, 5_363.5),
        (8, False, 2_113_557, 8_825.9),
        (8, True, 4_523_541, 19_001.5),
    ],
)
def test_counts(stride, aspp, parameters, products):
    """Parameters, and millions of multiply-adds at 513 x 513, up to the resize."""
    with torch.device("meta"):
        model, x = (
            deeplabv3_mobilenet_v2(output_stride=stride, aspp=aspp, fused=False).eval(),
            torch.empty(1, 3, 513, 513),
        )
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.low_logits(x)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert counter.get_total_flops() / 2e6 == pytest.approx(products, abs=0.05)


def test_keys_and_shapes():
    shapes = {k: tuple(v.shape) for k, v in deeplabv3_mobilenet_v2(aspp=True, aux_loss=True).state_dict().items()}
    ours = {f"backbone.{key}" for key in mnv2_fused.MobileNetV2().state_dict() if key.startswith("features.")}
    assert {k for k in shapes if k.startswith("backbone.")} == {k for k in ours if ".features.18." not in k}
    tops = {key.split(".")[1] for key in shapes if key.startswith("classifier.")}
    assert tops == {"pool", "aspp0", "aspp1", "aspp2", "aspp3", "project", "logits"}
    assert shapes["classifier.project.0.weight"] == (256, 5 * 256, 1, 1)
    assert shapes["classifier.aspp2.0.weight"] == (256, 320, 3, 3)
    assert shapes["aux_classifier.0.weight"] == (24, 96, 3, 3) and shapes["aux_classifier.4.bias"] == (21,)


def test_rates_and_norms():
    for stride, aspp, late in ((16, [6, 12, 18], [1, 2, 2]), (8, [12, 24, 36], [2, 4, 4])):
        model = deeplabv3_mobilenet_v2(output_stride=stride, aspp=True, tf=True)
        head, features = model.classifier, model.backbone.features
        assert [head.get_submodule(f"aspp{i}")[0].dilation[0] for i in (1, 2, 3)] == aspp
        assert [features[i].conv[1][0].dilation[0] for i in (14, 15, 17)] == late
        assert {(m.eps, m.momentum) for m in features.modules() if isinstance(m, nn.BatchNorm2d)} == {(1e-3, 3e-4)}
        assert {(m.eps, m.momentum) for m in head.modules() if isinstance(m, nn.BatchNorm2d)} == {(1e-5, 3e-4)}
    norms = [m for m in deeplabv3_mobilenet_v2().modules() if isinstance(m, nn.BatchNorm2d)]
    assert {(m.eps, m.momentum) for m in norms} == {(1e-5, 0.1)}
    assert model.preprocessing.tf_padding and model.preprocessing.crop == 513
    assert deeplabv3_mobilenet_v2().preprocessing.mean == weights.TORCHVISION.mean


# ---------------------------------------------------------------------------------------------------------- inference


@pytest.mark.parametrize(
    "options, size",
    [
        ({}, (65, 65)),
        ({"tf": True}, (52, 70)),
        ({"output_stride": 8, "tf": True}, (49, 33)),
        ({"aspp": True}, (33, 49)),
    ],
    ids=str,
)
def test_fused_is_as_exact_as_plain(options, size):
    rates = 3 if options.get("aspp") else 0
    model = make(**options)
    y = check(model, torch.randn(2, 3, *size), FUSED)
    assert y.shape == (2, 5, *size) and y.is_contiguous()
    explanation = mnv2_fused.explain(model.requires_grad_(False))
    assert sum(reason is not None for reason in explanation.values()) == rates  # the dilated 3x3 branches


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype):
    check(make().to(dtype), torch.randn(2, 3, 65, 65).to(dtype).to(memory_format=torch.channels_last))


@torch.no_grad()
def test_concatenation_never_exists():
    model, wide = make().model, 512
    for fused in (True, False):
        model.fused = fused
        with Shapes() as shapes:
            model(torch.randn(2, 3, 33, 33))
        assert any(len(shape) == 4 and shape[1] == wide for shape in shapes.seen) == (not fused)


@pytest.mark.parametrize("name", ["project", "project.0", "project.1", "pool.0", "aspp0", "logits"])
@torch.no_grad()
def test_hooks_in_the_head_fire(name):
    model, x, seen = make(), torch.randn(2, 3, 33, 33), []
    y, module = model(x), model.model.classifier.get_submodule(name)
    handle = module.register_forward_hook(lambda *_: seen.append(name))
    torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-4)
    assert seen == [name]
    handle.remove()


@torch.no_grad()
def test_another_projection_is_called():
    model, x = make(), torch.randn(2, 3, 33, 33)
    y, project = model(x), model.model.classifier.project
    project[0] = nn.Sequential(project[0], nn.Identity())  # as adapters do
    torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_switch_copies_and_pickles():
    model, x = make(aspp=True).model, torch.randn(2, 3, 33, 33)
    y = model(x)["out"]
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x)["out"], y)
    model.fused = False
    assert operators(lambda: model(x)) == []
    model.fused = True
    assert torch.equal(model(x)["out"], y)
    assert operators(lambda: model(x)) == FUSED
    assert model.backbone(x)["out"].is_contiguous()
    assert model(x.to(memory_format=torch.channels_last))["out"].is_contiguous(memory_format=torch.channels_last)
    assert operators(lambda: deeplabv3_mobilenet_v2(width_mult=0.1, fused=False).eval()(x)) == []


@torch.no_grad()
def test_export_and_compile(fresh_dynamo):
    model, x = make(width_mult=0.1).model, torch.randn(2, 3, 33, 33)
    y = model(x)["out"]
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x)["out"], y, rtol=1e-5, atol=1e-5)
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(compiled(x)["out"], y, rtol=1e-5, atol=1e-5)


# ----------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("rates", [(), (2, 3)], ids=str)
@pytest.mark.parametrize("frozen", [False, True])
def test_head_trains(rates, frozen):
    head = randomize(DeepLabHead(24, 5, rates, channels=16, dropout=0.0), torch.randn(6, 24, 9, 7))
    trained = ["train_dense", "train_dense_backward"]
    check_training(head.train(not frozen), torch.randn(6, 24, 9, 7), trained, margin=1e-6, formats=False)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("clamps", [False, True])
def test_whole_network_trains(clamps, frozen):
    def network():
        model = make(width_mult=0.1, dropout=0.0).train(not frozen)
        return model if clamps else remove_clamps(model)

    assert_trains(network, (33, 33), seeds=9 if clamps else 3)


def test_training_runs_fused_with_auxiliary_loss():
    model, x = deeplabv3_mobilenet_v2(width_mult=0.1, num_classes=4, aux_loss=True), torch.randn(2, 3, 33, 33)
    found = []
    names = operators(lambda: found.append(model(x)))
    assert names == ["train_dense", *["train_block"] * 17, "train_dense"]
    assert {key: tuple(y.shape) for key, y in found[0].items()} == dict.fromkeys(("out", "aux"), (2, 4, 33, 33))
    step(Out(model, "aux"), x)
    assert model.aux_classifier[0].weight.grad.abs().max() > 0 and model.classifier.logits.weight.grad is None
    assert model.eval()(x).keys() == {"out"}


# -------------------------------------------------------------------------------------------------- masks and scales


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_predicted_masks_are_the_argmax(dtype):
    model, x = make().model.to(dtype), torch.randn(2, 3, 65, 81).to(dtype)
    model.classifier.logits.bias -= model.low_logits(x).mean((0, 2, 3))  # so that every class is somewhere
    y = model(x)["out"]
    masks = model.predict_mask(x)
    assert masks.dtype == torch.int64 and torch.equal(masks, y.argmax(1)) and len(masks.unique()) == 5
    larger = F.interpolate(model.low_logits(x).contiguous(), (130, 97), mode="bilinear", align_corners=True)
    assert torch.equal(model.predict_mask(x, (130, 97)), larger.argmax(1))


def test_predicted_masks_need_no_full_logits():
    model, size = make(num_classes=21).model, (400, 300)
    with Shapes() as shapes:
        model.predict_mask(torch.randn(2, 3, 33, 33), size)
    assert max(torch.Size(shape).numel() for shape in shapes.seen) <= size[0] * size[1]


@torch.no_grad()
def test_multiscale_is_a_mean_of_probabilities():
    model, x = make().model, torch.randn(2, 3, 65, 49)
    expected, sizes = 0, []
    for scale, size in ((0.5, (33, 33)), (1.0, (65, 49)), (1.6, (97, 81))):
        scaled = F.interpolate(x, size, mode="bilinear", align_corners=True)
        for flip in (False, True):
            low = model.low_logits(scaled.flip(-1) if flip else scaled)
            full = F.interpolate(low, (65, 49), mode="bilinear", align_corners=True).softmax(1)
            expected = expected + (full.flip(-1) if flip else full) / 6
        sizes.append(scale)
    found = mnv2_fused.multiscale(model, x, sizes)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.sum(1), torch.ones(2, 65, 49))
    # Any network of torchvision's convention.
    other = mnv2_fused.multiscale(_Convention(model), x, (1.0,), flip=False)
    torch.testing.assert_close(other, model(x)["out"].softmax(1))


class _Convention(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return {"out": self.model(x)["out"]}


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "x, error, message",
    [
        (torch.zeros(3, 33, 33), ValueError, r"DeepLabV3: x must have the shape \(any, 3, any, any\); got"),
        (torch.zeros(1, 4, 33, 33), ValueError, r"x must have the shape \(any, 3, any, any\)"),
        (torch.zeros(1, 3, 33, 33, dtype=torch.uint8), TypeError, "x must be of a floating-point dtype; got"),
        (torch.zeros(1, 3, 0, 33), ValueError, "x must have at least one pixel"),
        ("photo.jpg", TypeError, "x must be a torch.Tensor; got 'photo.jpg'"),
    ],
)
def test_wrong_inputs(x, error, message):
    model = deeplabv3_mobilenet_v2(width_mult=0.1).eval()
    for call in (model, model.predict_mask):
        with pytest.raises(error, match=message):
            call(x)


def test_wrong_arguments():
    model, x = deeplabv3_mobilenet_v2(width_mult=0.1), torch.zeros(1, 3, 33, 33)
    with pytest.raises(ValueError, match="at least 2 images in training mode"):
        model(x)
    model.classifier.pool.eval()
    assert model(x)["out"].shape == (1, 21, 33, 33)
    model.eval()
    with pytest.raises(ValueError, match=r"predict_mask: size must be a height and a width .* got \(0, 4\)"):
        model.predict_mask(x, (0, 4))
    for size in (5, (3.5, 2), "ab"):
        with pytest.raises(ValueError, match=r"predict_mask: size must be a height and a width"):
            model.predict_mask(x, size)
    with pytest.raises(ValueError, match=r"multiscale: scales must be positive numbers, at least one; got \(\)"):
        mnv2_fused.multiscale(model, x, ())
    with pytest.raises(ValueError, match="multiscale: x must have the shape"):
        mnv2_fused.multiscale(model, x[0])
    with pytest.raises(TypeError, match=r"multiscale: model must be a torch.nn.Module"):
        mnv2_fused.multiscale("model", x)
    with pytest.raises(ValueError, match="output_stride should be 8 or 16, got 32"):
        deeplabv3_mobilenet_v2(output_stride=32)
    for classes in (0, -1, 2.5, "21"):
        with pytest.raises(ValueError, match="num_classes must be a whole number from 1, got"):
            deeplabv3_mobilenet_v2(num_classes=classes)
    with pytest.raises(ValueError, match="recompute should be one of"):
        deeplabv3_mobilenet_v2(recompute="none")


@pytest.mark.parametrize("size", [(1, 1), (2, 17)])
def test_smallest_images(size):
    check(make(width_mult=0.1), torch.randn(64, 3, *size), FUSED)


@torch.no_grad()
def test_output_has_the_input_s_format():
    model, x = deeplabv3_mobilenet_v2(width_mult=0.1).eval(), torch.randn(2, 3, 33, 49)
    for fused in (True, False):
        model.fused = fused
        for layout in (torch.contiguous_format, torch.channels_last):
            y = model(x.contiguous(memory_format=layout))["out"]
            assert y.is_contiguous(memory_format=layout)


@torch.no_grad()
def test_another_head_is_called():
    model, x = deeplabv3_mobilenet_v2(width_mult=0.35).eval(), torch.randn(1, 3, 33, 33)
    model.classifier = nn.Conv2d(model.backbone.channels(17), 7, 1)
    y = model(x)["out"]
    assert y.shape == (1, 7, 33, 33)
    model.fused = False
    torch.testing.assert_close(model(x)["out"], y, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_taps_may_be_assigned():
    backbone, x = Backbone({"out": 17}, width_mult=0.35).eval(), torch.randn(1, 3, 33, 33)
    for taps in ({"last": 17, "middle": 13, "again": 13, "stem": 0}, {"early": 3}):
        backbone.fused = True
        backbone.taps = taps
        maps = backbone(x)
        assert list(maps) == sorted(taps, key=taps.get)
        assert all(maps[name].shape[1] == backbone.channels(index) for name, index in taps.items())
        backbone.fused = False
        for name, y in backbone(x).items():
            torch.testing.assert_close(maps[name], y, rtol=1e-4, atol=1e-5)
    for wrong in ({}, {"out": 18}, {"out": -1}):
        with pytest.raises(ValueError, match="Backbone: taps must name units from 0 to 17, at least one; got"):
            backbone.taps = wrong
