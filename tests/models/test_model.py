"""MobileNetV2: the same network as torchvision's, and the same answers when fused."""

from __future__ import annotations

import copy
import hashlib
import pickle

import pytest
import torch
from oracle import assert_close, check, check_training, operators, plain, randomize
from torch import nn

from mnv2_fused import InvertedResidual, MobileNetV2, mobilenet_v2
from mnv2_fused.models.layers import Conv2dSame
from mnv2_fused.tools import measure

SMALL = [[1, 8, 1, 1], [6, 16, 2, 2], [6, 24, 1, 2]]
NETWORK = ["network"]
UNITS = ["dense", *["inverted_residual"] * 4, "head"]  # of the small network, one by one
LAST_ALONE = [*UNITS[:-1], "dense"]  # if pooling or classifier must run plain
TRAINED = ["train_dense", *["train_block"] * 4, "train_dense"]
TRAINED += [f"{name}_backward" for name in TRAINED]


def make_small(x=None, **options):
    return randomize(MobileNetV2(7, 0.5, SMALL, **options), torch.randn(4, 3, 40, 40) if x is None else x)


# ------------------------------------------------------------------------------------------------------ construction


def test_314_keys():
    keys = list(MobileNetV2().state_dict())
    assert len(keys) == 314
    digest = hashlib.sha256("\n".join(keys).encode()).hexdigest()
    assert digest == "398e13a521d3fbb9b8658ea6e7b02f47e7a3625a8991749ed1c2d25ae6571b5e"


@pytest.mark.parametrize(
    ("width", "parameters"),
    [(1.4, 6108776), (1.3, 5386792), (1.0, 3504872), (0.75, 2636424), (0.5, 1968680), (0.35, 1677128)],
)
def test_parameter_counts(width, parameters):
    with torch.device("meta"):
        model = MobileNetV2(width_mult=width)
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize(
    ("width", "channels"),
    [
        (0.35, [16, 8, 8, 16, 24, 32, 56, 112, 1280]),
        (0.5, [16, 8, 16, 16, 32, 48, 80, 160, 1280]),
        (0.75, [24, 16, 24, 24, 48, 72, 120, 240, 1280]),
        (1.0, [32, 16, 24, 32, 64, 96, 160, 320, 1280]),
        (1.3, [40, 24, 32, 40, 80, 128, 208, 416, 1664]),
        (1.4, [48, 24, 32, 48, 88, 136, 224, 448, 1792]),
    ],
)
def test_channel_counts(width, channels):
    with torch.device("meta"):
        features = MobileNetV2(width_mult=width).features
    got = [features[i].out_channels for i in (0, 1, 2, 4, 7, 11, 14, 17, 18)]
    assert got == channels


def test_shortcuts_follow_the_rule_and_not_a_table():
    with torch.device("meta"):
        assert MobileNetV2(width_mult=0.25).features[1].use_res_connect
        assert not MobileNetV2(width_mult=1.0).features[1].use_res_connect


def test_weights_of_seed_0():
    torch.manual_seed(0)
    model = MobileNetV2()
    sums = {name: p.detach().double().abs().sum().item() for name, p in model.named_parameters()}
    assert sums["features.0.0.weight"] == pytest.approx(54.773905, rel=1e-6)
    assert sums["features.9.conv.1.0.weight"] == pytest.approx(66.716505, rel=1e-6)
    assert sums["classifier.1.weight"] == pytest.approx(10210.400162, rel=1e-6)
    assert sum(sums.values()) == pytest.approx(162968.41773, rel=1e-6)
    first = model.features[0][0].weight.detach().flatten()[:3]
    torch.testing.assert_close(first, torch.tensor([0.0048479, 0.1733432, -0.0090975]), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"num_classes": 10, "width_mult": 0.35, "dropout": 0.5},
        {"width_mult": 1.4, "round_nearest": 4},
        {"inverted_residual_setting": SMALL, "norm_layer": lambda c: nn.GroupNorm(1, c)},
    ],
)
def test_equal_seeds_give_torchvisions_weights(torchvision_mobilenetv2, arguments):
    models = []
    for cls in (torchvision_mobilenetv2.MobileNetV2, MobileNetV2):
        torch.manual_seed(3)
        models.append(cls(**arguments))
    theirs, ours = models
    assert list(theirs.state_dict()) == list(ours.state_dict())
    for name, value in theirs.state_dict().items():
        assert torch.equal(value, ours.state_dict()[name]), name
    assert [n for n, _ in theirs.named_modules()] == [n for n, _ in ours.named_modules()]
    assert theirs.last_channel == ours.last_channel
    for a, b in zip(theirs.features[1:-1], ours.features[1:-1], strict=True):
        assert (a.use_res_connect, a.out_channels, a._is_cn, a.stride) == (
            b.use_res_connect,
            b.out_channels,
            b._is_cn,
            b.stride,
        )


def test_state_dict_goes_both_ways(torchvision_mobilenetv2):
    theirs, ours = torchvision_mobilenetv2.mobilenet_v2(width_mult=0.35).eval(), MobileNetV2(width_mult=0.35)
    randomize(ours, torch.randn(8, 3, 64, 64))
    theirs.load_state_dict(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(8, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(theirs(x), plain(ours)(x))
        check(ours, x, NETWORK)


def test_as_torchvisions_block(torchvision_mobilenetv2):
    model = torchvision_mobilenetv2.MobileNetV2(7, 0.5, SMALL, block=InvertedResidual)
    randomize(model, torch.randn(4, 3, 40, 40))
    check(model, torch.randn(8, 3, 40, 40), ["inverted_residual"] * 4)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"inverted_residual_setting": []}, "non-empty"),
        ({"inverted_residual_setting": [[1, 2, 3]]}, "4 elements"),
        ({"output_stride": 4}, "output_stride should be 8, 16 or 32, got 4"),
    ],
)
def test_wrong_arguments(arguments, match):
    with pytest.raises(ValueError, match=match):
        MobileNetV2(**arguments)


# ------------------------------------------------------------------------------------------------------------ fused


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [0.35, 1.0])
def test_network(width, dtype):
    model = randomize(MobileNetV2(10, width), torch.randn(4, 3, 64, 64))
    check(model.to(dtype), torch.randn(8, 3, 64, 64).to(dtype), NETWORK)


@pytest.mark.parametrize("size", [(1, 1), (33, 47), (32, 64)])
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
def test_sizes_and_formats(size, format):
    x = torch.randn(8, 3, *size).contiguous(memory_format=format)
    check(make_small(), x, NETWORK)


def test_images_of_a_large_batch_do_not_depend_on_their_neighbours():
    model = randomize(MobileNetV2(10), torch.randn(4, 3, 64, 64))
    x = torch.randn(7, 3, 96, 96)
    with torch.no_grad():
        alone = torch.cat([model(image) for image in x.split(1)])
        for threads in (1, 2, 3, 8):
            with measure.threads(threads):
                assert torch.equal(model(x), alone)


def test_peak_memory_of_a_large_batch():
    model = MobileNetV2().eval()
    expected, x = plain(model), torch.randn(32, 3, 96, 96).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        for network in (model, expected):
            network(x)
        assert measure.peak_memory(lambda: model(x)) < measure.peak_memory(lambda: expected(x)) / 5


def test_batch_of_none():
    model = make_small()
    with torch.no_grad():
        y = model(torch.randn(0, 3, 40, 40))
    assert y.shape == (0, 7) and y.is_contiguous()


def test_not_fused():
    model, x = make_small(fused=False), torch.randn(8, 3, 40, 40)
    check(model, x, [])
    model.fused = True
    check(model, x, NETWORK)
    model.fused = False
    check(model, x, [])
    check(pickle.loads(pickle.dumps(model)), x, [])


@pytest.mark.parametrize("output_stride", [8, 16, 32])
def test_output_stride(output_stride):
    torch.manual_seed(0)
    model = MobileNetV2(5, 0.35, output_stride=output_stride)
    randomize(model, torch.randn(2, 3, 65, 65))
    rates = [block.conv[-3][0].dilation[0] for block in model.features[1:-1]]
    expected = {
        32: [1] * 17,
        16: [1] * 14 + [2] * 3,
        8: [1] * 7 + [2] * 7 + [4] * 3,
    }
    assert rates == expected[output_stride]
    x = torch.randn(4, 3, 65, 65)
    with torch.no_grad():
        assert model.features(x).shape[-1] == -(-65 // output_stride)
    check(model, x, NETWORK)
    assert list(model.state_dict()) == list(MobileNetV2(5, 0.35).state_dict())


def test_tensorflow_padding_matters_at_even_sizes_only():
    ordinary, same = make_small(), make_small(tf_padding=True)
    same.load_state_dict(ordinary.state_dict())
    strided = [m for m in same.modules() if isinstance(m, nn.Conv2d) and m.stride != (1, 1)]
    assert len(strided) == 3 and all(isinstance(m, Conv2dSame) for m in strided)
    for size, equal in ((40, False), (41, True)):
        x = torch.randn(8, 3, size, size)
        y = check(same, x, NETWORK)
        with torch.no_grad():
            assert torch.equal(y, ordinary(x)) is equal


def test_norm_layer_is_the_callers():
    model = MobileNetV2(5, 0.35, tf_padding=True, norm_layer=lambda c: nn.BatchNorm2d(c, eps=1e-3, momentum=0.003))
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 52 and {(m.eps, m.momentum) for m in norms} == {(1e-3, 0.003)}
    check(randomize(model, torch.randn(8, 3, 64, 64)), torch.randn(8, 3, 64, 64), NETWORK)


def test_block_of_another_kind_runs_as_it_is():
    class Other(nn.Conv2d):
        def __init__(self, inp, oup, stride, expand_ratio, norm_layer):
            super().__init__(inp, oup, 3, stride, 1)

    check(make_small(block=Other), torch.randn(8, 3, 40, 40), ["dense", "head"])


def test_features_alone():
    # Detection and segmentation code calls `features`, or slices it.
    model, x = make_small(), torch.randn(8, 3, 40, 40)
    y = check(model.features, x, NETWORK)
    assert y.stride() == plain(model).features(x).stride()
    check(model.features[1:4], torch.randn(1, 16, 9, 9), ["inverted_residual"] * 3)


def test_results_do_not_depend_on_the_memory_format_or_the_way_in():
    model, x = make_small(), torch.randn(8, 3, 40, 40)
    with torch.no_grad():
        y = model(x)
        assert torch.equal(y, model(x.contiguous(memory_format=torch.channels_last)))
        assert torch.equal(y, model._forward_impl(x))


@pytest.mark.parametrize(
    ("path", "fused"),
    [
        ("", NETWORK),
        ("features", NETWORK),
        ("features.0", UNITS),
        ("features.2", UNITS),
        ("features.2.conv.1", ["dense", *["inverted_residual"] * 3, "head"]),
        ("features.5", LAST_ALONE),
        ("features.5.0", UNITS[:-1]),
        ("classifier", NETWORK),
        ("classifier.0", NETWORK),
    ],
)
@pytest.mark.parametrize("after_a_fused_call", [False, True])
def test_hooks_see_what_they_see_in_a_plain_network(path, fused, after_a_fused_call):
    model, x = make_small(), torch.randn(8, 3, 40, 40)
    reference = plain(model)
    if after_a_fused_call:
        check(model, x, NETWORK)
    seen = []
    exact = copy.deepcopy(reference).double()
    for m in (model, reference, exact):
        module = m.get_submodule(path)
        module.register_forward_hook(lambda module, arguments, y: seen.append((arguments[0], y)))
    # The operator runs on the remembered weights while they are checked; then its result is thrown away.
    tried = NETWORK if after_a_fused_call and path else []
    with torch.no_grad():
        assert operators(lambda: model(x)) == tried + fused
        reference(x)
        exact(x.double())
    for ours, theirs, right in zip(*seen, strict=True):
        assert ours.stride() == theirs.stride()
        assert_close(ours, theirs, right)


def test_hook_can_change_what_follows():
    model, x = make_small(), torch.randn(8, 3, 40, 40)
    model.features[2].register_forward_hook(lambda module, arguments, y: y * 0)
    zeroed = check(model, x, UNITS)
    with torch.no_grad():
        assert torch.equal(zeroed, model(x * 2))
    model.features[1].register_forward_hook(lambda module, arguments, y: y.double())
    with torch.no_grad(), pytest.raises(RuntimeError):
        model(x)


def test_gradient_of_an_intermediate_output():
    model, x = make_small().requires_grad_(False), torch.randn(8, 3, 40, 40)
    kept = []
    model.features[2].register_forward_hook(lambda module, arguments, y: kept.append(y.requires_grad_()) or y)
    assert operators(lambda: model(x)) == [*UNITS[:3], *["train_block"] * 2, "train_dense"]
    model(x).sum().backward()
    assert kept[-1].grad is not None and kept[-1].grad.abs().sum() > 0


def test_other_classifiers():
    model, x = make_small(), torch.randn(8, 3, 40, 40)
    check(model, x, NETWORK)
    model.classifier[1] = nn.Linear(1280, 3, bias=False)
    assert check(model, x, NETWORK).shape == (8, 3)
    model.classifier = nn.Sequential(nn.Dropout(), nn.Linear(1280, 9))
    model.eval()
    assert check(model, x, NETWORK).shape == (8, 9)
    model.classifier = nn.Identity()
    assert check(model, x, NETWORK).shape == (8, 1280)
    layers = nn.Linear(1280, 6), nn.ReLU(), nn.Dropout(), nn.Linear(6, 3), nn.LogSoftmax(1)
    for classifier in (nn.Linear(1280, 3), nn.Sequential(*layers)):
        model.classifier = classifier.eval()
        assert check(model, x, NETWORK).shape == (8, 3)


def test_dropout_in_training_mode():
    model, x = make_small(dropout=0.5), torch.randn(8, 3, 40, 40)
    model.classifier.train()
    with torch.no_grad():
        assert operators(lambda: model(x[:2])) == NETWORK
        assert not torch.equal(model(x), model(x))
        model.classifier[0].p = 0.0
        assert operators(lambda: model(x[:2])) == NETWORK


def test_subclass_with_a_forward_of_its_own():
    class Twice(MobileNetV2):
        def _forward_impl(self, x):
            return super()._forward_impl(x) * 2

    model, x = make_small(), torch.randn(8, 3, 40, 40)
    twice = Twice(7, 0.5, SMALL).eval()
    twice.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(twice(x), model(x) * 2)


def test_compiled_block_inside_an_eager_network_is_called():
    model, x = make_small(), torch.randn(8, 3, 40, 40)
    model.features[2].compile(backend="eager")
    with torch.no_grad():
        model(x), model(x[:2])
    check(model, x, ["dense", "inverted_residual", "cached_inverted_residual", *["inverted_residual"] * 2, "head"])


def test_inference_after_training():
    model, x = make_small(dropout=0.0), torch.randn(4, 3, 40, 40)
    check(model, x, NETWORK)
    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    check(model.eval(), x, NETWORK)


def test_frozen_batch_norm_while_training():
    model, x = make_small(dropout=0.0).train(), torch.randn(8, 3, 40, 40)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.eval()
    check(model, x)
    check_training(model, torch.randn(2, 3, 16, 16), TRAINED, margin=1e-6)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies(copied):
    model, x = make_small(), torch.randn(8, 3, 40, 40)
    y = check(model, x, NETWORK)
    other = copied(model)
    assert torch.equal(check(other, x, NETWORK), y)
    other.features[5][0].weight.data.mul_(2)
    assert torch.equal(check(model, x, NETWORK), y) and not torch.equal(check(other, x, NETWORK), y)


def test_script_and_trace():
    model, x = make_small(tf_padding=True), torch.randn(8, 3, 40, 40)
    reference = plain(model)
    with torch.no_grad():
        assert torch.equal(torch.jit.script(model)(x), reference(x))
        assert torch.equal(torch.jit.trace(model, x, check_trace=False)(x), reference(x))


def test_vmap_over_models():
    models = [make_small() for _ in range(2)]
    x = torch.randn(2, 1, 3, 40, 40)
    parameters, buffers = torch.func.stack_module_state(models)

    def call(p, b, y):
        return torch.func.functional_call(models[0], (p, b), y)

    with torch.no_grad():
        y = torch.vmap(call)(parameters, buffers, x)
        for i in range(2):
            torch.testing.assert_close(y[i], plain(models[i])(x[i]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(3, 40, 40), (2, 1, 40, 40), (2, 3, 40), (2, 3, 0, 40)])
def test_wrong_shape_raises_the_error_of_plain(shape):
    model, x = make_small(), torch.randn(shape)

    def outcome(m):
        try:
            with torch.no_grad():
                return tuple(m(x).shape)
        except Exception as exception:
            return type(exception), str(exception)

    assert outcome(model) == outcome(plain(model))


def test_meta():
    with torch.device("meta"):
        model = MobileNetV2().eval()
    assert model(torch.randn(2, 3, 64, 64, device="meta")).shape == (2, 1000)


# ----------------------------------------------------------------------------------------------------- mobilenet_v2


def test_mobilenet_v2_without_weights():
    torch.manual_seed(1)
    a = mobilenet_v2(width_mult=0.35, num_classes=3)
    torch.manual_seed(1)
    b = MobileNetV2(3, 0.35)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert a.training


def test_mobilenet_v2_with_a_file(tmp_path):
    saved = randomize(MobileNetV2(12, 0.35), torch.randn(8, 3, 64, 64))
    path = tmp_path / "weights.pth"
    torch.save(saved.state_dict(), path)
    model = mobilenet_v2(weights=path).eval()
    x = torch.randn(8, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model(x), saved(x))
    with pytest.raises(ValueError, match="num_classes must be that of the weights, 12; got 5"):
        mobilenet_v2(weights=path, num_classes=5)
