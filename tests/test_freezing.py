"""A frozen model gives the live model's bits without a check of its weights, and thaws by what its docs say."""

from __future__ import annotations

import contextlib
import copy
import pickle
import threading

import pytest
import torch
from oracle import operators, randomize
from torch import Tensor, nn

import mnv2_fused
from mnv2_fused import MobileNetV2, extras

X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def make(**options) -> MobileNetV2:
    return randomize(MobileNetV2(7, 0.35, **options), torch.randn(4, 3, 64, 64))


def tensors(outputs) -> list[Tensor]:
    """All tensors in what a model returns."""
    if isinstance(outputs, Tensor):
        return [outputs]
    entries = outputs.values() if hasattr(outputs, "values") else outputs if isinstance(outputs, (list, tuple)) else ()
    return [t for entry in entries for t in tensors(entry)]


def assert_same(got, expected) -> None:
    got, expected = tensors(got), tensors(expected)
    assert len(got) == len(expected) > 0
    for ours, theirs in zip(got, expected, strict=True):
        assert torch.equal(ours, theirs) and ours.stride() == theirs.stride() and ours.dtype == theirs.dtype


def scale(model: nn.Module) -> None:
    """Changes every weight in a way that leaves a version, and results."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.25)


def frozen_names(model: nn.Module) -> set[str]:
    return mnv2_fused.explain(model).frozen


# ------------------------------------------------------------------------------------------------------------- families


def _torchvision(name: str):
    models = extras.use("torchvision.models", "detection")
    return mnv2_fused.convert(getattr(models, name)(num_classes=7))


def _timm(name: str, **options):
    timm = pytest.importorskip("timm")
    return mnv2_fused.convert(timm.create_model(name, **options))


def _transformers(name: str):
    hf = pytest.importorskip("transformers.models.mobilenet_v2.modeling_mobilenet_v2")
    config = hf.MobileNetV2Config(depth_multiplier=0.25, num_labels=7)
    return mnv2_fused.convert(getattr(hf, f"MobileNetV2{name}")(config))


def _smp(name: str, encoder: str):
    smp = pytest.importorskip("segmentation_models_pytorch")
    options = {"decoder_channels": (16, 16, 8, 8, 8)} if name == "Unet" else {"decoder_channels": 16}
    return mnv2_fused.convert(getattr(smp, name)(encoder, encoder_weights=None, classes=3, **options))


def _detector():
    models = extras.use("torchvision.models", "detection")
    ssd = extras.use("torchvision.models.detection", "detection").ssdlite320_mobilenet_v3_large
    model = ssd(weights=None, weights_backbone=None, num_classes=3)
    model.backbone.extra.append(models.mobilenet_v2().features[1:3])  # never called
    return mnv2_fused.convert(model)


FAMILIES = {
    "own": lambda: MobileNetV2(7, 0.35),
    "own, another classifier": lambda: _with_classifier(MobileNetV2(7, 0.35)),
    "own, a unit without fusion": lambda: _with_a_plain_unit(MobileNetV2(7, 0.35)),
    "own, expansion": lambda: MobileNetV2(7, 0.35, shortcut="expansion"),
    "own DeepLabV3": lambda: mnv2_fused.deeplabv3_mobilenet_v2(num_classes=3, width_mult=0.35, aspp=True),
    "own LR-ASPP": lambda: mnv2_fused.lraspp_mobilenet_v2(num_classes=3, width_mult=0.35),
    "a block": lambda: nn.Sequential(nn.Conv2d(3, 8, 1), mnv2_fused.InvertedResidual(8, 8, 1, 6)),
    "torchvision": lambda: _torchvision("mobilenet_v2"),
    "torchvision MNASNet": lambda: _torchvision("mnasnet0_5"),
    "torchvision MobileNetV3": lambda: _torchvision("mobilenet_v3_small"),
    "torchvision features": lambda: _torchvision("mobilenet_v2").features,
    "timm": lambda: _timm("mobilenetv2_035", num_classes=7),
    "timm features": lambda: _timm("mobilenetv2_035", features_only=True),
    "timm without a head": lambda: _timm("mobilenetv2_035", num_classes=0, global_pool=""),
    "timm lite": lambda: _timm("tf_efficientnet_lite0", num_classes=7),
    "transformers Model": lambda: _transformers("Model"),
    "transformers classification": lambda: _transformers("ForImageClassification"),
    "transformers segmentation": lambda: _transformers("ForSemanticSegmentation"),
    "smp Unet": lambda: _smp("Unet", "mobilenet_v2"),
    "smp DeepLabV3Plus, timm": lambda: _smp("DeepLabV3Plus", "timm-tf_efficientnet_lite0"),
}


PARTLY_PLAIN = {
    "own, a unit without fusion",
    "own, expansion",
    "own DeepLabV3",
    "own LR-ASPP",
    "a block",
    "torchvision MobileNetV3",
    "transformers segmentation",
    "smp Unet",
    "smp DeepLabV3Plus, timm",
}


def _with_classifier(model):
    model.classifier = nn.Sequential(nn.Linear(1280, 16), nn.ReLU(), nn.Linear(16, 7))
    return model


def _with_a_plain_unit(model):
    model.features[3].conv[0][2] = nn.SiLU()
    return model


@pytest.fixture(autouse=True)
def _importable():
    with contextlib.suppress(extras.MissingExtraError):  # makes torchvision importable, which other libraries import
        extras.use("torchvision", "detection")


@pytest.mark.parametrize("release", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_families(name, release):
    try:
        model = FAMILIES[name]()
    except extras.MissingExtraError as error:
        pytest.skip(str(error))
    randomize_statistics(model)
    x = X if "lite" not in name else torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        live = model(x)
        ran = operators(lambda: model(x))
    assert mnv2_fused.freeze(model, release=release) is model
    # Behind a plain module whose weights have gradients, units compute gradients, as live units do.
    for enabled in (True, False) if name not in PARTLY_PLAIN else (False,):
        with torch.set_grad_enabled(enabled):
            assert_same(model(x), live)
            assert operators(lambda: model(x)) == ran
    assert frozen_names(model) == set(mnv2_fused.explain(model)) and ", frozen" in str(mnv2_fused.explain(model))
    before = {name for name, parameter in model.named_parameters() if parameter.is_meta}
    assert bool(before) == release
    if not release:
        scale(model)
        mnv2_fused.freeze(model)
        with torch.no_grad():
            changed = model(x)
        assert not torch.equal(tensors(changed)[0], tensors(live)[0])
        with torch.no_grad():
            assert_same(mnv2_fused.thaw(model)(x), changed)
        assert not frozen_names(model)


def randomize_statistics(model: nn.Module) -> None:
    """Random statistics, for models that do not return one tensor as well."""
    mnv2_fused.weights.randomize_batch_norm(model)
    model.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_detector_and_dtypes(dtype):
    pytest.importorskip("torchvision")
    model = mnv2_fused.ssdlite320_mobilenet_v2(num_classes=3, width_mult=0.35, size=96)
    randomize_statistics(model)
    model.to(dtype)
    images = [torch.rand(3, 80, 96).to(dtype)]
    with torch.no_grad():
        live = model(images)
    for release in (False, True):
        assert_same(mnv2_fused.freeze(model, release=release)(images), live)


# -------------------------------------------------------------------------------------------------- what is (not) seen


def test_writes_in_place_are_not_seen():
    model = mnv2_fused.freeze(make())
    y = model(X)
    scale(model)
    model.features[2].conv[0][1].running_mean.data.add_(1)
    assert torch.equal(model(X), y)
    with torch.no_grad():
        assert not torch.equal(mnv2_fused.thaw(model)(X), y)


def _assign(name, value):
    def change(model):
        owner = model.get_submodule(name.rpartition(".")[0])
        setattr(owner, name.rpartition(".")[2], value(model.get_parameter(name)) if callable(value) else value)

    return change


def _new(parameter):
    return nn.Parameter(parameter.detach() * 1.5 + 0.01)


def hook(model):
    model.features[4].conv[1].register_forward_hook(lambda module, arguments, y: y * 2)


def _delete(model):
    del model.features[5].conv[1][1].bias
    model.features[5].conv[1][1].bias = None


def _submodule(model):
    model.features[4].conv[1][2] = nn.Hardtanh(0, 1)


def _buffer(model):
    model.features[4].conv[1][1].running_mean = torch.randn_like(model.features[4].conv[1][1].running_mean)


def _register(model):
    conv = model.features[4].conv[2]
    conv.register_parameter("weight", nn.Parameter(conv.weight.detach() * 2))


def _unit(model):
    model.features[4] = copy.deepcopy(make()).features[4]
    with torch.no_grad():
        model.features[4].conv[2].weight.mul_(2)


def _load(model):
    model.load_state_dict({name: t * 1.5 if t.is_floating_point() else t for name, t in model.state_dict().items()})


def _load_a_unit(model):
    unit = model.features[4]
    unit.load_state_dict({name: t * 1.5 if t.is_floating_point() else t for name, t in unit.state_dict().items()})


def _load_around(model):
    _load(nn.ModuleDict({"inside": model}))


def _train(model):
    scale(model)
    model.train().eval()


def _train_a_unit(model):
    scale(model)
    model.features[4].train().eval()


def _half_and_back(model):
    nn.Sequential(model).half().float()


def _half_a_unit(model):
    model.features[4].half().float()


def _switch(model):
    scale(model)
    model.fused = False


def _eps(model):
    model.features[4].conv[1][1].eps = 0.5


def _thaw(model):
    scale(model)
    mnv2_fused.thaw(model)


CHANGES = {
    "a parameter": _assign("features.4.conv.2.weight", _new),
    "the stem's parameter": _assign("features.0.0.weight", _new),
    "the classifier": lambda model: setattr(
        model, "classifier", nn.Sequential(nn.Dropout(), nn.Linear(1280, 7)).eval()
    ),
    "the classifier's bias": _assign("classifier.1.bias", _new),
    "a hook": hook,
    "a deleted parameter": _delete,
    "a submodule": _submodule,
    "a buffer": _buffer,
    "register_parameter": _register,
    "a unit": _unit,
    "load_state_dict": _load,
    "load_state_dict of a unit": _load_a_unit,
    "load_state_dict around": _load_around,
    "train": _train,
    "train of a unit": _train_a_unit,
    "half": _half_and_back,
    "half of a unit": _half_a_unit,
    "fused": _switch,
    "eps": _eps,
    "thaw": _thaw,
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_thaws(change):
    torch.manual_seed(3)
    model = mnv2_fused.freeze(make())
    with torch.no_grad():
        before = model(X)
        CHANGES[change](model)
        after = model(X)
        assert not torch.equal(before, after)
        expected = copy.deepcopy(model)
        mnv2_fused.thaw(expected)
        assert torch.equal(after, expected(X))
        scale(model)  # it is live now
        assert not torch.equal(after, model(X)) and not model._frozen


def test_a_changed_unit_between_plain_modules_thaws_alone():
    blocks = nn.Sequential(*(mnv2_fused.InvertedResidual(8, 8, 1, 6) for _ in range(2)))
    model, x = nn.Sequential(blocks[0], nn.ReLU(), blocks[1]).eval(), torch.randn(1, 8, 9, 9)
    mnv2_fused.freeze(model)
    with torch.no_grad():
        before = model(x)
        blocks[1].conv[2].weight = nn.Parameter(2 * blocks[1].conv[2].weight)
        assert not torch.equal(model(x), before)
    assert frozen_names(model) == {"0"}


def test_revert_and_convert():
    model = mnv2_fused.freeze(_convertible())
    y = model(X)
    scale(model)
    mnv2_fused.revert(model)
    with torch.no_grad():
        plain = model(X)
        assert not torch.equal(plain, y) and "_frozen" not in model.__dict__
        torch.testing.assert_close(mnv2_fused.convert(model)(X), plain, rtol=1e-3, atol=1e-3)
    assert not frozen_names(model)


def _convertible() -> nn.Module:
    try:
        model = _torchvision("mobilenet_v2")
    except extras.MissingExtraError as error:
        pytest.skip(str(error))
    randomize_statistics(model)
    return model


# ----------------------------------------------------------------------------------------------------------- gradients


def test_gradients():
    live, x = make(), X.clone().requires_grad_()
    model = mnv2_fused.freeze(copy.deepcopy(live))
    assert not model(X).requires_grad and live(X).requires_grad
    for one in (live, model):
        one(x).square().sum().backward()
    assert torch.equal(model.features[0][0].weight.grad, live.features[0][0].weight.grad)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert torch.equal(model(X), live(X))


@pytest.mark.parametrize("transform", ["vmap", "jvp", "jacrev"])
def test_functorch_and_forward_mode(transform):
    live = make()
    model = mnv2_fused.freeze(copy.deepcopy(live))
    x = X[:1, :, :32, :32]

    def run(network):
        if transform == "vmap":
            return torch.vmap(network)(x[None])
        if transform == "jvp":
            return torch.func.jvp(network, (x,), (torch.ones_like(x),))[1]
        return torch.func.jacrev(network)(x)

    torch.testing.assert_close(run(model), run(live))
    assert run(model).abs().sum() > 0


# -------------------------------------------------------------------------------------------------------------- copies


def test_copies_and_pickles_are_frozen_and_pack_anew():
    model = mnv2_fused.freeze(make())
    y = model(X)
    scale(model)
    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert frozen_names(made) == frozen_names(model)
        changed = made(X)
        assert not torch.equal(changed, y)
        scale(made)
        assert torch.equal(made(X), changed)


def test_threads():
    model, inputs = mnv2_fused.freeze(make()), [torch.randn(1, 3, 64, 64 + 8 * i) for i in range(4)]
    expected = [model(x) for x in inputs]
    model = copy.deepcopy(model)  # the threads pack it
    wrong = []

    def work(x, y):
        wrong.extend(1 for _ in range(20) if not torch.equal(model(x), y))

    threads = [threading.Thread(target=work, args=pair) for pair in zip(inputs, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("enabled", [False, True])
def test_compile_export_and_trace(fresh_dynamo, enabled):
    model = mnv2_fused.freeze(make())
    with torch.set_grad_enabled(enabled):
        y = model(X)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        exported = torch.export.export(model, (X,)).module()
        traced = torch.jit.trace(model, (X,), check_trace=False)
        for made in (compiled, exported, traced):
            torch.testing.assert_close(made(X).detach(), y, rtol=1e-3, atol=1e-3)


# -------------------------------------------------------------------------------------------------------------- errors


def test_errors():
    with pytest.raises(TypeError, match="freeze: model must be a torch"):
        mnv2_fused.freeze(3)
    with pytest.raises(TypeError, match="thaw: model must be a torch"):
        mnv2_fused.thaw(None)
    with pytest.raises(ValueError, match="freeze: model must contain a module that runs fused, got a Linear"):
        mnv2_fused.freeze(nn.Linear(1, 1))
    model = make()
    model.features[3].train()
    with pytest.raises(ValueError, match=r"freeze: model must be in eval mode, got features.3 in training mode"):
        mnv2_fused.freeze(model)
