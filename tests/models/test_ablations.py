"""The paper's ablations: an activation behind the projection, and other shortcuts."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_close, check, check_training, operators, plain, randomize, step
from torch import Tensor, nn

import mnv2_fused
from mnv2_fused import InvertedResidual, MobileNetV2, extras
from mnv2_fused.models.backbone import Backbone
from mnv2_fused.models.fused import is_unit
from mnv2_fused.models.units import ExpansionFeatures, ExpansionResidual, TappedInvertedResidual

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BLOCK, NETWORK = ["inverted_residual"], ["network"]
# Seven blocks. Shortcuts between bottlenecks in blocks 3, 5 and 6, between expansions in blocks 4, 5 and 6. Block 7 has
# as many hidden channels as block 6, and a stride.
SMALL = [[1, 8, 1, 1], [6, 16, 2, 2], [6, 24, 1, 1], [4, 24, 2, 1], [4, 32, 1, 2]]
BLOCKS = 7
FUSED = {
    "linear": {},
    "relu6": {"project_activation": nn.ReLU6},
    "no shortcut": {"shortcut": "none"},
    "relu6, no shortcut": {"project_activation": nn.ReLU6, "shortcut": "none"},
}
ALL = {**FUSED, "expansion": {"shortcut": "expansion"}}


def make_block(inp=8, oup=8, stride=1, expand_ratio=6, **options):
    return randomize(InvertedResidual(inp, oup, stride, expand_ratio, **options), torch.randn(4, inp, 12, 12))


def make_small(**options):
    model = MobileNetV2(7, inverted_residual_setting=SMALL, dropout=0.0, **options)
    return randomize(model, torch.randn(4, 3, 40, 40))


def trained(blocks: list[str]) -> list[str]:
    names = ["train_dense", *blocks, "train_dense"]
    return names + [f"{name}_backward" for name in names]


# ----------------------------------------------------------------------------------------------- fused, and right


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize(
    ("inp", "oup", "stride", "ratio"), [(8, 8, 1, 6), (24, 24, 1, 1), (50, 60, 1, 2), (8, 16, 2, 6)]
)
def test_block(inp, oup, stride, ratio, name, dtype):
    block, x = make_block(inp, oup, stride, ratio, **FUSED[name]).to(dtype), 3 * torch.randn(2, inp, 11, 9).to(dtype)
    y = check(block, x, BLOCK)
    check(block, x.contiguous(memory_format=torch.channels_last), BLOCK)
    if "relu6" in name and not block.use_res_connect:
        assert y.min() == 0 and 4 < y.max() <= 6


@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_activation_comes_before_the_shortcut(bias):
    block, x = make_block(project_activation=nn.ReLU6), torch.randn(2, 8, 9, 9)
    if bias:
        block.conv[2].bias = nn.Parameter(torch.randn(8))
    added = check(block, x, BLOCK) - x
    assert -1e-5 <= added.min() <= 1e-5 and added.max() > 1 and (block(x) < 0).any()


@pytest.mark.parametrize("frozen", [False, True], ids=["batch", "frozen"])
@pytest.mark.parametrize("recompute", ["most", "balanced", "least"])
@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("stride", [1, 2])
def test_training_of_a_block(stride, name, recompute, frozen):
    block = make_block(8, 8, stride, **FUSED[name]).train()
    block.recompute = recompute
    if frozen:
        for module in block.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
    check_training(block, torch.randn(4, 8, 12, 11).to(memory_format=torch.channels_last))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FUSED)
def test_network_is_one_operator(name, dtype):
    model, x = make_small(**FUSED[name]).to(dtype), torch.randn(9, 3, 41, 46).to(dtype)
    check(model, x, NETWORK)
    with torch.no_grad():
        assert set(mnv2_fused.explain(model, x).values()) == {None}
        model.features[0].register_forward_hook(lambda *_: None)
        check(model, x, ["dense", *BLOCK * BLOCKS, "head"])


@pytest.mark.parametrize("name", FUSED)
def test_training_of_a_network(name):
    model = make_small(**FUSED[name]).train()
    check_training(model, torch.randn(4, 3, 16, 14), trained(["train_block"] * BLOCKS), margin=1e-6)


def test_autocast():
    block, x = make_block(project_activation=nn.ReLU6), torch.randn(2, 8, 9, 9)
    reference = plain(block)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        got, expected = block(x), reference(x)
        assert len(operators(lambda: block(x))) == 1
    with torch.no_grad():
        assert_close(got, expected, reference.double()(x.double()))


@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_compiled(name, fresh_dynamo):
    model, x = make_small(**ALL[name]), torch.randn(2, 3, 20, 20)
    compiled, reference = torch.compile(model, backend="eager", fullgraph=True), plain(model)
    assert_close(compiled(x), reference(x), copy.deepcopy(reference).double()(x.double()))
    assert operators(lambda: compiled(x))[:1] == (["cached_network"] if name in FUSED else ["cached_dense"])


def test_backbone_and_tapped_block():
    options = {"project_activation": nn.ReLU6}
    tapped = randomize(TappedInvertedResidual(8, 8, 1, 6, **options), torch.randn(4, 8, 12, 12))
    x = torch.randn(2, 8, 9, 9)
    with torch.no_grad():
        y, expanded = tapped(x, with_expansion=True)
        assert operators(lambda: tapped(x, with_expansion=True)) == ["dense", *BLOCK]
        reference = plain(tapped)
        y_plain, expanded_plain = reference(x, with_expansion=True)
        assert torch.equal(y_plain, reference(x))
        y_exact, expanded_exact = reference.double()(x.double(), with_expansion=True)
        assert_close(y, y_plain, y_exact)
        assert_close(expanded, expanded_plain, expanded_exact)
    backbone = randomize(Backbone({"low": 3, "high": 17}, width_mult=0.25, **options), torch.randn(2, 3, 64, 64))
    with torch.no_grad():
        assert operators(lambda: backbone(torch.randn(1, 3, 64, 64))) == NETWORK


# ------------------------------------------------------------------------------------------ what a reading depends on


def test_other_activations():
    for make in (nn.ReLU, lambda: nn.Hardtanh(-1.5, 2.5)):
        check(make_block(project_activation=make), torch.randn(1, 8, 9, 9), BLOCK)
    block, x = make_block(project_activation=nn.SiLU), torch.randn(1, 8, 9, 9)
    check(block, x, [])
    with torch.no_grad():
        assert mnv2_fused.explain(block)["InvertedResidual"] == "project_activation is a SiLU, not an nn.ReLU6"


@pytest.mark.parametrize(
    ("change", "fused"),
    [
        (lambda block: setattr(block, "project_activation", None), True),
        (lambda block: setattr(block, "project_activation", nn.ReLU()), True),
        (lambda block: setattr(block.project_activation, "max_val", 1.0), True),
        (lambda block: block.project_activation.register_forward_hook(lambda m, x, y: 2 * y), False),
        (lambda block: setattr(block, "project_activation", nn.Tanh()), False),
        (lambda block: setattr(block, "use_res_connect", False), True),
    ],
    ids=["removed", "replaced", "bound", "hook", "unknown", "shortcut"],
)
def test_change_between_two_calls_is_seen(change, fused):
    block, x = make_block(project_activation=nn.ReLU6), torch.randn(2, 8, 9, 9)
    model, images = make_small(project_activation=nn.ReLU6), torch.randn(2, 3, 40, 40)
    before = check(block, x, BLOCK), check(model, images, NETWORK)
    change(block)
    change(model.features[3])
    after = check(block, x, BLOCK if fused else []), check(model, images, NETWORK if fused else None)
    assert not torch.equal(before[0], after[0]) and not torch.equal(before[1], after[1])


def test_activation_added_later_is_seen():
    block, x = make_block(), torch.randn(2, 8, 9, 9)
    before = check(block, x, BLOCK)
    block.project_activation = nn.ReLU6()
    assert not torch.equal(before, check(block, x, BLOCK))


# ------------------------------------------------------------------------------------------------------ the same keys


def test_checkpoints_of_all_variants_load_into_each_other():
    keys = list(MobileNetV2(7, inverted_residual_setting=SMALL).state_dict())
    state = make_small().state_dict()
    for options in ALL.values():
        model = MobileNetV2(7, inverted_residual_setting=SMALL, **options)
        assert list(model.state_dict()) == keys
        model.load_state_dict(state)


def test_seed_gives_all_variants_the_same_weights():
    states = []
    for options in ALL.values():
        torch.manual_seed(3)
        states.append(MobileNetV2(7, 0.25, **options).state_dict())
    assert all(torch.equal(state[key], states[0][key]) for state in states[1:] for key in state)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_copies_and_scripts(name, copied):
    model, x = make_small(**ALL[name]), torch.randn(2, 3, 40, 40)
    other = copied(model)
    assert torch.equal(other(x), model(x)) and [type(m) for m in other.modules()] == [type(m) for m in model.modules()]
    assert torch.equal(torch.jit.script(model)(x), plain(model)(x))
    block = make_block(**ALL[name])
    assert torch.equal(copied(block)(x.new_ones(1, 8, 4, 4)), block(x.new_ones(1, 8, 4, 4)))


def test_no_shortcut_is_torchvisions_block_without_one(torchvision_mobilenetv2):
    ours = make_block(shortcut="none")
    theirs = torchvision_mobilenetv2.InvertedResidual(8, 8, 1, 6).eval()
    theirs.load_state_dict(ours.state_dict())
    theirs.use_res_connect = False
    x = torch.randn(2, 8, 9, 9)
    with torch.no_grad():
        assert torch.equal(plain(ours)(x), theirs(x))
        assert_close(ours(x), theirs(x), theirs.double()(x.double()))


# ---------------------------------------------------------------------------------------- shortcuts between expansions


def by_hand(model: MobileNetV2, x: Tensor, trains: bool = False) -> tuple[Tensor, list[int]]:
    """The output of a network with shortcuts between expansions, from its weights, and the blocks that add one."""
    state = dict(model.named_parameters()) | dict(model.named_buffers())

    def conv_norm(y: Tensor, conv: str, norm: str, stride: int = 1, padding: int = 0, groups: int = 1) -> Tensor:
        y = F.conv2d(y, state[f"{conv}.weight"], None, stride, padding, 1, groups)
        mean, var = (None, None) if trains else (state[f"{norm}.running_mean"], state[f"{norm}.running_var"])
        return F.batch_norm(y, mean, var, state[f"{norm}.weight"], state[f"{norm}.bias"], trains)

    y = conv_norm(x, "features.0.0", "features.0.1", 2, 1).clamp(0, 6)
    hidden, adding = None, []
    steps = [(t, s if i == 0 else 1) for t, _, repeats, s in SMALL for i in range(repeats)]
    for block, (expand_ratio, stride) in enumerate(steps, start=1):
        at, layer = f"features.{block}.conv", int(expand_ratio != 1)
        if layer:
            y = conv_norm(y, f"{at}.0.0", f"{at}.0.1").clamp(0, 6)
        y = conv_norm(y, f"{at}.{layer}.0", f"{at}.{layer}.1", stride, 1, y.shape[1]).clamp(0, 6)
        if stride == 1 and hidden is not None and hidden.shape == y.shape:
            y = y + hidden
            adding.append(block)
        hidden = y
        y = conv_norm(y, f"{at}.{layer + 1}", f"{at}.{layer + 2}")
    last = f"features.{BLOCKS + 1}"
    y = conv_norm(y, f"{last}.0", f"{last}.1").clamp(0, 6).mean((2, 3))
    return F.linear(y, state["classifier.1.weight"], state["classifier.1.bias"]), adding


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.no_grad()
def test_shortcuts_between_expansions(dtype):
    model, x = make_small(shortcut="expansion").to(dtype), torch.randn(3, 3, 41, 38).to(dtype)
    check(model, x, ["dense", "dense"])
    exact = copy.deepcopy(model).double()
    right, adding = by_hand(exact, x.double())
    assert adding == [4, 5, 6]
    assert torch.allclose(exact(x.double()), right, rtol=1e-12, atol=1e-12)
    assert_close(model(x), plain(model)(x), right)


def test_training_with_shortcuts_between_expansions():
    model, x = make_small(shortcut="expansion").train(), torch.randn(4, 3, 24, 24)
    check_training(model, x, trained([]), margin=1e-6)
    exact = plain(model).double()
    reference = copy.deepcopy(exact)
    found, given = step(exact, x.double()), x.double().requires_grad_(True)
    right, _ = by_hand(reference, given, trains=True)
    right.backward(torch.randn(right.shape, generator=torch.Generator().manual_seed(2)).double())
    assert torch.allclose(found["gradient of the input"], given.grad, rtol=1e-8, atol=1e-10)
    for name, parameter in reference.named_parameters():
        assert torch.allclose(found[f"gradient of {name}"], parameter.grad, rtol=1e-8, atol=1e-8), name


def test_explain_says_why_they_run_plain():
    model, x = make_small(shortcut="expansion"), torch.randn(2, 3, 40, 40)
    why = "its shortcut takes the expansion of another block"
    with torch.no_grad():
        for found in (mnv2_fused.explain(model), mnv2_fused.explain(model, x)):
            assert {name for name, reason in found.items() if reason == why} == {f"features.{i}" for i in range(1, 8)}
            assert found["features.0"] is None and found["features.8"] is None
            assert found["head"] == "features has a forward of its own"
    assert mnv2_fused.explain(model.train())["features.2"] == why


@torch.no_grad()
def test_a_block_alone_adds_nothing():
    block, x = make_block(shortcut="expansion"), torch.randn(2, 8, 9, 9)
    same = make_block(shortcut="none")
    same.load_state_dict(block.state_dict())
    assert type(block) is ExpansionResidual and not is_unit(block)
    assert torch.equal(check(block, x, []), plain(same)(x))
    carried = [torch.ones(2, 48, 9, 9)]
    y = block(x, carried)
    assert not torch.equal(y, block(x)) and len(carried) == 1 and carried[0].min() >= 1


@torch.no_grad()
def test_a_part_of_the_features_and_hooks():
    model, x, seen = make_small(shortcut="expansion"), torch.randn(2, 3, 40, 40), []
    assert type(model.features[:5]) is ExpansionFeatures
    model.features[5].register_forward_hook(lambda module, given, y: seen.append(y))
    y = model(x)
    assert torch.equal(seen[0], model.features[:6](x))
    assert torch.equal(y, model(x))


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("make", [lambda **options: InvertedResidual(8, 8, 1, 6, **options), MobileNetV2])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shortcut": "both"}, "shortcut should be one of bottleneck, expansion, none, got 'both'"),
        ({"shortcut": None}, "shortcut should be one of bottleneck, expansion, none, got None"),
        ({"project_activation": "relu6"}, "project_activation should be None or make a module .*; got 'relu6'"),
        ({"project_activation": nn.ReLU6()}, "project_activation should be None or make a module .*; got ReLU6"),
        ({"project_activation": nn.PReLU}, "project_activation should be .* without parameters, .*PReLU"),
    ],
)
def test_unknown_values(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: TappedInvertedResidual(8, 8, 1, 6, shortcut="expansion"),
            "shortcut of a TappedInvertedResidual should be bottleneck or none, got 'expansion'",
        ),
        (
            lambda: ExpansionResidual(8, 8, 1, 6, shortcut="none"),
            "shortcut of a ExpansionResidual should be expansion, got 'none'",
        ),
        (
            lambda: Backbone({"high": 17}, shortcut="expansion"),
            "Backbone: shortcut should be bottleneck or none, got 'expansion'",
        ),
        (
            lambda: mnv2_fused.lraspp_mobilenet_v2(shortcut="expansion"),
            "Backbone: shortcut should be bottleneck or none, got 'expansion'",
        ),
        (
            lambda: MobileNetV2(shortcut="expansion", block=lambda *arguments, **options: nn.Identity()),
            "block should make blocks that pass their expansion on, .*, got Identity",
        ),
    ],
)
def test_no_shortcut_between_expansions(call, message):
    try:
        with pytest.raises(ValueError, match=message):
            call()
    except extras.MissingExtraError as error:
        pytest.skip(str(error))


def test_own_block_gets_only_what_is_asked_for():
    given: list[dict] = []

    def block(inp, oup, stride, **options) -> nn.Module:
        given.append(options)
        return InvertedResidual(inp, oup, stride, **options)

    for options in ALL.values():
        given.clear()
        model = MobileNetV2(7, inverted_residual_setting=SMALL, block=block, **options)
        assert all(each.keys() - {"expand_ratio", "norm_layer"} == options.keys() for each in given)
        assert all((m.project_activation is None) == ("project_activation" not in options) for m in blocks(model))


def blocks(model: MobileNetV2) -> list[InvertedResidual]:
    return [module for module in model.features if isinstance(module, InvertedResidual)]
