"""convert and revert: an existing torchvision network runs fused, in place, and goes back."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from oracle import FACTOR, assert_close, check, check_training, decided, errors, operators, plain, randomize, step
from torch import nn

import mnv2_fused

NETWORK = ["network"]
SMALL = [[1, 8, 1, 1], [6, 16, 2, 2]]


@pytest.fixture
def theirs(torchvision_mobilenetv2):
    model = torchvision_mobilenetv2.MobileNetV2(7, 0.5, SMALL)
    return randomize(model, torch.randn(4, 3, 40, 40))


@torch.no_grad()
def test_convert_and_revert(theirs):
    x = torch.randn(4, 3, 40, 40)
    expected, text = theirs(x), repr(theirs)
    classes = {name: type(m) for name, m in theirs.named_modules()}
    attributes = {name: set(vars(m)) for name, m in theirs.named_modules()}
    tensors = theirs.state_dict(keep_vars=True)
    assert mnv2_fused.convert(theirs) is theirs
    for name, tensor in theirs.state_dict(keep_vars=True).items():
        assert tensor is tensors[name]
    assert set(mnv2_fused.explain(theirs).values()) == {None}
    check(theirs, x, NETWORK)
    for name, module in theirs.named_modules():
        assert isinstance(module, classes[name])
        assert type(module) is classes[name] or type(module).__name__ == f"Fused{classes[name].__name__}"
    assert mnv2_fused.convert(theirs) is theirs  # twice is once
    assert mnv2_fused.revert(theirs) is theirs
    assert {name: type(m) for name, m in theirs.named_modules()} == classes
    assert {name: set(vars(m)) for name, m in theirs.named_modules()} == attributes
    assert operators(lambda: theirs(x)) == []
    assert torch.equal(theirs(x), expected) and repr(theirs) == text


def test_whole_network(torchvision_mobilenetv2):
    model = randomize(torchvision_mobilenetv2.mobilenet_v2(width_mult=0.35), torch.randn(4, 3, 64, 64))
    check(mnv2_fused.convert(model), torch.randn(8, 3, 64, 64), NETWORK)


@torch.no_grad()
def test_converted_is_the_oracle_within_its_own_error(theirs):
    x = torch.randn(4, 3, 40, 40)
    exact = copy.deepcopy(theirs).double()(x.double())
    before = errors(theirs(x), exact)
    after = errors(mnv2_fused.convert(theirs)(x), exact)
    assert all(a <= 2 * b + torch.finfo(torch.float32).eps for a, b in zip(after, before, strict=True))


@torch.no_grad()
def test_hooks_stay(theirs):
    seen = []
    theirs.features[2].register_forward_hook(lambda module, arguments, y: seen.append(type(module)))
    mnv2_fused.convert(theirs)(torch.randn(1, 3, 40, 40))
    mnv2_fused.revert(theirs)(torch.randn(1, 3, 40, 40))
    assert [cls.__module__ for cls in seen] == ["mnv2_fused.families", "torchvision.models.mobilenetv2"]


def test_backbone_without_the_network(theirs):
    class Backbone(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleDict({str(i): layer for i, layer in enumerate(theirs.features)})

        def forward(self, x):
            outputs = []
            for layer in self.layers.values():
                x = layer(x)
                outputs.append(x)
            return outputs[-1]

    check(
        mnv2_fused.convert(Backbone().eval()), torch.randn(8, 3, 72, 72), ["dense", *["inverted_residual"] * 3, "dense"]
    )


def test_rewritten_backbone(theirs):
    # Segmentation libraries trade stride for dilation like this.
    for conv in theirs.features[2].modules():
        if isinstance(conv, nn.Conv2d) and conv.kernel_size == (3, 3):
            conv.stride, conv.dilation, conv.padding = (1, 1), (2, 2), (2, 2)
    check(mnv2_fused.convert(theirs), torch.randn(4, 3, 40, 40), NETWORK)


def test_dilation_of_a_pointwise_convolution_means_nothing(theirs):
    # Segmentation libraries set it in every convolution of a stage.
    theirs.features[-1][0].dilation = (2, 2)
    mnv2_fused.convert(theirs)
    check(theirs.features[-1], torch.randn(2, 8, 20, 20), ["dense"])


def test_subclass_of_the_network_keeps_its_class(torchvision_mobilenetv2):
    class Encoder(torchvision_mobilenetv2.MobileNetV2):
        def forward(self, x):
            return self.features(x) * 2

    model = randomize(Encoder(7, 0.5, SMALL), torch.randn(4, 3, 40, 40))
    assert type(mnv2_fused.convert(model)) is Encoder
    check(model, torch.randn(4, 3, 40, 40), NETWORK)


@torch.no_grad()
def test_copies_of_a_converted_network(theirs):
    x = torch.randn(4, 3, 40, 40)
    y = mnv2_fused.convert(theirs)(x)
    for other in (copy.deepcopy(theirs), pickle.loads(pickle.dumps(theirs))):
        assert torch.equal(other(x), y)
        assert type(mnv2_fused.revert(other)).__module__ == "torchvision.models.mobilenetv2"
    assert torch.equal(theirs(x), y)


@torch.no_grad()
def test_fused_switch_of_a_converted_network(theirs):
    x = torch.randn(1, 3, 40, 40)
    mnv2_fused.convert(theirs).fused = False
    assert operators(lambda: theirs(x)) == []
    theirs.fused = True
    assert operators(lambda: theirs(x)) == ["network"]
    theirs.fused = False
    assert "fused" not in vars(mnv2_fused.revert(theirs).features[1])


def test_training_goes_on(theirs):
    blocks = ["train_block"] * 3
    operators = ["train_dense", *blocks, "train_dense"]
    theirs.classifier[0].p = 0.0
    x = torch.randn(2, 3, 16, 16)
    exact, reference = copy.deepcopy(theirs).double().train(), copy.deepcopy(theirs).train()
    model = mnv2_fused.convert(theirs).train()
    x = decided(model, x, 1e-6)
    before = step(reference, x), step(exact, x.double())
    found = check_training(model, x, operators + [f"{name}_backward" for name in operators], margin=1e-6)
    assert_close(found["output"], before[0]["output"], before[1]["output"], FACTOR)


@torch.no_grad()
def test_revert_restores_what_it_touched(theirs):
    theirs.features[1].fused = "somebody else's"
    attributes = {name: dict(vars(m)) for name, m in theirs.named_modules()}
    mnv2_fused.convert(theirs)
    theirs.recompute, theirs.fused = "most", False
    theirs(torch.randn(1, 3, 40, 40))
    mnv2_fused.revert(theirs)
    for name, module in theirs.named_modules():
        assert vars(module).keys() == attributes[name].keys(), name
    assert theirs.features[1].fused == "somebody else's"


@torch.no_grad()
def test_copies_and_pickles_stay_instances_of_both(theirs):
    kinds = {name: type(m) for name, m in theirs.named_modules()}
    for other in (copy.deepcopy(mnv2_fused.convert(theirs)), pickle.loads(pickle.dumps(theirs))):
        for name, module in other.named_modules():
            assert isinstance(module, kinds[name]) and type(module) is type(theirs.get_submodule(name))
        assert mnv2_fused.explain(other) == mnv2_fused.explain(theirs)


@pytest.mark.parametrize("setting", [{}, {"fused": False}, {"recompute": "most"}])
@torch.no_grad()
def test_scripts_whatever_was_set(theirs, setting):
    x, own = torch.randn(2, 3, 40, 40), mnv2_fused.MobileNetV2(7, 0.5, SMALL, tf_padding=True).eval()
    for model in (mnv2_fused.convert(theirs), own):
        for name, value in setting.items():
            setattr(model, name, value)
        scripted, expected = torch.jit.script(model), plain(model)(x)
        assert torch.allclose(scripted(x), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_what_fx_has_traced_can_be_scripted(theirs):
    x, own = torch.randn(2, 3, 40, 40), mnv2_fused.MobileNetV2(7, 0.5, SMALL).eval()
    for model in (mnv2_fused.convert(theirs), own):
        scripted = torch.jit.script(torch.fx.symbolic_trace(model))
        assert torch.allclose(scripted(x), plain(model)(x), rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------ norms


class OwnBatchNorm(nn.BatchNorm2d):
    """A subclass as in other libraries, without a forward of its own."""


class LoudBatchNorm(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) * 2


TRAINED = ["train_dense", *["train_block"] * 3, "train_dense"]
TRAINED += [f"{name}_backward" for name in TRAINED]


@pytest.mark.parametrize("train", [False, True])
def test_a_subclass_of_batch_norm_counts_as_one(torchvision_mobilenetv2, train):
    results = []
    for norm in (nn.BatchNorm2d, OwnBatchNorm):
        torch.manual_seed(1)
        model = torchvision_mobilenetv2.MobileNetV2(7, 0.5, SMALL, norm_layer=norm, dropout=0.0)
        mnv2_fused.convert(randomize(model, torch.randn(4, 3, 40, 40)).train(train))
        x = torch.randn(4, 3, 40, 40)
        assert set(mnv2_fused.explain(model).values()) == {None}
        assert operators(lambda model=model, x=x: results.append(step(model, x))) == TRAINED
    for name, tensor in results[0].items():
        assert torch.equal(results[1][name], tensor), name


@pytest.mark.parametrize("train", [False, True])
def test_a_frozen_batch_norm_is_one_with_fixed_statistics(torchvision_mobilenetv2, train):
    norm = pytest.importorskip("torchvision.ops.misc").FrozenBatchNorm2d
    model = torchvision_mobilenetv2.MobileNetV2(7, 0.5, SMALL, norm_layer=norm, dropout=0.0)
    for module in model.modules():
        if isinstance(module, norm):
            module.weight.uniform_(0.5, 1.5)
            module.bias.normal_()
            module.running_mean.normal_(std=0.3)
            module.running_var.uniform_(0.5, 1.5)
    mnv2_fused.convert(model.train(train))
    assert set(mnv2_fused.explain(model).values()) == {None}
    check_training(model, torch.randn(4, 3, 40, 40), TRAINED, margin=1e-6)
    with torch.no_grad():
        assert set(mnv2_fused.explain(model.eval()).values()) == {None}
    check(model, torch.randn(4, 3, 40, 40), NETWORK)


def test_a_norm_with_a_forward_of_its_own_runs_plain(torchvision_mobilenetv2):
    model = torchvision_mobilenetv2.MobileNetV2(7, 0.5, SMALL, norm_layer=LoudBatchNorm)
    model = mnv2_fused.convert(randomize(model, torch.randn(4, 3, 40, 40)))
    check(model, torch.randn(4, 3, 40, 40), [])
    assert "LoudBatchNorm" in mnv2_fused.explain(model)["features.1"]


def test_nothing_to_convert():
    with pytest.raises(ValueError, match=r"convert: model must contain torchvision's MobileNetV2 .* got a Linear"):
        mnv2_fused.convert(nn.Linear(1, 1))
    with pytest.raises(TypeError, match=r"convert: model must be a torch.nn.Module; got a str"):
        mnv2_fused.convert("model")
    with pytest.raises(TypeError, match=r"revert: model must be a torch.nn.Module; got a NoneType"):
        mnv2_fused.revert(None)


def test_networks_of_this_package_stay_what_they_are():
    model = mnv2_fused.MobileNetV2(7, 0.5, SMALL)
    assert type(mnv2_fused.revert(mnv2_fused.convert(model))) is mnv2_fused.MobileNetV2
    check(randomize(model, torch.randn(4, 3, 40, 40)), torch.randn(4, 3, 40, 40))
