"""Weights with the key names of other libraries, and in the wrappers of training scripts."""

from __future__ import annotations

import contextlib
import io
import json
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from mnv2_fused import MobileNetV2, extras, mobilenet_v2, weights
from mnv2_fused.weights import CONVENTIONS, WeightsError, layouts

WIDTH = 0.1  # the smallest network, to be quick


def library(name: str):
    with contextlib.suppress(extras.MissingExtraError):  # it makes torchvision importable, which others import
        extras.use(name, "test")
    return pytest.importorskip(name)


def network(convention: str, classes: int = 7, width: float = WIDTH) -> MobileNetV2:
    torch.manual_seed(0)
    model = MobileNetV2(classes, width, fused=False, **CONVENTIONS[convention].network()).eval()
    weights.randomize_batch_norm(model)
    return model


def foreign(layout: layouts.Layout, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`state_dict`, which has torchvision's names, with those of `layout`."""
    names = {ours: name for name, ours in layout.modules.items()}
    split = {key: key.rpartition(".") for key in state_dict}
    return {f"{names[module]}.{leaf}": state_dict[key] for key, (module, _, leaf) in split.items()}


def assert_computes(path: Path, model: Callable[[torch.Tensor], torch.Tensor], convention: str) -> None:
    """Whether `mobilenet_v2` of the file computes what `model` does, in float64, and trains as its library does."""
    ours = mobilenet_v2(weights=path, fused=False).eval().double()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(ours(x), expected, rtol=1e-12, atol=1e-12 * expected.abs().max().item())
    found = weights.load(path).convention
    assert found.name == convention
    norms = {(m.eps, m.momentum) for m in ours.modules() if isinstance(m, nn.BatchNorm2d)}
    assert norms == {(found.eps, found.momentum)}


# --------------------------------------------------------------------------------------------------------- libraries


@pytest.mark.parametrize("name", ["w.pth", "pytorch_model.bin", "model.safetensors"])
def test_timm(tmp_path, name):
    timm = library("timm")
    model = timm.create_model("mobilenetv2_035", num_classes=9).eval()
    weights.randomize_batch_norm(model)
    (save_file if name.endswith("safetensors") else torch.save)(model.state_dict(), tmp_path / name)
    assert_computes(tmp_path / name, model.double(), "timm")
    assert model.bn1.eps == CONVENTIONS["timm"].eps and model.bn1.momentum == CONVENTIONS["timm"].momentum


@pytest.mark.parametrize("classes", [7, 1001])
def test_transformers(tmp_path, classes):
    made = library("transformers")
    model = made.MobileNetV2ForImageClassification(made.MobileNetV2Config(depth_multiplier=0.35, num_labels=classes))
    weights.randomize_batch_norm(model.eval())
    model.save_pretrained(tmp_path)
    model.double()
    assert_computes(tmp_path / "model.safetensors", lambda x: model(x).logits, "transformers")
    norm = model.mobilenet_v2.conv_1x1.normalization
    assert (norm.eps, norm.momentum) == (CONVENTIONS["transformers"].eps, CONVENTIONS["transformers"].momentum)


class Flat(nn.Module):
    """tonylins/pytorch-mobilenet-v2's module tree on another network's layers."""

    def __init__(self, model: MobileNetV2, last_inside: bool) -> None:
        super().__init__()
        features = [model.features[0]]
        for block in list(model.features)[1:-1]:
            flat = nn.Module()
            flat.conv = nn.Sequential(*(m for m in block.conv.modules() if not isinstance(m, nn.Sequential)))
            features.append(flat)
        if last_inside:
            features.append(model.features[-1])
        else:
            self.conv = model.features[-1]
        self.features = nn.Sequential(*features)
        self.classifier = model.classifier if last_inside else model.classifier[1]


@pytest.mark.parametrize("last_inside", [False, True])
def test_flat_sequences(tmp_path, last_inside):
    model = network("torchvision")
    state_dict = Flat(model, last_inside).state_dict()
    assert "features.5.conv.7.weight" in state_dict
    torch.save(state_dict, tmp_path / "w.pth")
    assert_computes(tmp_path / "w.pth", model.double(), "torchvision")


def test_a_linear_layer_alone_as_the_classifier(tmp_path):
    model = network("torchvision")
    state_dict = {k.replace("classifier.1", "classifier"): v for k, v in model.state_dict().items()}
    torch.save(state_dict, tmp_path / "w.pth")
    assert_computes(tmp_path / "w.pth", model.double(), "torchvision")


# ------------------------------------------------------------------------------------------------------------- Keras

NAMES = {"weight": "gamma", "bias": "beta", "running_mean": "moving_mean", "running_var": "moving_variance"}


def keras_names() -> list[str]:
    """The layers with variables in the order of the network, as Keras' MobileNetV2 names them."""
    names = ["Conv1", "bn_Conv1"]
    for block in ("expanded_conv", *(f"block_{i}" for i in range(1, 17))):
        for layer in ("expand", "depthwise", "project")[block == "expanded_conv" :]:
            names += [f"{block}_{layer}", f"{block}_{layer}_BN"]
    return [*names, "Conv_1", "Conv_1_bn", "predictions"]


def keras_layers(model: MobileNetV2, classifier: str = "predictions") -> dict[str, dict[str, np.ndarray]]:
    """Keras' variables of each layer, in the order of the network."""
    layers: dict[str, dict[str, np.ndarray]] = {}
    modules = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.BatchNorm2d, nn.Linear))]
    for name, module in zip(keras_names(), modules, strict=True):
        layer = layers[classifier if name == "predictions" else name] = {}
        if isinstance(module, nn.BatchNorm2d):
            for leaf, theirs in NAMES.items():
                layer[theirs] = getattr(module, leaf).detach().numpy()
        elif isinstance(module, nn.Linear):
            layer.update(kernel=module.weight.detach().numpy().T, bias=module.bias.detach().numpy())
        else:
            axes = (2, 3, 0, 1) if module.groups > 1 else (2, 3, 1, 0)
            layer["kernel"] = module.weight.detach().numpy().transpose(axes)
    return layers


def write_numbered(group, layers, named: bool) -> None:
    """As Keras 3 does: layers by class and count, variables by number."""
    counts: dict[str, int] = {}
    for layer, variables in layers.items():
        kinds = {"gamma": "batch_normalization", "bias": "dense"}
        kind = next((kinds[leaf] for leaf in variables if leaf in kinds), "conv2d")
        if layer.endswith("_depthwise"):
            kind = "depthwise_conv2d"
        count = counts[kind] = counts.get(kind, -1) + 1
        stored = group.create_group(f"layers/{kind}_{count}/vars" if count else f"layers/{kind}/vars")
        if named:
            stored.attrs["name"] = layer
        for i, value in enumerate(variables.values()):
            stored[str(i)] = value


def write_keras(h5py, path: Path, kind: str, model: MobileNetV2) -> None:
    if kind == "zip":
        buffer = io.BytesIO()
        with h5py.File(buffer, "w") as file:
            write_numbered(file.create_group("layers/functional"), keras_layers(model), True)
            file["optimizer/vars/0"] = np.zeros(3)
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("config.json", "{}")
            archive.writestr("model.weights.h5", buffer.getvalue())
        return
    with h5py.File(path, "w") as file:
        if kind.startswith("numbered"):
            write_numbered(file, keras_layers(model), kind == "numbered, named")
            return
        nested = "model_weights/mobilenetv2_1.00_224" if kind == "nested" else ""
        for layer, variables in keras_layers(model, "Logits" if kind == "Google" else "my_head").items():
            for leaf, value in variables.items():
                leaf = "depthwise_kernel" if kind == "Google" and "depthwise" in layer and leaf == "kernel" else leaf
                file[f"{nested}/{layer}/{leaf}" if nested else f"{layer}/{layer}/{leaf}:0"] = value


@pytest.mark.parametrize("kind", ["Google", "nested", "numbered", "numbered, named", "zip"])
def test_keras(tmp_path, kind):
    h5py, model = library("h5py"), network("keras")
    write_keras(h5py, tmp_path / "w", kind, model)
    assert_computes(tmp_path / "w", model.double(), "keras")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda f: f.create_dataset("extra/extra/kernel", data=np.zeros((3, 3))),
            "unknown keys for Keras's .* extra.weight",
        ),
        (lambda f: f.create_dataset("again/Conv1/kernel", data=np.zeros((3, 3))), "two layers are named Conv1"),
        (lambda f: f.pop("Conv_1"), r"missing keys of Keras's MobileNetV2: Conv_1\.weight$"),
        (lambda f: f.create_dataset("other/x/kernel", data="text"), "is not a readable Keras file"),
        (
            lambda f: f.create_dataset("x/y/kernel", (1,), "f4", external=[("/etc/hostname", 0, 4)]),
            "is not a readable Keras file: x/y/kernel is stored in another file",
        ),
    ],
)
def test_keras_files_that_do_not_fit(tmp_path, change, message):
    h5py = library("h5py")
    write_keras(h5py, tmp_path / "w.h5", "Google", network("keras"))
    with h5py.File(tmp_path / "w.h5", "a") as file:
        change(file)
    with pytest.raises(WeightsError, match=message):
        weights.load(tmp_path / "w.h5")


@pytest.mark.parametrize("share", [0.01, 0.5])
@pytest.mark.parametrize("kind", ["Google", "zip"])
def test_truncated_keras_files(tmp_path, kind, share):
    path = tmp_path / "w.keras"
    write_keras(library("h5py"), path, kind, network("keras"))
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(WeightsError, match=r"w\.keras"):
        weights.load(path)


def test_keras_without_h5py(tmp_path, monkeypatch):
    (tmp_path / "w.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(extras.MissingExtraError, match=r'pip install "mnv2_fused\[keras\]"'):
        weights.load(tmp_path / "w.h5")


# ---------------------------------------------------------------------------------------------------------- wrappers


@pytest.mark.parametrize(
    ("key", "prefix"),
    [
        ("state_dict", "model."),
        ("state_dict", "model._orig_mod."),
        ("model_state_dict", ""),
        ("model", "module."),
        ("net", "module._orig_mod."),
        (None, "_orig_mod."),
        (None, "net."),
    ],
)
@pytest.mark.parametrize("layout", [layouts.TIMM, layouts.TRANSFORMERS, None], ids=["timm", "hf", "torchvision"])
def test_wrappers(tmp_path, key, prefix, layout):
    expected = network("torchvision").state_dict()
    theirs = foreign(layout, expected) if layout else expected
    wrapped = {f"{prefix}{name}": value for name, value in theirs.items()}
    torch.save({"epoch": 3, key: wrapped} if key else wrapped, tmp_path / "w.pth")
    loaded = weights.load(tmp_path / "w.pth").state_dict
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], value) for name, value in expected.items())


def test_averaged_models(tmp_path):
    model = network("torchvision")
    averaged = torch.optim.swa_utils.AveragedModel(model)
    assert "n_averaged" in averaged.state_dict()
    torch.save(averaged.state_dict(), tmp_path / "w.pth")
    assert_computes(tmp_path / "w.pth", model.double(), "torchvision")


def test_two_keys_of_one_name(tmp_path):
    state_dict = foreign(layouts.TIMM, network("timm").state_dict())
    state_dict["module.conv_stem.weight"] = state_dict["conv_stem.weight"]
    torch.save(state_dict, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"unknown keys for timm's MobileNetV2: module\.conv_stem\.weight$"):
        weights.load(tmp_path / "w.pth")


# ------------------------------------------------------------------------------------------------------------- misfits


@pytest.mark.parametrize("layout", [layouts.FLAT, layouts.TIMM, layouts.TRANSFORMERS], ids=lambda one: one.library)
def test_unknown_and_missing_keys_are_listed(tmp_path, layout):
    theirs = foreign(layout, network("torchvision").state_dict())
    torch.save({**theirs, **{f"extra.{i}": torch.zeros(1) for i in range(14)}}, tmp_path / "more.pth")
    with pytest.raises(WeightsError, match=rf"unknown keys for {layout.library}.*: extra.0, .*extra.11 and 2 more$"):
        weights.load(tmp_path / "more.pth")
    torch.save({key: value for key, value in theirs.items() if "classifier" not in key}, tmp_path / "less.pth")
    with pytest.raises(WeightsError, match=rf"missing keys of {layout.library}.*: classifier"):
        weights.load(tmp_path / "less.pth")


@pytest.mark.parametrize(
    ("config", "refused"),
    [
        ({"tf_padding": False}, "tf_padding: expected True, got False"),
        ({"layer_norm_eps": 1e-5}, "layer_norm_eps: expected 0.001, got 1e-05"),
        ({"tf_padding": True, "layer_norm_eps": 0.001}, None),
        ([], None),
    ],
)
def test_a_configuration_that_changes_the_network(tmp_path, config, refused):
    torch.save(foreign(layouts.TRANSFORMERS, network("transformers").state_dict()), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps(config))
    if refused is None:
        weights.load(tmp_path / "pytorch_model.bin")
    else:
        with pytest.raises(WeightsError, match=f"config.json: {refused}"):
            weights.load(tmp_path / "pytorch_model.bin")


def test_the_convention_can_be_forced(tmp_path):
    torch.save(foreign(layouts.TIMM, network("timm").state_dict()), tmp_path / "w.pth")
    assert weights.load(tmp_path / "w.pth", "tensorflow").convention == CONVENTIONS["tensorflow"]
