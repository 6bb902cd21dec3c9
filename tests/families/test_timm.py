"""timm: networks of its EfficientNet family run fused, whole or block by block."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from oracle import check, check_training, operators, plain, randomize
from torch import nn

import mnv2_fused

NETWORK = ["network"]
ARCHITECTURE = [["ds_r1_k3_s1_e1_c8"], ["ir_r2_k3_s2_e6_c16"], ["ir_r1_k5_s2_e3_c24"]]
TRAINED = ["train_dense", *["train_block"] * 4, "train_dense"]
TRAINED += [f"{name}_backward" for name in TRAINED]


def make(timm, name: str, x: torch.Tensor, **options) -> nn.Module:
    model = timm.create_model(name, pretrained=False, **options)
    return randomize(model.eval(), x)


def make_small(timm, features: bool = False, **options) -> nn.Module:
    """A network of a stem, four blocks and a last convolution."""
    decode = timm.models._efficientnet_builder.decode_arch_def
    kind = timm.models.efficientnet.EfficientNetFeatures if features else timm.models.efficientnet.EfficientNet
    if features:
        options = {"out_indices": (0, 1, 2), **options}
    else:
        options = {"num_classes": 7, "num_features": 40, **options}
    options = {"stem_size": 8, "act_layer": nn.ReLU6, **options}
    model = kind(decode(ARCHITECTURE), **options)
    return randomize(model.eval(), torch.randn(4, 3, 40, 40))


def reasons(model: nn.Module) -> dict[str, str]:
    return {name: why for name, why in mnv2_fused.explain(model).items() if why is not None}


# ------------------------------------------------------------------------------------------------------ whole networks


@pytest.mark.parametrize(
    ("name", "units"),
    [
        ("mobilenetv2_035", 19),
        ("mobilenetv2_120d", 28),
        ("efficientnet_lite0", 18),
        ("tf_efficientnet_lite0", 18),
        ("mnasnet_100", 19),
        ("fbnetc_100", 23),
        ("spnasnet_100", 23),
        ("tf_mobilenetv3_large_minimal_100", 17),
    ],
)
@torch.no_grad()
def test_a_network_is_one_operator(timm, name, units):
    x = torch.randn(4, 3, 64, 64)
    model = make(timm, name, x)
    expected, state = model(x), model.state_dict(keep_vars=True)
    mnv2_fused.convert(model)
    found = mnv2_fused.explain(model)
    assert len(found) == units and set(found.values()) == {None}
    assert mnv2_fused.explain(model, x) == found
    assert next(iter(found)) == "conv_stem"
    check(model, x, NETWORK)
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(state) and all(after[key] is tensor for key, tensor in state.items())
    assert torch.equal(plain(model)(x), expected)


@torch.no_grad()
def test_convert_and_revert(timm):
    model, x = make_small(timm), torch.randn(4, 3, 40, 40)
    expected, text = model(x), repr(model)
    kinds = {name: type(m) for name, m in model.named_modules()}
    attributes = {name: set(vars(m)) for name, m in model.named_modules()}
    assert mnv2_fused.convert(mnv2_fused.convert(model)) is model
    assert operators(lambda: model(x)) == NETWORK
    assert all(isinstance(m, kinds[name]) for name, m in model.named_modules())
    mnv2_fused.revert(model)
    assert {name: type(m) for name, m in model.named_modules()} == kinds
    assert {name: set(vars(m)) for name, m in model.named_modules()} == attributes
    assert operators(lambda: model(x)) == [] and torch.equal(model(x), expected) and repr(model) == text


@pytest.mark.parametrize(
    ("options", "fused"),
    [
        ({"pad_type": "same"}, NETWORK),
        ({"output_stride": 8, "pad_type": "same"}, NETWORK),
        ({"output_stride": 8}, NETWORK),
        ({"drop_path_rate": 0.2, "drop_rate": 0.2}, NETWORK),
        ({"act_layer": nn.ReLU}, NETWORK),
        ({"global_pool": "fast"}, NETWORK),
        ({"num_classes": 0}, NETWORK),  # the pooling runs plain behind it
        ({"global_pool": "max"}, NETWORK),
        ({"global_pool": "catavgmax"}, NETWORK),
        ({"num_features": 0}, NETWORK),
        ({"stem_kernel_size": 5}, NETWORK),
        ({"act_layer": nn.SiLU}, []),
    ],
)
@pytest.mark.parametrize("size", [(40, 40), (37, 43)])
def test_options(timm, options, fused, size):
    check(mnv2_fused.convert(make_small(timm, **options)), torch.randn(4, 3, *size), fused)


def test_same_padding_ignores_the_attribute(timm):
    model = make_small(timm, pad_type="same")
    convolutions = [m for m in model.modules() if type(m).__name__ == "Conv2dSame"]
    for conv in convolutions:
        conv.padding = (3, 3)
    assert len(convolutions) == 3
    check(mnv2_fused.convert(model), torch.randn(4, 3, 40, 40), NETWORK)


@torch.no_grad()
def test_every_norm_has_its_own_eps(timm):
    model = make_small(timm)
    for i, norm in enumerate(m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.eps = 0.05 * (i + 1)
    check(mnv2_fused.convert(model), torch.randn(4, 3, 40, 40), NETWORK)


@pytest.mark.parametrize(
    "classifier", [lambda: nn.Sequential(nn.Linear(40, 9), nn.ReLU(), nn.Linear(9, 5)), nn.Identity]
)
def test_any_classifier(timm, classifier):
    model = make_small(timm)
    model.classifier = classifier()
    check(mnv2_fused.convert(model), torch.randn(4, 3, 40, 40), NETWORK)


@torch.no_grad()
def test_features_and_head_apart(timm):
    model, x = mnv2_fused.convert(make_small(timm)), torch.randn(4, 3, 40, 40)
    assert operators(lambda: model.forward_features(x)) == NETWORK
    features, whole = model.forward_features(x), model(x)
    assert features.is_contiguous() and features.shape == (4, 40, 5, 5)
    torch.testing.assert_close(model.forward_head(features), whole, rtol=1e-4, atol=1e-4)
    reference = plain(model)
    for index, tensor in enumerate(model.forward_intermediates(x)[1]):
        torch.testing.assert_close(tensor, reference.forward_intermediates(x)[1][index], rtol=1e-3, atol=1e-3)


@torch.no_grad()
@torch.no_grad()
def test_a_head_that_drops_runs_plain(timm):
    x = torch.randn(2, 3, 40, 40)
    model = mnv2_fused.convert(make_small(timm))
    check(model, x, NETWORK)
    model.training = True  # the norms stay in evaluation, as in Monte Carlo dropout
    check(model, x, NETWORK)
    model.drop_rate = 0.5
    torch.manual_seed(0)
    found = model(x)
    torch.manual_seed(0)
    torch.testing.assert_close(found, plain(model)(x))
    model.drop_rate = 0.0
    check(model, x, NETWORK)


def test_hooks_are_called_and_keep_the_rest_fused(timm):
    x, dense, block = torch.randn(4, 3, 40, 40), "dense", "inverted_residual"
    for name, fused in {
        "conv_stem": [*[block] * 4, dense],
        "bn1.act": [*[block] * 4, dense],
        "blocks": [dense, *[block] * 4, dense],
        "blocks.1": [dense, *[block] * 4, dense],
        "blocks.1.0": [dense, *[block] * 4, dense],
        "blocks.1.0.bn2": [dense, *[block] * 3, dense],
        "global_pool": NETWORK,
        "classifier": NETWORK,
    }.items():
        model, seen = mnv2_fused.convert(make_small(timm)), []
        handle = model.get_submodule(name).register_forward_hook(lambda module, arguments, y, seen=seen: seen.append(y))
        check(model, x, fused)
        assert seen, name
        handle.remove()
        check(model, x, NETWORK)


@torch.no_grad()
def test_what_the_network_overrides_is_called(timm):
    x = torch.randn(4, 3, 40, 40)
    model = mnv2_fused.convert(make_small(timm))
    assert operators(lambda: model(x)) == NETWORK
    model.forward_head = lambda x: x.mean((2, 3))
    assert model(x).shape == (4, 40)
    assert "overrides forward_head" in reasons(model)["conv_stem"]
    del model.forward_head
    check(model, x, NETWORK)


@torch.no_grad()
def test_copies_pickles_and_scripts(timm):
    x = torch.randn(2, 3, 40, 40)
    for features in (False, True):
        model = mnv2_fused.convert(make_small(timm, features))
        expected = plain(model)(x)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert mnv2_fused.explain(other) == mnv2_fused.explain(model)
            assert operators(lambda other=other: other(x)) == NETWORK
        torch.testing.assert_close(torch.jit.script(model)(x), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_compiles(timm, fresh_dynamo):
    x = torch.randn(2, 3, 40, 40)
    for features in (False, True):
        model = mnv2_fused.convert(make_small(timm, features))
        program = torch.export.export(model, (x,))
        names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
        assert names[0] == "mnv2_fused.cached_network.default"
        torch.testing.assert_close(program.module()(x), model(x), rtol=0, atol=0)


# -------------------------------------------------------------------------------------------------------- feature maps


@pytest.mark.parametrize(
    "options", [{}, {"out_indices": (1, 2)}, {"output_stride": 8}, {"pad_type": "same"}, {"out_indices": (0,)}]
)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@torch.no_grad()
def test_feature_maps_are_one_operator(timm, options, memory_format):
    model = mnv2_fused.convert(make_small(timm, features=True, **options))
    x = torch.randn(4, 3, 40, 40).to(memory_format=memory_format)

    class Joined(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            return torch.cat([y.flatten(1) for y in self.model(x)], 1)

    check(Joined().eval(), x, NETWORK)
    for ours, theirs in zip(model(x), plain(model)(x), strict=True):
        assert ours.stride() == theirs.stride()


@pytest.mark.parametrize("gradients", [False, True])
def test_intermediates_are_the_maps_of_the_features(timm, gradients):
    model, x = mnv2_fused.convert(make_small(timm)), torch.randn(2, 3, 40, 40)
    with torch.set_grad_enabled(gradients):
        features = model.forward_features(x)
        last, maps = model.forward_intermediates(x, indices=[1, 2], extra_blocks=True)
        early = model.forward_intermediates(x, indices=[1], stop_early=True, extra_blocks=True, intermediates_only=True)
        assert torch.equal(last, features) and torch.equal(early[0], maps[0])
        run = operators(lambda: model.forward_intermediates(x))
    assert len([name for name in run if "dense" in name]) == 2


def test_two_calls_before_a_backward(timm):
    """Running statistics that a call updates count no version, as nn.BatchNorm2d's: a plain call may come before."""
    model, x = mnv2_fused.convert(make_small(timm)).train(), torch.randn(4, 3, 40, 40)
    plain_map = model.bn1(model.conv_stem(x))
    (plain_map.sum() + model(x).sum()).backward()
    assert model.conv_stem.weight.grad.isfinite().all()


@torch.no_grad()
def test_maps_from_inside_blocks_come_from_hooks(timm):
    model = timm.create_model("mobilenetv2_035", features_only=True, feature_location="expansion")
    x = torch.randn(4, 3, 64, 64)
    randomize(nn.Sequential(model).eval(), x)
    expected = model(x)
    mnv2_fused.convert(model)
    for ours, theirs in zip(model(x), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    assert "feature hooks" in reasons(model)["conv_stem"]
    assert any("conv_pwl has hooks" in why for why in reasons(model).values())


# --------------------------------------------------------------------------------------- networks that fit in part


@pytest.mark.parametrize(
    ("name", "fused", "some"),
    [
        ("semnasnet_075", 10, {"blocks.2.0": "se is a SqueezeExcite", "blocks.1.0": None, "conv_head": None}),
        (
            "mobilenetv3_small_050",
            2,
            {"conv_stem": "bn1.act is a Hardswish", "blocks.0.0": "se is a SqueezeExcite", "blocks.1.0": None},
        ),
    ],
)
def test_block_by_block(timm, name, fused, some):
    x = torch.randn(4, 3, 64, 64)
    model = mnv2_fused.convert(make(timm, name, x))
    with torch.no_grad():
        found = mnv2_fused.explain(model)
    assert sum(why is None for why in found.values()) == fused
    for unit, why in some.items():
        assert found[unit] is why or why in found[unit]
    with torch.no_grad():
        assert len(operators(lambda: model(x))) == fused
        expected = plain(model)(x)
        torch.testing.assert_close(model(x), expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


# --------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("options", [{}, {"pad_type": "same", "act_layer": nn.ReLU}])
def test_training(timm, options):
    model = mnv2_fused.convert(make_small(timm, **options)).train()
    for i, norm in enumerate(m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.eps, norm.momentum = 1e-3 * (i + 1), 0.05 * (i + 1)
    assert reasons(model) == {}
    check_training(model, torch.randn(4, 3, 40, 40), TRAINED, margin=1e-6)


def test_training_of_feature_maps(timm):
    model = mnv2_fused.convert(make_small(timm, features=True, out_indices=(1,))).train()

    class Only(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model(x)[0]

    x = torch.randn(4, 3, 40, 40)
    # Blocks whose maps nobody takes still update their statistics.
    assert operators(lambda: Only()(x)) == ["train_dense", *["train_block"] * 4]
    backward = [*["train_block_backward"] * 3, "train_dense_backward"]
    check_training(Only().train(), x, ["train_dense", *["train_block"] * 4, *backward], margin=1e-6)


def test_recompute_and_fused_reach_every_unit(timm):
    model, x = mnv2_fused.convert(make_small(timm)).train(), torch.randn(4, 3, 40, 40)
    model.recompute = "most"
    assert model._stem().recompute == "most" and model.blocks[1][0].recompute == "most"
    model.fused = False
    assert operators(lambda: model(x)) == [] and set(reasons(model).values()) == {"fused is False"}
    model.fused = True
    assert operators(lambda: model(x)) == TRAINED[:6]


def test_checkpointing(timm):
    model, x = mnv2_fused.convert(make_small(timm)).train(), torch.randn(4, 3, 40, 40)
    model.set_grad_checkpointing()
    run = operators(lambda: model(x).sum().backward())
    assert run.count("train_block") == 8 and run.count("train_block_backward") == 4
    assert run.count("train_dense") == 2 and reasons(model) == {}
    check(model.eval(), x, NETWORK)  # without gradients there is nothing to recompute
    model.train().set_grad_checkpointing(False)
    assert reasons(model) == {} and operators(lambda: model(x)) == TRAINED[:6]


# ------------------------------------------------------------------------------------------------- what is left alone


@torch.no_grad()
def test_a_class_with_another_forward_is_left_alone(timm, blocks, monkeypatch):
    class Subclass(blocks.InvertedResidual):
        def forward(self, x):
            return super().forward(x) * 2

    with pytest.raises(ValueError, match=r"convert: model must contain .*timm"):
        mnv2_fused.convert(Subclass(8, 8))
    forward = blocks.InvertedResidual.forward
    monkeypatch.setattr(blocks.InvertedResidual, "forward", lambda self, x: self.scale(forward(self, x)))
    with pytest.raises(ValueError, match="convert: model must contain"):
        mnv2_fused.convert(blocks.InvertedResidual(8, 8))


def test_blocks_of_older_versions(blocks):
    def forward(self, x):
        shortcut = x
        x = self.bn1(self.conv_pw(x))
        x = self.se(self.bn2(self.conv_dw(x)))
        x = self.bn3(self.conv_pwl(x))
        return self.drop_path(x) + shortcut if self.has_skip else x

    names = {"forward": forward, "__module__": blocks.__name__, "__qualname__": "InvertedResidual"}
    block = type("InvertedResidual", (blocks.InvertedResidual,), names)(8, 8, exp_ratio=4)
    del block.aa, block.conv_s2d, block.bn_s2d
    randomize(block, torch.randn(4, 8, 12, 12))
    check(mnv2_fused.convert(block), torch.randn(4, 8, 12, 12), ["inverted_residual"])


def test_timm_is_not_imported():
    code = (
        "import sys, torch, mnv2_fused\n"
        "try: mnv2_fused.convert(torch.nn.Linear(1, 1))\n"
        "except ValueError: pass\n"
        "print({'timm', 'torchvision', 'segmentation_models_pytorch'} & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
